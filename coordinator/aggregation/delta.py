"""Delta: the clients' changes, added to what the coordinator already has."""

from __future__ import annotations

from collections import defaultdict

from coordinator.aggregation import Given, ModuleRound, Strategy
from coordinator.sums import Sum, Term


class Delta(Strategy):
    """The weighted mean of the clients' changes, added to the global adapter; what nobody changes stays.

    W ← W + Σ p γ (s b a − s₀ b₀ a₀), where b₀ a₀ is the slice that the client was given. Clients that were given the same
    slice share one term for it, so that the stacked rank grows with the ladder and not with the clients once more.
    Source: the change form of FedHL, arXiv:2505.18494, with the weights of federated averaging.
    """

    exact = True
    linear = True
    gauge_free = True
    source = "arXiv:2505.18494"

    def combine(self, round: ModuleRound) -> Sum:
        """W + Σ p γ s b a − Σ (Σ p γ) s₀ b₀ a₀ over the distinct slices given."""
        trained = [Term(c.factors, c.weight * c.shrink * c.scale) for c in round.contributions]
        given: dict[str, Given] = {c.given.digest: c.given for c in round.contributions}
        weights: defaultdict[str, float] = defaultdict(float)
        for c in round.contributions:
            weights[c.given.digest] += c.weight * c.shrink
        started = [Term(given[digest].factors, -weight * given[digest].scale) for digest, weight in weights.items()]
        return Sum(round.shape, [Term(round.adapter, 1.0), *trained, *started])
