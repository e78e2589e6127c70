"""Plans for tiny models, and slices drawn for them."""

from __future__ import annotations

from pathlib import Path

import torch

from protocol.contents import Label
from protocol.plan import CausalLM, Plan, SequenceClassification, Task
from protocol.slices import Factors, Slice

CLASSES = SequenceClassification(labels=["blue", "green", "red"], max_length=32)
CONTINUE = CausalLM(max_length=64)


def tiny_plan(model: Path | str, task: Task = CLASSES, **adapter: object) -> Plan:
    """A plan that is not resolved yet; changes are of its adapter."""
    return Plan.model_validate(
        {
            "name": "tiny",
            "model": {"id": str(model)},
            "task": task,
            "data": "things",
            "adapter": {"modules": ["query", "value"] if task.kind == "sequence-classification" else ["q_proj", "v_proj"], **adapter},
            "training": {"learning_rate": 1e-3},
            "ranks": {"ladder": [1, 2, 4]},
            "cohort": {"target": 1, "quorum": 1},
            "rounds": 1,
        }
    )


def drawn_slice(plan: Plan, rank: int, scale: float) -> Slice:
    """A slice of a resolved plan none of whose numbers is zero, the same for the same rank."""
    assert plan.layout is not None
    generator = torch.Generator().manual_seed(rank)
    factors = {
        name: Factors(b=0.1 * torch.randn(n_out, rank, generator=generator), a=0.1 * torch.randn(rank, n_in, generator=generator))
        for name, (n_out, n_in) in plan.layout.modules.items()
    }
    full = {name: torch.randn(shape, generator=generator) for name, shape in plan.layout.full.items()}
    return Slice(Label(rank=rank, scale=scale, round=0), factors, full)
