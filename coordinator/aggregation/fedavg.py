"""FedAvg: federated averaging of the factors, for equal ranks."""

from __future__ import annotations

from coordinator.aggregation import ModuleRound, Strategy
from coordinator.contributions import averaged, by_share
from coordinator.sums import Sum
from protocol import errors


class FedAvg(Strategy):
    """The product of the averaged factors of clients of one rank; the mean of products has no such cross terms.

    Raises UnmergeableRound where ranks differ: give the plan a ladder of one rung, or another strategy.
    Source: FedIT, arXiv:2305.05644.
    """

    exact = False
    linear = False
    gauge_free = False
    equal_ranks = True
    equation = "W ← (Σ p √s b)(Σ p √s a)"
    cost = "D r² + r³"
    source = "arXiv:2305.05644"

    def combine(self, round: ModuleRound) -> Sum:
        """(Σ p √s b)(Σ p √s a)."""
        ranks = sorted({c.factors.rank for c in round.contributions})
        if len(ranks) > 1:
            raise errors.UnmergeableRound(f"fedavg takes contributions of one rank; ranks {ranks} came: use one rung, or another strategy")
        return Sum(round.shape, [averaged(round, by_share(round))])
