"""Zero padding: factors averaged one by one, as federated averaging of equal ranks does."""

from __future__ import annotations

from coordinator.aggregation import Averages


class ZeroPad(Averages):
    """The averaged factors, lower ranks padded with zeros: cross terms between clients, and quick loss of high directions.

    A direction held by clients with the share m of the weight is multiplied by m² each round. Kept as a baseline.
    Source: the zero padding that HetLoRA, arXiv:2401.06432, starts from.
    """

    equation = "W ← (Σ p s b)(Σ p a), padded"
    source = "arXiv:2401.06432"
