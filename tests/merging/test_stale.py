"""Contributions that started from different versions: each counts with its own change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from coordinator import aggregation
from coordinator.blobs import Blobs
from coordinator.merge import Input, RoundTask
from protocol.plan import Dtype, Plan
from tests.merging.rounds import changes, heard, merge, read_digest, second_round
from tests.merging.small import LAYOUT, best, make_plan, read, round_task, send, start_of, untrained, update

WIRES = [Dtype.float32, Dtype.bfloat16]


def third_round(blobs: Blobs, plan: Plan) -> tuple[RoundTask, Input]:
    """Round 3, to which one client of each rank comes from round 2, and one more that started from round 1."""
    first, task = second_round(blobs, plan)
    second = merge(task, blobs)
    fresh = [send(blobs, plan, second.slices[rank], seed=200 + rank, weight=rank) for rank in (1, 2, 4)]
    stale = send(blobs, plan, first.slices[2], seed=300, weight=1.5)
    return round_task(blobs, plan, second, fresh, round=3), stale


@pytest.mark.parametrize("wire", WIRES)
def test_a_stale_contribution_adds_what_it_changed_of_its_own_version(wire: Dtype, blobs: Blobs) -> None:
    plan = make_plan("delta", wire=wire)
    task, stale = third_round(blobs, plan)
    task = replace(task, inputs=(*task.inputs, stale))
    before, after = read_digest(blobs, task.previous), read(blobs, merge(task, blobs).adapter)
    for module in LAYOUT.modules:
        wanted = update(before, module) + changes(task, blobs, module)
        assert torch.allclose(update(after, module), best(wanted, 4), rtol=0, atol=1e-6 * float(wanted.norm()))


@pytest.mark.parametrize("wire", WIRES)
def test_a_stale_head_does_not_pull_the_new_one_back(wire: Dtype, blobs: Blobs) -> None:
    """T + Σ p (t − t₀): T is the newest head as it is kept, t₀ the one that the client started from."""
    plan = make_plan("delta", wire=wire)
    task, stale = third_round(blobs, plan)
    task = replace(task, inputs=(*task.inputs, stale))
    newest, after = read_digest(blobs, task.previous), read(blobs, merge(task, blobs).adapter)
    for name in LAYOUT.full:
        change = torch.stack([p * (t.full[name].double() - g.full[name].double()) for p, _, t, g in heard(task, blobs)])
        wanted = newest.full[name].double() + change.sum(dim=0)
        assert torch.allclose(after.full[name].double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strategy", [name for name in aggregation.names() if aggregation.load(name).stale])
def test_a_stale_client_that_learned_nothing_takes_nothing_back(strategy: str, blobs: Blobs) -> None:
    """A round of it alone leaves adapter and head as they are, though both have moved since it started."""
    plan = make_plan(strategy)
    first, task = second_round(blobs, plan)
    second = merge(task, blobs)
    idle = send(blobs, plan, start_of(first, 4), rank=4, train=untrained)
    before, after = read(blobs, second.adapter), read(blobs, merge(round_task(blobs, plan, second, [idle], round=3), blobs).adapter)
    for module in LAYOUT.modules:
        size = float(update(before, module).norm())
        assert torch.allclose(update(after, module), update(before, module), rtol=0, atol=1e-6 * size)
    for name in LAYOUT.full:
        assert torch.allclose(after.full[name], before.full[name], rtol=1e-6, atol=1e-7)


def test_the_order_in_which_stale_and_fresh_ones_come_does_not_matter(blobs: Blobs) -> None:
    task, stale = third_round(blobs, make_plan("delta"))
    merged = [merge(replace(task, inputs=inputs), blobs) for inputs in ((*task.inputs, stale), (stale, *reversed(task.inputs)))]
    assert merged[0] == merged[1]
