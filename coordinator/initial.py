"""Round 0: the adapter that changes nothing, and what it is handed out as."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coordinator import aggregation, sizes
from coordinator.assembly import Assembly, Merged, module_piece, tensor_piece
from coordinator.blobs import Blobs
from coordinator.fresh import fresh_rows, fresh_tensor
from protocol.plan import Head, Plan, Sides
from protocol.slices import TORCH_DTYPES, Factors
from protocol.views import Energy


def first_adapter(plan: Plan, blobs: Blobs) -> Merged:
    """Publish W = 0: every slice has fresh rows in a and zero in b; tensors kept whole are fresh.

    Raises InvalidPlan for a plan that is not resolved.
    """
    layout = sizes.layout(plan)
    energy = Energy(total=0.0, kept=dict.fromkeys(sorted({*plan.ranks.ladder, plan.global_rank}), 1.0), stacked_rank=0)
    with Assembly(plan, round=0) as assembly:
        for module, (n_out, n_in) in layout.modules.items():
            nothing = Factors(b=torch.zeros(n_out, plan.global_rank), a=torch.zeros(plan.global_rank, n_in))
            assembly.add(module, module_piece(plan, 0, module, _begun(plan, module, nothing), nothing, energy))
        for name, shape in layout.full.items():
            assembly.add(name, tensor_piece(plan, name, _made(plan, name, shape)))
        return assembly.publish(blobs)


def _made(plan: Plan, name: str, shape: Sequence[int]) -> Tensor:
    """A full tensor before the first round; one that stays so for ever is as exact as it travels."""
    made = fresh_tensor(name, shape, seed=plan.seed)
    return made if plan.adapter.head is Head.trained else made.to(TORCH_DTYPES[plan.wire]).float()


def _begun(plan: Plan, module: str, nothing: Factors) -> Factors:
    """W = 0 as it is kept: where clients train b alone, with the rows of a that stay for ever, as exact as they travel."""
    if aggregation.load(plan.strategy.name).sides is Sides.both:
        return nothing
    rows = fresh_rows(plan.global_rank, nothing.a.shape[1], seed=plan.seed, round=0, module=module)
    return Factors(b=nothing.b, a=rows.to(TORCH_DTYPES[plan.wire]).float())
