"""What is checked of a trained slice before it counts, cheapest first; each check raises its own kind of InvalidSlice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from protocol import errors
from protocol.contents import WIRE_NAMES, Header, contents
from protocol.plan import Dtype, Layout, Sides
from protocol.slices import TORCH_DTYPES, Factors

CANCELLING = 1e4  # times what a slice's directions add up to they may hold alone; trained ones hold some times as much


@dataclass(frozen=True)
class Expected:
    """The slice that a job asked for."""

    layout: Layout
    rank: int
    scale: float
    dtype: Dtype  # in which it comes
    base: str  # digest of the slice that was handed out
    round: int
    directions: tuple[int, ...] | None = None  # those of it that were trained; all if none
    sides: Sides = Sides.both
    wire: Dtype = Dtype.float32  # in which the next slices are handed out


def check_header(header: Header, expected: Expected) -> None:
    """Raises MismatchedSlice unless label, names, shapes and dtypes are exactly those that the job asked for."""
    label = header.label
    for what, came, wanted in (
        ("rank", label.rank, expected.rank),
        ("scale", label.scale, expected.scale),
        ("base", label.base, expected.base),
        ("round", label.round, expected.round),
    ):
        if came != wanted:
            raise errors.MismatchedSlice(f"the slice's {what} is {came}; the job's is {wanted}", expected=wanted, came=came)
    wanted_tensors = contents(expected.layout, expected.rank, expected.dtype, expected.sides)
    missing = sorted(wanted_tensors.keys() - header.entries.keys())
    extra = sorted(header.entries.keys() - wanted_tensors.keys())
    if missing or extra:
        raise errors.MismatchedSlice(
            f"{len(missing)} tensors are missing and {len(extra)} are not the job's, first {(missing or extra)[0][:200]}",
            missing=[name[:200] for name in missing[:10]],
            extra=[name[:200] for name in extra[:10]],
        )
    for name, (dtype, shape) in wanted_tensors.items():
        entry = header.entries[name]
        if entry.shape != shape:
            raise errors.MismatchedSlice(f"{name} has shape {list(entry.shape)}; {list(shape)} was expected", tensor=name)
        if entry.dtype != WIRE_NAMES[dtype]:
            raise errors.MismatchedSlice(f"{name} is {entry.dtype}; {WIRE_NAMES[dtype]} was expected", tensor=name)


def is_finite(tensor: Tensor) -> bool:
    """Whether the tensor holds neither NaN nor infinity.

    One of them makes the sum of all numbers one of them too, and summing costs a twentieth of looking at each. A sum that is
    beyond the dtype says nothing: then each is looked at.
    """
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises NonFiniteSlice if the tensor holds NaN or infinity."""
    if not is_finite(tensor):
        raise errors.NonFiniteSlice(f"{name} holds NaN or infinity", tensor=name)


def change_energy(new: Factors, scale: float, old: Factors, old_scale: float) -> float:
    """‖s b a − s₀ b₀ a₀‖²_F from Gram matrices of size r + r₀, in float64; never the dense matrix.

    With B = [b, b₀], A = [a; a₀] and D = diag(s, −s₀):  ‖B D A‖² = tr(D BᵀB D A Aᵀ). Cost (n_out + n_in)(r + r₀)².
    """
    b = torch.cat([new.b, old.b], dim=1).double()  # (n_out, r + r₀)
    a = torch.cat([new.a, old.a], dim=0).double()  # (r + r₀, n_in)
    d = torch.tensor([scale] * new.rank + [-old_scale] * old.rank, dtype=torch.float64)
    gram_b = d[:, None] * (b.T @ b) * d[None, :]
    return max(0.0, float((gram_b * (a @ a.T)).sum()))


def direction_energy(factors: Factors) -> float:
    """Σ ‖bᵢ‖² ‖aᵢ‖²: what the directions would hold if none of them met another, in float64."""
    return float(factors.b.double().square().sum(dim=0).dot(factors.a.double().square().sum(dim=1)))


def check_full(name: str, blocks: Iterable[tuple[Tensor, Tensor]], wire: Dtype) -> float:
    """‖t − t₀‖²_F in float64 of a fully trained tensor, which comes in blocks (n,), each with what it was.

    Raises NonFiniteSlice; ExcessiveChange where a number is beyond half of the wire's largest: a mean of numbers within can be
    handed out, and the other half is for what the tensor is already where contributions are buffered, which add their change to it.
    """
    energy, largest = 0.0, torch.finfo(TORCH_DTYPES[wire]).max / 2
    for new, old in blocks:
        check_finite(f"full/{name}", new)
        if not (size := float(new.abs().max())) <= largest:
            raise errors.ExcessiveChange(f"full/{name} holds a number of size {size:.6g}; slices in {wire} can hold {largest:.6g}")
        change = new.double().sub_(old)
        energy += float(change.dot(change))
    return energy


def check_change(load_new: Callable[[str], Factors], load_old: Callable[[str], Factors], expected: Expected) -> float:
    """‖change‖_F over all modules, one module in memory at a time.

    Raises ExcessiveChange where a slice of the next adapter might not hold it: with singular values up to s · m, where m is
    the wire's largest number, every split has factors up to m. Half of that leaves room for what the adapter is already.
    And where a module's directions cancel each other beyond measure: they add up to little, and would drown a sum in their rounding.
    """
    energy = 0.0
    for module in expected.layout.modules:
        new, old = load_new(module), load_old(module)
        changed = change_energy(new, expected.scale, old, expected.scale)
        alone, held = (expected.scale**2 * direction_energy(x) for x in (new, old))
        if alone > CANCELLING * (changed + held):
            raise errors.ExcessiveChange(
                f"the directions of {module} cancel each other: alone they hold {alone:.6g}, and the change of what was handed out, "
                f"which held {held:.6g}, is {changed:.6g}; at most {CANCELLING:g} times as much as both was expected"
            )
        energy += changed
    largest = expected.scale * torch.finfo(TORCH_DTYPES[expected.wire]).max / 2
    if not math.sqrt(energy) <= largest:
        raise errors.ExcessiveChange(f"the change's norm is {math.sqrt(energy):.6g}; slices in {expected.wire} can hold {largest:.6g}")
    return math.sqrt(energy)
