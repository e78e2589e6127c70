"""FLoRA: clients train fresh directions on top of the whole adapter, and all that they trained is stacked into it."""

from __future__ import annotations

from coordinator.aggregation import Changes, ModuleRound, Portion
from coordinator.contributions import additions
from coordinator.sums import Term
from protocol import errors
from protocol.plan import LARGEST_RANK, Plan


class FLoRA(Changes):
    """The clients' fresh directions, stacked and added to the adapter; the next round begins with fresh ones on top of all of it.

    A fresh direction begins with b₀ = 0, so that a client's product is its change.
    Departure: the paper folds the stack into the base model's weights; here the adapter keeps what the plan's cap holds of it,
    so with a cap at the matrix's smaller side it is the paper's.
    Source: FLoRA, arXiv:2409.05976.
    """

    exact = True
    linear = True
    gauge_free = True
    portion = Portion.on_top
    equation = "W ← W + Σ p s b a"
    source = "arXiv:2409.05976"

    def check(self, plan: Plan) -> None:
        """What clients start from is a slice too, and no slice has more directions than LARGEST_RANK."""
        if (most := plan.global_rank + plan.ranks.ladder[-1]) > LARGEST_RANK:
            raise errors.InvalidPlan(f"strategy flora hands out {most} directions, fresh ones among them; at most {LARGEST_RANK} may be")

    def changes(self, round: ModuleRound) -> list[Term]:
        """η Σ w γ s b a."""
        return additions(round, self.weights(round), self.step)
