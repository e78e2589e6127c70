"""HetLoRA: zero padding, with larger weights for clients whose updates are larger."""

from __future__ import annotations

from coordinator.aggregation import Averages, ModuleRound
from coordinator.contributions import Weights, by_norm


class HetLoRA(Averages):
    """The averaged, padded factors, each client weighted by its share and by the norm of its update.

    Departures: the norm is of each module's s b a, so that modules merge apart, and the share p multiplies it, so that a
    client that is counted twice counts twice. Pruning of a client's own rank is left to the rank policy.
    Source: HetLoRA, arXiv:2401.06432 (sparsity-weighted aggregation).
    """

    equation = "W ← (Σ w s b)(Σ w a), padded, w ∝ p ‖s b a‖"
    source = "arXiv:2401.06432"

    def weights(self, round: ModuleRound) -> Weights:
        """w ∝ p ‖s b a‖_F."""
        return by_norm(round)
