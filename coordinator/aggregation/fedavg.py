"""FedAvg: federated averaging of the factors, for equal ranks."""

from __future__ import annotations

from coordinator.aggregation import Averages, ModuleRound
from coordinator.sums import Sum
from protocol import errors


class FedAvg(Averages):
    """The averaged factors of clients of one rank; the mean of products has no such cross terms.

    Raises UnmergeableRound where ranks differ: give the plan a ladder of one rung, or another strategy.
    Source: FedIT, arXiv:2305.05644.
    """

    equal_ranks = True
    equation = "W ← (Σ p s b)(Σ p a)"
    source = "arXiv:2305.05644"

    def combine(self, round: ModuleRound) -> Sum:
        """(Σ p s b)(Σ p a)."""
        ranks = sorted({c.factors.rank for c in round.contributions})
        if len(ranks) > 1:
            raise errors.UnmergeableRound(f"fedavg takes contributions of one rank; ranks {ranks} came: use one rung, or another strategy")
        return super().combine(round)
