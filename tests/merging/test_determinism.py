"""The bytes that a round publishes depend on what came in: not on its order, the executor, or the number of workers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator import aggregation, truncation
from coordinator.blobs import Blobs
from coordinator.folding import LARGE
from coordinator.merge import first_adapter
from protocol.plan import Dtype, Layout
from tests.merging.rounds import merge, second_round
from tests.merging.small import LAYOUT, make_plan, round_task, send

EQUAL = [name for name in aggregation.names() if aggregation.load(name).equal_ranks]
LARGER = Layout(modules={"block.folded": (640, 600), "block.quick": (1200, 1100)}, base=LAYOUT.base)


@pytest.mark.parametrize("wire", [Dtype.float32, Dtype.bfloat16])
@pytest.mark.parametrize("strategy", aggregation.names())
def test_bytes_depend_on_contents_alone(strategy: str, wire: Dtype, blobs: Blobs) -> None:
    if strategy in EQUAL:
        plan = make_plan(strategy, ladder=(4,), cap=6, wire=wire)
        first = first_adapter(plan, blobs)
        start = first.starts.get(4) or first.slices[4]
        task = round_task(blobs, plan, first, [send(blobs, plan, start, seed=k, weight=1.0 + k) for k in range(5)])
    else:
        _, task = second_round(blobs, make_plan(strategy, cap=6, wire=wire))
    published = merge(task, blobs)
    assert merge(replace(task, inputs=task.inputs[::-1]), blobs, "threads://3") == published
    assert merge(replace(task, inputs=task.inputs[2:] + task.inputs[:2]), blobs) == published


def test_bytes_depend_on_contents_alone_where_matrices_are_large(blobs: Blobs) -> None:
    plan = make_plan("delta", ladder=(4, 64), layout=LARGER)
    first = first_adapter(plan, blobs)
    inputs = [send(blobs, plan, first.slices[64], seed=k, weight=1.0 + k) for k in range(11)]
    stacked = 11 * 64
    folded, quick = LARGER.modules.values()
    assert truncation.wide(folded, stacked, 64)
    assert stacked * folded[0] * folded[1] > LARGE
    assert truncation.quicker(quick, stacked, 64)
    assert not truncation.wide(quick, stacked, 64)
    task = round_task(blobs, plan, first, inputs)
    published = merge(task, blobs)
    assert merge(replace(task, inputs=task.inputs[::-1]), blobs, "threads://2") == published
    assert merge(replace(task, inputs=task.inputs[3:] + task.inputs[:3]), blobs, "processes://2") == published
