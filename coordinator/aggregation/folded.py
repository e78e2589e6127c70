"""Folded: the clients' changes, each trained on top of the whole adapter where the client can carry it, and not of its slice alone."""

from __future__ import annotations

from coordinator.aggregation import Changes, Portion


class Folded(Changes):
    """The sum of `delta`, from clients that start from the whole adapter if they can carry it: they train its first r directions.

    The others stay frozen, so that no such client starts from a model that lacks what its rank cannot hold, and the cap may be above
    the ladder's largest rank. Where a client's link, memory or owner does not carry the whole adapter beside its rank, it starts from
    its slice, as under `delta`: the sum is one of changes, each told from where it began.
    Source: the change form of FedHL, arXiv:2505.18494; the frozen remainder is added here.
    """

    exact = True
    linear = True
    gauge_free = True
    portion = Portion.carried
    equation = "W ← W + Σ p (s b a − s₀ b₀ a₀)"
    source = "arXiv:2505.18494"
