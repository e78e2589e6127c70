"""What a plan must be, beyond its form, before it may run: bounds within which every later step can be carried out.

They are asked of what comes in and not of the form itself: what was taken before there was a bound is still read.
"""

from __future__ import annotations

from protocol import errors
from protocol.plan import Plan
from protocol.texts import REASON, odd


def check(plan: Plan) -> None:
    """Raise InvalidPlan for a plan that no coordinator and no device could carry out."""
    if (place := odd(plan.model_dump())) is not None:
        raise errors.InvalidPlan(f"{place}: {REASON}")
