"""What a client of a rank is handed, trains and sends back under a plan's strategy: in directions, numbers and bytes.

Some strategies hand out the whole adapter to whom can carry it: there `whole` asks for a client that is handed it, and what is told
otherwise is of one that is not. Elsewhere it makes no difference.
"""

from __future__ import annotations

from coordinator import aggregation
from coordinator.aggregation import Strategy
from protocol import errors
from protocol.contents import body_length
from protocol.plan import Dtype, Layout, Plan, Sides

ENTRY_BYTES = 128  # of one tensor in a slice's header, beside its name


def layout(plan: Plan) -> Layout:
    """The plan's layout. Raises InvalidPlan if the plan was never resolved."""
    if plan.layout is None:
        raise errors.InvalidPlan(f"plan {plan.name!r} has no layout: it was never resolved; resolve it against its base model first")
    return plan.layout


def strategy(plan: Plan) -> type[Strategy]:
    """What decides how much a rank takes: the plan's strategy. Raises InvalidPlan if it is not there."""
    return aggregation.load(plan.strategy.name)


def held(plan: Plan, rank: int, *, whole: bool = False) -> int:
    """The directions that a client of that rank starts from; it trains `rank` of them."""
    portion = strategy(plan).portion
    return rank if portion.optional and not whole else portion.held(rank, plan.global_rank)


def held_numbers(plan: Plan, rank: int, *, whole: bool = False) -> int:
    """The numbers of what a client of that rank starts from."""
    return layout(plan).numbers(held(plan, rank, whole=whole))


def trained_numbers(plan: Plan, rank: int) -> int:
    """The numbers that a client of that rank trains and sends back."""
    return plan.adapter.trained(layout(plan)).numbers(rank, strategy(plan).sides)


def start_bytes(plan: Plan, rank: int, *, whole: bool = False) -> int:
    """About how long the file is that a client of that rank starts from, rather too long than too short."""
    return _file_bytes(layout(plan), held(plan, rank, whole=whole), plan.wire, Sides.both)


def upload_bytes(plan: Plan, rank: int) -> int:
    """About how long the file of a trained slice is, rather too long than too short."""
    return _file_bytes(plan.adapter.trained(layout(plan)), rank, plan.upload, strategy(plan).sides)


def _file_bytes(shapes: Layout, rank: int, dtype: Dtype, sides: Sides) -> int:
    """Computed from counts and not from a header that is written out: a large fleet asks for it many times a round."""
    entries = 2 if dtype is Dtype.int8 else 1  # a tensor and its scales
    header = sum(2 * (len(name) + ENTRY_BYTES) for name in shapes.modules) + sum(len(name) + ENTRY_BYTES for name in shapes.full)
    return body_length(shapes, rank, dtype, sides) + entries * header
