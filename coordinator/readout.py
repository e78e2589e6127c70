"""An adapter with fewer directions: how many each module keeps, and what that leaves out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

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


def read_out(adapter: Mapping[str, Callable[[], Factors]], wanted: Wanted) -> ReadOut:
    """What shall be left of an adapter in singular form, whose modules are loaded one after another."""
    energies = {module: _energies(load()) for module, load in adapter.items()}
    ranks = _ranks(energies, wanted)
    total = sum(float(energy.sum()) for energy in energies.values())
    lost = sum(float(energy[ranks[module] :].sum()) for module, energy in energies.items())
    return ReadOut(ranks, lost / total if total > 0 else 0.0)


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


def _ranks(energies: Mapping[str, Tensor], wanted: Wanted) -> dict[str, int]:
    if wanted.kept is None:
        return dict.fromkeys(energies, wanted.rank)
    if wanted.uniform:
        together = sum(energies.values())
        assert isinstance(together, Tensor), "an adapter has modules"
        return dict.fromkeys(energies, min(wanted.rank, _smallest(together, wanted.kept)))
    return {module: min(wanted.rank, _smallest(energy, wanted.kept)) for module, energy in energies.items()}


def _smallest(energies: Tensor, kept: float) -> int:
    """The smallest rank that holds this share of their sum, at least 1."""
    held = energies.cumsum(dim=0)
    return 1 + int((held[:-1] < kept * held[-1]).sum())
