"""Whole rounds for tests: a crowd of unequal clients, and what a round of theirs should come to, in dense float64."""

from __future__ import annotations

import torch
from torch import Tensor

from coordinator.assembly import Merged
from coordinator.blobs import Blobs
from coordinator.executors import open_executor
from coordinator.merge import Input, RoundTask, first_adapter, merge_round
from protocol.plan import Plan
from protocol.slices import Slice, unpack
from tests.merging.small import round_task, send, start_of, update

CROWD = [(1, 3.0, 1.0), (2, 1.0, 1.0), (2, 2.0, 0.5), (4, 5.0, 1.0), (4, 1.0, 0.25)]  # rank, weight, shrink


def merge(task: RoundTask, blobs: Blobs, executor: str = "threads://1") -> Merged:
    with open_executor(executor) as pool:
        return merge_round(task, pool, blobs)


def crowd(blobs: Blobs, plan: Plan, before: Merged, first_seed: int = 0) -> list[Input]:
    return [
        send(blobs, plan, start_of(before, rank), rank=rank, seed=first_seed + k, weight=weight, shrink=shrink)
        for k, (rank, weight, shrink) in enumerate(CROWD)
    ]


def second_round(blobs: Blobs, plan: Plan) -> tuple[Merged, RoundTask]:
    """What round 1 published, and round 2 to be merged: so that the adapter is not zero."""
    first = first_adapter(plan, blobs)
    before = merge(round_task(blobs, plan, first, crowd(blobs, plan, first)), blobs)
    return before, round_task(blobs, plan, before, crowd(blobs, plan, before, 100), round=2)


def heard(task: RoundTask, blobs: Blobs) -> list[tuple[float, float, Slice, Slice]]:
    """Of every input: its share p, the share γ of its change that counts, what was trained, what was given."""
    total = sum(x.weight for x in task.inputs)
    return [(x.weight / total, x.shrink, read_digest(blobs, x.digest), read_digest(blobs, x.base)) for x in task.inputs]


def read_digest(blobs: Blobs, digest: str) -> Slice:
    return unpack(blobs.read(digest))


def products(task: RoundTask, blobs: Blobs, module: str) -> Tensor:
    """Σ p (γ s b a + (1 − γ) s₀ b₀ a₀)."""
    return torch.stack([p * (y * update(t, module) + (1 - y) * update(g, module)) for p, y, t, g in heard(task, blobs)]).sum(dim=0)


def changes(task: RoundTask, blobs: Blobs, module: str) -> Tensor:
    """Σ p γ (s b a − s₀ b₀ a₀)."""
    return torch.stack([p * y * (update(t, module) - update(g, module)) for p, y, t, g in heard(task, blobs)]).sum(dim=0)
