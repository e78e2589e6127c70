"""Rounds that cannot be merged, each refused with its own error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import replace
from typing import Any

import pytest
import torch

from coordinator.blobs import Blobs
from coordinator.merge import Input, RoundTask, first_adapter, merge_round
from protocol import errors
from protocol.plan import Dtype, Layout
from protocol.slices import Factors, Slice
from tests.merging.rounds import merge, second_round
from tests.merging.small import LAYOUT, make_plan, round_task, send, trained


def refused(task: RoundTask, blobs: Blobs, inputs: Sequence[Input]) -> pytest.ExceptionInfo[errors.HLoRAError]:
    with pytest.raises(errors.HLoRAError) as caught:
        merge(replace(task, inputs=tuple(inputs)), blobs)
    return caught


def test_an_empty_round_is_refused(blobs: Blobs) -> None:
    _, task = second_round(blobs, make_plan())
    assert refused(task, blobs, []).type is errors.NoContributions


def test_a_round_without_weight_is_refused(blobs: Blobs) -> None:
    _, task = second_round(blobs, make_plan())
    assert refused(task, blobs, [replace(x, weight=0.0) for x in task.inputs]).type is errors.ZeroWeight


@pytest.mark.parametrize(
    "wrong",
    [{"weight": -1.0}, {"weight": float("nan")}, {"weight": float("inf")}, {"shrink": 0.0}, {"shrink": 1.5}, {"shrink": float("nan")}],
)
def test_weights_and_shares_that_make_no_mean_are_refused(wrong: dict[str, float], blobs: Blobs) -> None:
    _, task = second_round(blobs, make_plan())
    spoiled = replace(task.inputs[0], **wrong)  # type: ignore[arg-type]  # floats, all of them
    caught = refused(task, blobs, [spoiled, *task.inputs[1:]])
    assert caught.type is errors.UnmergeableRound
    assert spoiled.digest in str(caught.value)


@pytest.mark.parametrize("wrong", [{"rank": 2}, {"scale": 0.5}])
def test_a_slice_that_is_not_what_was_recorded_of_it_is_refused(wrong: dict[str, Any], blobs: Blobs) -> None:
    _, task = second_round(blobs, make_plan())
    assert refused(task, blobs, [replace(task.inputs[0], **wrong), *task.inputs[1:]]).type is errors.MismatchedSlice


def test_a_missing_blob_is_named(blobs: Blobs) -> None:
    _, task = second_round(blobs, make_plan())
    blobs.delete(task.inputs[1].digest)
    assert task.inputs[1].digest in str(refused(task, blobs, task.inputs).value)


@pytest.mark.parametrize("where", ["factors", "full"])
def test_one_contribution_with_nan_never_reaches_a_sum(where: str, blobs: Blobs) -> None:
    before, task = second_round(blobs, make_plan())

    def poisoned(start: Slice, seed: int) -> Slice:
        slice = trained(start, seed)
        (slice.factors["block.v"].a if where == "factors" else slice.full["head.weight"])[0, 0] = float("nan")
        return slice

    bad = send(blobs, task.plan, before.slices[4], seed=9, train=poisoned)
    assert refused(task, blobs, [*task.inputs, bad]).type is errors.NonFiniteSlice


def test_an_adapter_that_the_wire_cannot_hold_is_refused(blobs: Blobs) -> None:
    plan = make_plan("hlora", wire=Dtype.float16)
    before = first_adapter(plan, blobs)

    def huge(start: Slice, seed: int) -> Slice:
        factors = {name: Factors(b=torch.full_like(f.b, 6e4), a=torch.full_like(f.a, 6e4)) for name, f in start.factors.items()}
        return replace(start, factors=factors)

    task = round_task(blobs, plan, before, [send(blobs, plan, before.slices[4], train=huge)])
    assert refused(task, blobs, task.inputs).type is errors.NonFiniteSlice


def test_a_plan_that_was_never_resolved_or_names_no_strategy_is_refused(blobs: Blobs) -> None:
    _, task = second_round(blobs, make_plan())
    for plan in (make_plan(layout=None), make_plan("nothing"), make_plan("delta", options={"step": 11})):
        with pytest.raises(errors.InvalidPlan):
            merge(replace(task, plan=plan), blobs)
    with pytest.raises(errors.InvalidPlan):
        first_adapter(make_plan(layout=None), blobs)


class Broken(Executor):
    """Its first task fails, and no other ever begins."""

    def __init__(self) -> None:
        self.futures: list[Future[Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if not self.futures:
            future.set_exception(errors.NotFound("the disk is gone"))
        self.futures.append(future)
        return future


def test_when_one_module_fails_the_others_are_not_waited_for(blobs: Blobs) -> None:
    plan = make_plan(layout=Layout(modules={f"block.{k}": (8, 8) for k in range(500)}, base=LAYOUT.base))
    before = first_adapter(plan, blobs)
    executor = Broken()
    with pytest.raises(errors.NotFound, match="the disk is gone"):
        merge_round(round_task(blobs, plan, before, [send(blobs, plan, before.slices[4])]), executor, blobs)
    assert 1 < len(executor.futures) < 500
    assert all(future.cancelled() for future in executor.futures[1:])
