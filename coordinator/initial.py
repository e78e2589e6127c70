"""Round 0: the adapter that changes nothing, or the one that the plan continues, and what it is handed out as."""

from __future__ import annotations

import torch
from torch import Tensor

from coordinator import aggregation, sizes
from coordinator.assembly import Assembly, Merged, Piece, module_piece, tensor_piece
from coordinator.blobs import Blobs
from coordinator.executors import one_thread
from coordinator.fresh import fresh_rows, fresh_tensor
from coordinator.lowrank import truncate
from coordinator.reading import SliceReader, StoredFactors, open_slice
from coordinator.sums import Sum, Term
from protocol.plan import Head, Plan, Sides
from protocol.slices import TORCH_DTYPES, Factors
from protocol.views import Energy


def first_adapter(plan: Plan, blobs: Blobs, source: Blobs | None = None) -> Merged:
    """Publish what the plan continues, read from the source (by default the same blobs), or else W = 0.

    W = 0: every slice has fresh rows in a and zero in b; tensors kept whole are fresh. What is continued is cut to the plan's cap
    if it holds more, and has fresh directions beyond its own if it holds less.
    Raises InvalidPlan for a plan that is not resolved; for what it continues NotFound, what reading a damaged slice raises, and
    NonFiniteSlice where the wire's dtype cannot hold it.
    """
    one_thread()  # whoever calls: the conductor's own thread, or a command
    layout = sizes.layout(plan)
    before = None if plan.continues is None else open_slice(source or blobs, plan.continues)
    with Assembly(plan, round=0) as assembly:
        for module, shape in layout.modules.items():
            assembly.add(module, _nothing(plan, module, shape) if before is None else _continued(plan, module, shape, before))
        for name, size in layout.full.items():
            tensor = fresh_tensor(name, size, seed=plan.seed) if before is None else before.full(name)
            assembly.add(name, tensor_piece(plan, name, _kept(plan, tensor)))
        return assembly.publish(blobs)


def _nothing(plan: Plan, module: str, shape: tuple[int, int]) -> Piece:
    n_out, n_in = shape
    nothing = Factors(b=torch.zeros(n_out, plan.global_rank), a=torch.zeros(plan.global_rank, n_in))
    energy = Energy(total=0.0, kept=dict.fromkeys(_ranks(plan), 1.0), stacked_rank=0)
    return module_piece(plan, 0, module, _begun(plan, module, nothing), nothing, energy)


def _continued(plan: Plan, module: str, shape: tuple[int, int], before: SliceReader) -> Piece:
    """The best of the cap's rank; what a strategy keeps besides singular form begins with it too."""
    found = truncate(Sum(shape, [Term(StoredFactors(before, module), before.header.label.scale)]), plan.global_rank)
    best = found.padded(plan.global_rank)
    energy = Energy(
        total=found.total, kept={rank: found.kept(rank) for rank in _ranks(plan)}, stacked_rank=found.stacked_rank, short=found.short
    )
    return module_piece(plan, 0, module, best, best, energy)


def _ranks(plan: Plan) -> list[int]:
    return sorted({*plan.ranks.ladder, plan.global_rank})


def _kept(plan: Plan, tensor: Tensor) -> Tensor:
    """A full tensor before the first round; one that stays so for ever is as exact as it travels."""
    return tensor if plan.adapter.head is Head.trained else tensor.to(TORCH_DTYPES[plan.wire]).float()


def _begun(plan: Plan, module: str, nothing: Factors) -> Factors:
    """W = 0 as it is kept: where clients train b alone, with the rows of a that stay for ever, as exact as they travel."""
    if aggregation.load(plan.strategy.name).sides is Sides.both:
        return nothing
    rows = fresh_rows(plan.global_rank, nothing.a.shape[1], seed=plan.seed, round=0, module=module)
    return Factors(b=nothing.b, a=rows.to(TORCH_DTYPES[plan.wire]).float())
