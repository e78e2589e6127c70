"""What a plan must be, beyond its form, before it may run: bounds within which every later step can be carried out.

They are asked of what comes in and not of the form itself: what was taken before there was a bound is still read.
"""

from __future__ import annotations

from protocol import errors
from protocol.plan import Layout, Plan
from protocol.texts import odd

MOST_NUMBERS = 2**33  # of an adapter; a model of 70 billion parameters adapted everywhere at rank 256 has 3.3 billion
LEAST = 1e-6  # of alpha and of a norm bound: what is divided by less, or scaled to it, leaves the range of float32


def check(plan: Plan) -> None:
    """Raise InvalidPlan for a plan that no coordinator and no device could carry out."""
    if (found := odd(plan.model_dump())) is not None:
        raise errors.InvalidPlan(found)
    if plan.adapter.alpha < LEAST:
        raise errors.InvalidPlan(f"adapter.alpha is {plan.adapter.alpha:g}; slices divided by a scale below {LEAST:g} hold no numbers")
    if plan.norm is not None and plan.norm.bound < LEAST:
        raise errors.InvalidPlan(
            f"norm.bound is {plan.norm.bound:g}; at least {LEAST:g} is needed for a change to be left of a contribution"
        )
    if plan.layout is not None:
        _check_layout(plan.layout, plan.global_rank)


def _check_layout(layout: Layout, rank: int) -> None:
    for name in (*layout.modules, *layout.full):
        if not name.isprintable():  # no slice that holds it could be read
            raise errors.InvalidPlan(f"layout: {name[:200]!a} is no tensor name; every character of one can be printed")
    if (numbers := layout.numbers(rank)) > MOST_NUMBERS:
        raise errors.InvalidPlan(
            f"the adapter would hold {numbers:,} numbers at rank {rank}, with the tensors kept whole; at most {MOST_NUMBERS:,} may be: "
            "take a smaller cap or ladder, or adapt fewer modules"
        )
