"""HetLoRA: zero padding, with larger weights for clients whose updates are larger."""

from __future__ import annotations

from coordinator.aggregation import ModuleRound, Strategy
from coordinator.contributions import averaged, by_norm
from coordinator.sums import Sum


class HetLoRA(Strategy):
    """The product of the averaged, padded factors, each client weighted by its share and by the norm of its update.

    Departures: the norm is of each module's s b a, so that modules merge apart, and the share p multiplies it, so that a
    client that is counted twice counts twice. Pruning of a client's own rank is left to the rank policy.
    Source: HetLoRA, arXiv:2401.06432 (sparsity-weighted aggregation).
    """

    exact = False
    linear = False
    gauge_free = False
    equation = "W ← (Σ w √s b)(Σ w √s a), padded, w ∝ p ‖s b a‖"
    cost = "D r² + r³"
    source = "arXiv:2401.06432"

    def combine(self, round: ModuleRound) -> Sum:
        """(Σ w √s b)(Σ w √s a) with w ∝ p ‖s b a‖_F."""
        return Sum(round.shape, [averaged(round, by_norm(round))])
