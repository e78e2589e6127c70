"""Rotating: the clients' changes, of directions that are drawn anew for every client and round."""

from __future__ import annotations

from coordinator.aggregation import Changes, Portion


class Rotating(Changes):
    """The sum of `delta`, from clients that have the whole adapter and train r of its directions, drawn anew every round.

    Every direction is informed by all clients in turn, also by those of small rank; which are trained follows from the plan's
    seed, the round and the client's name. The other directions stay frozen where the client trains.
    Source: the change form of FedHL, arXiv:2505.18494; drawing the directions is added here.
    """

    exact = True
    linear = True
    gauge_free = True
    portion = Portion.rotating
    equation = "W ← W + Σ p (s b a − s₀ b₀ a₀)"
    source = "arXiv:2505.18494"
