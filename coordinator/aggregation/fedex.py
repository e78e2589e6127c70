"""FedEx: averaged factors go on being trained, and what they miss of the clients' mean is kept beside them, frozen."""

from __future__ import annotations

import torch

from coordinator.aggregation import Changes, ModuleRound, Portion
from coordinator.contributions import averaged, by_direction
from coordinator.lowrank import truncate
from coordinator.sums import Sum, Term
from protocol import errors
from protocol.plan import Plan
from protocol.slices import Factors


class FedEx(Changes):
    """The exact mean, kept as the averaged factors, which are trained on, and the residual that they miss, which is frozen.

    Departures: the paper adds the residual to the base model's weights; here its best approximation is kept for which the
    plan's cap, which must be above the ladder's largest rank, has room beside the average. Where ranks differ, each
    direction's factors are averaged over those who train it. They must have begun from one version: only then do factors at one
    position stand for the same direction, and the residual is small.
    Source: FedEx-LoRA, arXiv:2410.09432.
    """

    exact = True
    linear = True
    gauge_free = False
    stale = False
    singular = False
    portion = Portion.whole
    equation = "W ← W + Σ p (s b a − s₀ b₀ a₀), kept as (Σ p s b)(Σ p a) and the rest"
    cost = "2 D R² + 2 R³"
    source = "arXiv:2410.09432"

    def check(self, plan: Plan) -> None:
        """The residual needs room beyond what is trained."""
        top = plan.ranks.ladder[-1]
        if plan.global_rank <= top:
            raise errors.InvalidPlan(
                f"strategy fedex keeps beside the {top} directions that are trained what their average misses; "
                f"the cap is {plan.global_rank}: set one above {top}"
            )

    def keep(self, round: ModuleRound, w: Sum, best: Factors) -> Factors:
        """The averaged factors, and behind them the best approximation of what they miss."""
        mean = averaged(round, by_direction(round))
        rest = truncate(Sum(w.shape, [*w.terms, Term(mean, -1.0)]), best.rank - mean.rank)
        return Factors(b=torch.cat([mean.b.float(), rest.b], dim=1), a=torch.cat([mean.a.float(), rest.a]))
