"""FFA: a is drawn once and frozen for all, and only b is trained, sent and averaged."""

from __future__ import annotations

from coordinator.aggregation import Changes, ModuleRound, Sides
from coordinator.contributions import moved
from coordinator.sums import Sum, Term
from protocol.slices import Factors


class FFA(Changes):
    """The clients' changes of b alone, beside one random a that nobody ever trains: means of b are exact, at half the uplink.

    Rank r trains the first r columns of b. What is kept is b and that a, so the adapter never leaves the rows of a.
    Departure: b moves by the mean change, so that columns beyond a client's rank stay; where ranks are equal that is the
    paper's mean of b.
    Source: FFA-LoRA, arXiv:2403.12313.
    """

    exact = True
    linear = True
    gauge_free = False
    singular = False
    sides = Sides.b
    equation = "W ← (B + Σ p (s b − s₀ b₀)) A₀"
    cost = "n_out R + D R_g² + R_g³"
    source = "arXiv:2403.12313"

    def combine(self, round: ModuleRound) -> Sum:
        """((1 + β) B − β B before + η Σ w γ (s b − s₀ b₀)) A₀."""
        before = Term(round.adapter, 1.0).load(round.shape)
        b = before.b.double() + moved(round, self.weights(round), self.step)
        if round.earlier is not None and self.momentum:
            b += self.momentum * (before.b.double() - Term(round.earlier, 1.0).load(round.shape).b.double())
        return Sum(round.shape, [Term(Factors(b=b, a=before.a), 1.0)])

    def keep(self, round: ModuleRound, w: Sum, best: Factors) -> Factors:
        """B and A₀ themselves."""
        return w.terms[0].load(w.shape)
