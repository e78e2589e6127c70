"""Zero padding: factors averaged one by one, as federated averaging of equal ranks does."""

from __future__ import annotations

from coordinator.aggregation import ModuleRound, Strategy
from coordinator.contributions import averaged, by_share
from coordinator.sums import Sum


class ZeroPad(Strategy):
    """The product of the averaged factors, lower ranks padded with zeros: cross terms, and quick loss of high directions.

    A direction held by clients with the share m of the weight is multiplied by m² each round. Kept as a baseline.
    Source: the zero padding that HetLoRA, arXiv:2401.06432, starts from.
    """

    exact = False
    linear = False
    gauge_free = False
    equation = "W ← (Σ p √s b)(Σ p √s a), padded"
    cost = "D r² + r³"
    source = "arXiv:2401.06432"

    def combine(self, round: ModuleRound) -> Sum:
        """(Σ p √s b)(Σ p √s a)."""
        return Sum(round.shape, [averaged(round, by_share(round))])
