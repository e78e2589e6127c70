"""An adapter with fewer directions: how many each module keeps, and what that leaves out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from coordinator.lowrank import pad, truncate
from coordinator.sums import Sum, Term
from protocol.slices import Factors


@dataclass(frozen=True)
class Wanted:
    """At most so many directions in each module; with `kept`, as few as hold that share of the energy ‖W‖²_F.

    The share is each module's own, or, uniform, that of all modules together, which have one rank then.
    """

    rank: int
    kept: float | None = None  # in (0, 1]
    uniform: bool = False


@dataclass(frozen=True)
class ReadOut:
    """Each module's rank, and the share of all modules' energy that these ranks leave out."""

    ranks: Mapping[str, int]
    left_out: float


def read_out(adapter: Mapping[str, Callable[[], Factors]], directions: int, wanted: Wanted) -> ReadOut:
    """What shall be left of an adapter in singular form of so many directions, whose modules are loaded one after another."""
    energies = torch.zeros(len(adapter), directions, dtype=torch.float64)  # in one piece: crumbs between large blocks scatter the heap
    for row, load in zip(energies, adapter.values(), strict=True):
        row.copy_(_energies(load()))
    ranks = _ranks(energies, wanted)
    total = float(energies.sum())
    lost = sum(float(row[rank:].sum()) for row, rank in zip(energies, ranks, strict=True))
    return ReadOut(dict(zip(adapter, ranks, strict=True)), lost / total if total > 0 else 0.0)


def leading(factors: Factors, rank: int) -> Factors:
    """The leading directions of a module in singular form; zero directions follow where it has fewer."""
    return pad(Factors(b=factors.b[:, :rank].contiguous(), a=factors.a[:rank].contiguous()), rank)


def singular(factors: Factors) -> Factors:
    """The same module in singular form, b = U√S and a = √S Vᵀ with S falling, whatever form it was kept in."""
    w = Sum((len(factors.b), factors.a.shape[1]), [Term(factors, 1.0)])
    return truncate(w, factors.rank).padded(factors.rank)


def _energies(factors: Factors) -> Tensor:
    """Squared singular values, (r,) float64: those of b = U√S, a = √S Vᵀ are sᵢ = ‖bᵢ‖ ‖aᵢ‖."""
    found: Tensor = factors.b.double().square().sum(dim=0) * factors.a.double().square().sum(dim=1)
    return found


def _ranks(energies: Tensor, wanted: Wanted) -> list[int]:
    """Each module's rank, for energies (modules, directions)."""
    if wanted.kept is None:
        return [wanted.rank] * len(energies)
    if wanted.uniform:
        return [min(wanted.rank, _smallest(energies.sum(dim=0), wanted.kept))] * len(energies)
    return [min(wanted.rank, _smallest(energy, wanted.kept)) for energy in energies]


def _smallest(energies: Tensor, kept: float) -> int:
    """The smallest rank that holds this share of their sum, at least 1."""
    held = energies.cumsum(dim=0)
    return 1 + int((held[:-1] < kept * held[-1]).sum())
