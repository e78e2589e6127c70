"""Merging on a device that is not the processor: the tasks are the same, and forget no tensor on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coordinator import aggregation
from coordinator.aggregation import Changes
from coordinator.app import build
from coordinator.assembly import Merged
from coordinator.blobs import Blobs
from coordinator.executors import open_executor
from coordinator.lowrank import Truncation, truncate
from coordinator.merge import Input, RoundTask, first_adapter, merge_round
from coordinator.nearness import TOLERANCE, apart
from coordinator.reading import open_slice
from coordinator.settings import Settings
from coordinator.sums import Sum, Term
from protocol import errors
from protocol.plan import Dtype, Plan, Split
from protocol.slices import Factors
from tests.merging.miniature import NAME, PLACE, miniature
from tests.merging.rounds import merge
from tests.merging.small import make_plan, round_task, send, start_of
from tests.merging.test_quick import decaying


def nested(w: Sum) -> Sum:
    """The sum, less half of the first term's leading directions."""
    first = w.terms[0].load(w.shape)
    return Sum(w.shape, [*w.terms, Term(Factors(b=2 * first.b[:, :4], a=first.a[:4]), -0.25 * w.terms[0].weights()[:4])])


REGIMES: Mapping[str, tuple[Sum, int]] = {
    "a narrow stack": (nested(decaying((60, 50), [8, 16], seed=1)), 4),
    "a wide stack": (decaying((300, 280), [16, 32, 64, 32, 16, 64], seed=2), 4),
    "a dense sum in float64": (decaying((150, 130), [64] * 3, seed=3), 4),
    "a dense sum in float32": (decaying((520, 512), [64] * 17, seed=4), 8),
}
needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
every_strategy = pytest.mark.parametrize("strategy", aggregation.names())
every_regime = pytest.mark.parametrize("regime", REGIMES)


def plan_of(strategy: str, **options: Any) -> Plan:
    """A plan that uses whatever the strategy has."""
    kind = aggregation.load(strategy)
    momentum = {"momentum": 0.5} if issubclass(kind, Changes) else {}
    return make_plan(strategy, options=momentum, ladder=(4,) if kind.equal_ranks else (1, 2, 4), cap=6, **options)


def second_round(blobs: Blobs, plan: Plan) -> RoundTask:
    """Two clients of each rank, of whose changes one was too large, after a round of the same."""
    first = first_adapter(plan, blobs)
    before = merge(round_task(blobs, plan, first, crowd(blobs, plan, first)), blobs)
    return replace(round_task(blobs, plan, before, crowd(blobs, plan, before, 100), 2), earlier=first.adapter.digest)


def crowd(blobs: Blobs, plan: Plan, before: Merged, first_seed: int = 0) -> list[Input]:
    clients = [(rank, k) for rank in plan.ranks.ladder for k in (0, 1)]
    return [
        send(blobs, plan, start_of(before, rank), rank=rank, seed=first_seed + 10 * rank + k, weight=1.0 + k, shrink=1 - k / 2)
        for rank, k in clients
    ]


def distance(blobs: Blobs, one: Merged, other: Merged) -> float:
    """How far the published files of two merges are apart, at most."""
    pairs = [(one.adapter, other.adapter), *((ref, other.slices[r]) for r, ref in one.slices.items())]
    return max(apart(open_slice(blobs, x.digest), open_slice(blobs, y.digest)) for x, y in pairs)


@every_strategy
def test_a_merge_elsewhere_publishes_what_the_processor_publishes_and_says_where(strategy: str, blobs: Blobs) -> None:
    task = second_round(blobs, plan_of(strategy, wire=Dtype.bfloat16, uploads=Dtype.int8))
    here = merge(task, blobs)
    with miniature() as executor:
        there = merge_round(task, executor, blobs)
    assert (here.device, there.device) == ("cpu", NAME)
    assert replace(there, device="cpu") == here


