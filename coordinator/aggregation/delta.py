"""Delta: the clients' changes, added to what the coordinator already has."""

from __future__ import annotations

from coordinator.aggregation import Changes


class Delta(Changes):
    """The weighted mean of the clients' changes, added to the global adapter; what nobody changes stays.

    b₀ a₀ is the slice that the client was given. Clients that were given the same slice share one term for it, and where it
    travelled in float32 it is folded into the adapter's weights, so that the stacked rank grows with clients alone.
    Source: the change form of FedHL, arXiv:2505.18494, with the weights of federated averaging.
    """

    exact = True
    linear = True
    gauge_free = True
    equation = "W ← W + Σ p (s b a − s₀ b₀ a₀)"
    source = "arXiv:2505.18494"
