"""Trained slices as int8: what was changed of the slice handed out, one scale for each direction.

A tensor x that was x₀ travels as q = round((x − x₀) / t), halves to even, −127 … 127, with t = max |x − x₀| / 127 beside it
in float32; it is read as x₀ + t q, in float32. Every direction has a scale t of its own: each row of a and each column of b,
so that a direction is as exact as any other, whatever their sizes; a fully trained tensor has one for each of its rows.

Why the change and not the tensor itself: rounding is then an error in proportion to the change, as large in the last round as
in the first, and what moved by less than a step of a large tensor is not lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from protocol import errors
from protocol.contents import SCALES, head, names, scales
from protocol.plan import Dtype, Layout, Sides
from protocol.slices import TORCH_DTYPES, Slice, numbers, parts

STEPS = 127


def trained_parts(
    slice: Slice, start: Slice, layout: Layout, dtype: Dtype, *, directions: Sequence[int] | None = None, sides: Sides = Sides.both
) -> Iterator[bytes | memoryview]:
    """A trained slice's file, one tensor at a time; `start` is the slice that was handed out, of which these directions were trained."""
    if dtype is not Dtype.int8:
        yield from parts(slice, layout, dtype, sides)
        return
    yield head(layout, slice.label, dtype, sides)
    for name, (new, old) in zip(names(layout, slice.label.rank, sides), _pairs(slice, start, layout, directions, sides), strict=True):
        steps, sizes = written(name, new, old)
        yield numbers(steps, dtype=Dtype.int8)
        yield numbers(sizes, dtype=Dtype.float32)


def _pairs(slice: Slice, start: Slice, layout: Layout, directions: Sequence[int] | None, sides: Sides) -> Iterator[tuple[Tensor, Tensor]]:
    """Each tensor with what it was, in the order of the file."""
    for module in layout.modules:
        new, old = slice.factors[module], start.factors[module].of(directions)
        if sides is Sides.both:
            yield new.a, old.a
        yield new.b, old.b
    for name in layout.full:
        yield slice.full[name], start.full[name]


def arrived(name: str, new: Tensor, old: Tensor, dtype: Dtype) -> Tensor:
    """A trained tensor of that name, and old value, as it is read at the other end."""
    return restored(name, *written(name, new, old), old) if dtype is Dtype.int8 else new.to(TORCH_DTYPES[dtype])


def written(name: str, new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor of that name as steps from its old value, int8, and their sizes, float32: one for each direction or row."""
    change = new.float() - old.float()
    rows = change.movedim(_axis(name), 0).reshape(scales(name, tuple(new.shape)), -1)
    sizes = rows.abs().amax(dim=1) / STEPS  # NaN where there is one, so that it is refused
    steps = (change / _spread(name, sizes, change)).round().nan_to_num().clamp(-STEPS, STEPS)  # no change by no size: no step
    return steps.to(torch.int8), sizes


def restored(name: str, steps: Tensor, sizes: Tensor, old: Tensor) -> Tensor:
    """The tensor that was written as steps from its old value, float32.

    Raises NonFiniteSlice for a size that is no number; MismatchedSlice for what nobody writes, a negative size or a step of −128,
    and for other shapes than the old value's.
    """
    if steps.shape != old.shape or sizes.shape != (scales(name, tuple(old.shape)),):
        raise errors.MismatchedSlice(
            f"{name} has shape {list(steps.shape)}, {len(sizes)} scales and was {list(old.shape)}; equal ones were expected", tensor=name
        )
    if not bool(torch.isfinite(sizes).all()):
        raise errors.NonFiniteSlice(f"{name}{SCALES} holds NaN or infinity", tensor=name + SCALES)
    if bool((sizes < 0).any()):
        raise errors.MismatchedSlice(f"{name}{SCALES} holds a negative number; sizes of steps are none", tensor=name + SCALES)
    if bool((steps < -STEPS).any()):
        raise errors.MismatchedSlice(f"{name} holds −128; steps from −{STEPS} to {STEPS} were expected", tensor=name)
    return old.float() + _spread(name, sizes, steps) * steps


def _axis(name: str) -> int:
    return 1 if name.startswith("factors/") and name.endswith("/b") else 0


def _spread(name: str, sizes: Tensor, tensor: Tensor) -> Tensor:
    """Each direction's or row's size beside its numbers."""
    return sizes if _axis(name) == 1 else sizes.reshape(-1, *[1] * (tensor.ndim - 1))
