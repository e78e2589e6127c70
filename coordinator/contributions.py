"""What a strategy is told of a round, and the few choices that strategies are made of.

what is summed       products · changes · additions · moved b alone · averaged factors
with which weights   by_share · by_direction · by_norm
what else is kept    untouched: the adapter's directions that nobody trained
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coordinator.sums import Stored, Term
from protocol import errors
from protocol.slices import Factors

Weights = Sequence[Tensor]  # for each contribution one weight per direction, (r,) float64


@dataclass(frozen=True)
class Given:
    """What was handed out to start from; equal digests are equal files."""

    digest: str
    factors: Factors | Stored
    scale: float


@dataclass(frozen=True)
class Leading:
    """The first directions of a pair of factors, which may lie in a file."""

    whole: Factors | Stored
    rank: int

    def load(self) -> Factors:
        found = self.whole if isinstance(self.whole, Factors) else self.whole.load()
        return found.leading(self.rank)


@dataclass(frozen=True)
class Contribution:
    """One accepted slice's factors of one module, and what they started from.

    What a client claims is its change, scale · b @ a − given.scale · given.b @ given.a, over the directions that it trained.
    Where that was larger than the plan allows, only the share `shrink` of it counts.
    """

    factors: Factors | Stored
    scale: float
    weight: float  # p ≥ 0; those of a round sum to one
    shrink: float  # γ in (0, 1]
    given: Given
    directions: tuple[int, ...] | None = None  # of what was given, those that the factors were trained from; all if none

    @property
    def positions(self) -> Tensor:
        """Where in what was given the trained directions stand: (r,) int64."""
        return torch.arange(self.given.factors.rank) if self.directions is None else torch.tensor(self.directions)

    def started(self, shape: tuple[int, int]) -> Factors:
        """The trained directions as they were given."""
        return Term(self.given.factors, 1.0).load(shape).of(self.directions)


@dataclass(frozen=True)
class ModuleRound:
    """All that a strategy may know of one module in one round, in an order that depends on contents alone."""

    shape: tuple[int, int]  # (n_out, n_in)
    round: int
    adapter: Factors | Stored  # W before the round: scale 1
    contributions: tuple[Contribution, ...]
    earlier: Factors | Stored | None = None  # W one round before that, scale 1; none in the first round

    def __post_init__(self) -> None:
        if not self.contributions:
            raise errors.NoContributions("a round needs at least one contribution")


# --- with which weights ------------------------------------------------------------------------------------------------


def by_share(round: ModuleRound) -> Weights:
    """Every direction of a contribution counts with its share p."""
    return [torch.full((c.factors.rank,), c.weight, dtype=torch.float64) for c in round.contributions]


def by_direction(round: ModuleRound, power: float = 1.0) -> Weights:
    """Direction i counts with p / qᵢ^power, where qᵢ is the share of those who trained it; at 1 it is averaged over them alone."""
    trained = _trained(round).pow(power)
    return [c.weight / trained[c.positions] for c in round.contributions]


def by_norm(round: ModuleRound) -> Weights:
    """All of a contribution counts in proportion to p ‖s b a‖_F; with its share p where all of them are zero."""
    sizes = [c.weight * c.scale * _norm(_load(c.factors, round)) for c in round.contributions]
    total = sum(sizes)
    if not total > 0:
        return by_share(round)
    return [torch.full((c.factors.rank,), size / total, dtype=torch.float64) for c, size in zip(round.contributions, sizes, strict=True)]


def _trained(round: ModuleRound) -> Tensor:
    """qᵢ: the share of those who trained the direction at position i of what was given, float64."""
    shares = torch.zeros(max(c.given.factors.rank for c in round.contributions), dtype=torch.float64)
    for c in round.contributions:
        shares[c.positions] += c.weight
    return shares


def _norm(factors: Factors) -> float:
    b, a = factors.b.double(), factors.a.double()
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())


# --- what is summed ----------------------------------------------------------------------------------------------------


def products(round: ModuleRound, weights: Weights) -> list[Term]:
    """Σ w (γ s b a + (1 − γ) s₀ b₀ a₀)."""
    pairs = list(zip(round.contributions, weights, strict=True))
    trained = [Term(c.factors, w * (c.shrink * c.scale)) for c, w in pairs]
    return trained + [Term(c.given.factors, _spread(c, w) * ((1 - c.shrink) * c.given.scale)) for c, w in pairs if c.shrink < 1]


def changes(round: ModuleRound, weights: Weights, step: float = 1.0) -> list[Term]:
    """Step · Σ w γ (s b a − s₀ b₀ a₀); those who were given the same file share one term for it."""
    pairs = _counted(round, weights, step)
    return [Term(c.factors, w * c.scale) for c, w in pairs] + _starts(pairs)


def _starts(pairs: Sequence[tuple[Contribution, Tensor]]) -> list[Term]:
    """− Σ w s₀ b₀ a₀, a term for each file."""
    files: dict[str, list[tuple[Contribution, Tensor]]] = {}
    for c, w in pairs:
        files.setdefault(c.given.digest, []).append((c, w))
    return [_start(users) for users in files.values()]


def _start(users: Sequence[tuple[Contribution, Tensor]]) -> Term:
    """− Σ w s₀ b₀ a₀ of those who were given the same file, up to its last direction that anybody trained."""
    file, last = users[0][0].given, 1 + max(int(c.positions.max()) for c, _ in users)
    weights = torch.stack([_spread(c, w) for c, w in users]).sum(dim=0)[:last]
    return Term(file.factors if last == file.factors.rank else Leading(file.factors, last), -file.scale * weights)


def additions(round: ModuleRound, weights: Weights, step: float = 1.0) -> list[Term]:
    """Step · Σ w γ s b a: what was changed of directions that began as nothing, so that b₀ was zero."""
    return [Term(c.factors, w * c.scale) for c, w in _counted(round, weights, step)]


def moved(round: ModuleRound, weights: Weights, step: float = 1.0) -> Tensor:
    """Step · Σ w γ (s b − s₀ b₀), each direction at its position: (n_out, directions of the adapter) float64."""
    b = torch.zeros(round.shape[0], round.adapter.rank, dtype=torch.float64)
    pairs = _counted(round, weights, step)
    for c, w in pairs:
        b[:, c.positions] += w * c.scale * _load(c.factors, round).b.double()
    for start in _starts(pairs):
        b[:, : start.factors.rank] += start.weights() * start.load(round.shape).b.double()
    return b


def averaged(round: ModuleRound, weights: Weights) -> Factors:
    """Σ w s b and Σ w a, float64, each direction at its position; where nobody trained one it is zero.

    The scale stands with b, so that a is the same for clients of unequal scales. Where γ < 1 a factor moves only so far.
    """
    n_out, n_in = round.shape
    rank = 1 + max(int(c.positions.max()) for c in round.contributions)
    b, a = torch.zeros(n_out, rank, dtype=torch.float64), torch.zeros(rank, n_in, dtype=torch.float64)
    for c, w in zip(round.contributions, weights, strict=True):
        parts = [(c.shrink, c.scale, _load(c.factors, round))]
        if c.shrink < 1:
            parts.append((1 - c.shrink, c.given.scale, c.started(round.shape)))
        for share, scale, factors in parts:
            b[:, c.positions] += w * (share * scale) * factors.b.double()
            a[c.positions] += w[:, None] * share * factors.a.double()
    return Factors(b=b, a=a)


def _counted(round: ModuleRound, weights: Weights, step: float) -> list[tuple[Contribution, Tensor]]:
    """The contributions, with step · w γ."""
    return [(c, w * (step * c.shrink)) for c, w in zip(round.contributions, weights, strict=True)]


def untouched(round: ModuleRound) -> Term:
    """The adapter's directions that nobody trained in this round."""
    kept = torch.ones(round.adapter.rank, dtype=torch.float64)
    for c in round.contributions:
        kept[c.positions[c.positions < len(kept)]] = 0.0
    return Term(round.adapter, kept)


def _spread(c: Contribution, weights: Tensor) -> Tensor:
    """The weights of a contribution's directions, over all directions of what it was given; zero where it trained none."""
    held = c.given.factors.rank
    return weights[:held] if c.directions is None else torch.zeros(held, dtype=torch.float64).index_copy(0, c.positions, weights)


def _load(factors: Factors | Stored, round: ModuleRound) -> Factors:
    return Term(factors, 1.0).load(round.shape)