@pytest.mark.parametrize("split", Split)
def test_slices_are_split_where_they_are_cut(split: Split, blobs: Blobs) -> None:
    task = second_round(blobs, plan_of("delta", split=split))
    with miniature() as executor:
        assert merge_round(task, executor, blobs).slices == merge(task, blobs).slices


def truncated(w: Sum, rank: int) -> tuple[torch.device, Factors, Truncation]:
    """A sum truncated, with the device where that happened, and what it gave, brought back."""
    found = truncate(w, rank)
    return found.b.device, Factors(b=found.b.cpu(), a=found.a.cpu()), found


@every_regime
def test_every_method_computes_where_its_thread_does(regime: str) -> None:
    with miniature() as executor:  # before the processor, which would leave it the start of an iteration
        far, there, proved = executor.submit(truncated, *REGIMES[regime]).result()
    place, here, certificate = truncated(*REGIMES[regime])
    assert (place.type, far) == ("cpu", PLACE)
    assert torch.equal(there.b, here.b)
    assert torch.equal(there.a, here.a)
    assert (proved.total, proved.short) == pytest.approx((certificate.total, certificate.short), rel=1e-3)


@pytest.mark.parametrize(
    "forgotten",
    [
        lambda: torch.ones(2) + torch.ones(2, device="cpu"),
        lambda: torch.ones(2, device="cpu")[torch.tensor([0])],
        lambda: torch.rand(2, generator=torch.Generator()),
        lambda: torch.ones(2).numpy(),
    ],
)
def test_the_device_in_miniature_refuses_what_a_gpu_refuses(forgotten: Callable[[], object]) -> None:
    with miniature() as executor, pytest.raises(RuntimeError):
        executor.submit(forgotten).result()


@pytest.mark.parametrize("url", ["cuda://99", "cuda://9999"])
def test_a_gpu_that_is_not_there_is_refused_with_what_torch_sees(url: str) -> None:
    with pytest.raises(
        errors.InvalidRequest, match=rf"{url} needs CUDA device \d+; torch .* sees {torch.cuda.device_count()}: use threads"
    ):
        open_executor(url)


def test_blobs_in_memory_can_be_merged_from_on_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidRequest, match="needs CUDA device 99"):
        build(Settings(data=tmp_path, blobs_url="memory://here", executor="cuda://99"))


class Broken(Executor):
    """A GPU at which every task fails like this."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = Future[Any]()
        future.set_exception(self._error)
        return future


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), torch.AcceleratorError("CUDA error: unknown\nand more")])
def test_a_gpu_that_fails_says_nothing_of_the_round_which_waits(error: Exception, blobs: Blobs) -> None:
    task = second_round(blobs, plan_of("delta"))
    with pytest.raises(errors.Unavailable, match=r"^the GPU failed at it: CUDA (out of memory\.|error: unknown)$"):
        merge_round(task, Broken(error), blobs)


@needs_a_gpu
@every_strategy
def test_a_gpu_comes_within_the_tolerance_of_the_processor_and_to_the_same_bytes_again(strategy: str, blobs: Blobs) -> None:
    task = second_round(blobs, plan_of(strategy))
    found = merge(task, blobs, "cuda://")
    assert found.device == torch.cuda.get_device_name(0)
    assert distance(blobs, found, merge(task, blobs)) <= TOLERANCE
    assert merge(task, blobs, "cuda://0") == found


@needs_a_gpu
@every_regime
def test_a_gpu_truncates_by_every_method_within_the_tolerance_of_the_processor(regime: str) -> None:
    w, rank = REGIMES[regime]
    with open_executor("cuda://") as executor:
        place, there, proved = executor.submit(truncated, w, rank).result()
    here = truncate(w, rank)
    assert place.type == "cuda"
    assert float((there.b @ there.a - here.b @ here.a).norm()) <= TOLERANCE * math.sqrt(here.total)
    assert proved.kept(rank) == pytest.approx(here.kept(rank), rel=1e-6)
