"""Round 0: the adapter that changes nothing, and what it is handed out as."""

from __future__ import annotations

import torch

from coordinator.assembly import Assembly, Merged, layout_of, module_piece, tensor_piece
from coordinator.blobs import Blobs
from coordinator.fresh import fresh_tensor
from protocol.plan import Plan
from protocol.slices import Factors
from protocol.views import Energy


def first_adapter(plan: Plan, blobs: Blobs) -> Merged:
    """Publish W = 0: every slice has fresh rows in a and zero in b; fully trained tensors are fresh.

    Raises InvalidPlan for a plan that is not resolved.
    """
    layout = layout_of(plan)
    energy = Energy(total=0.0, kept=dict.fromkeys(sorted({*plan.ranks.ladder, plan.global_rank}), 1.0), stacked_rank=0)
    with Assembly(plan, round=0) as assembly:
        for module, (n_out, n_in) in layout.modules.items():
            nothing = Factors(b=torch.zeros(n_out, 0), a=torch.zeros(0, n_in))
            assembly.add(module, module_piece(plan, 0, module, nothing, energy))
        for name, shape in layout.full.items():
            assembly.add(name, tensor_piece(plan, name, fresh_tensor(name, shape, seed=plan.seed)))
        return assembly.publish(blobs)
