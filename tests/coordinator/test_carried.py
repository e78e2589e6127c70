"""Some clients start from the whole adapter and some, in the same round, from their slice: over HTTP, to the verified round."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coordinator import histories, ranks, sizes
from coordinator.ranks import Candidate
from protocol import errors, slices
from protocol.contents import HEADER_SLACK
from protocol.messages import Job
from protocol.plan import Plan
from protocol.slices import Slice
from protocol.states import JobKind, RunState
from tests.coordinator.test_directions import CAP, RANKS, findings, plan_of, sweep
from tests.coordinator.test_stragglers import ALONE, HOUR, OPERATIONS, UNMEASURED
from tests.federation import Device, Federation, make_plan, make_profile

MODULE = "attention.query"


async def enrol(federation: Federation, plan: Plan) -> None:
    """One whose owner allows the bytes of rank 2 alone, and two without limits."""
    most = sizes.start_bytes(plan, 2) + sizes.upload_bytes(plan, 2) + HEADER_SLACK
    await federation.enrol("device 1", make_profile(train=10, limits={"max_bytes": most}), labels={"class": "small"})
    await federation.enrol("device 2", make_profile(train=20), labels={"class": "small"})
    await federation.enrol("device 3", make_profile(train=30), labels={"class": "large"})


def change(job: Job, start: Slice, trained: Slice) -> torch.Tensor:
    """s (b a − b₀ a₀) over the trained directions."""
    new, old = trained.factors[MODULE], start.factors[MODULE].of(job.directions)
    return job.scale * (new.b.double() @ new.a.double() - old.b.double() @ old.a.double())


def adapter(federation: Federation, digest: str) -> torch.Tensor:
    factors = slices.unpack(federation.parts.blobs.read(digest)).factors[MODULE]
    return factors.b.double() @ factors.a.double()


async def told(device: Device) -> tuple[Job, Slice]:
    job = await device.take()
    return job, slices.unpack(await device.blob(job.slice.digest))


async def test_each_starts_from_what_it_carries_and_the_sum_is_that_of_the_changes(federation: Federation) -> None:
    plan = make_plan(strategy={"name": "folded"}, cap=CAP, evaluation={"every": 0}, ranks=RANKS)
    await enrol(federation, plan)
    run = await federation.open(plan)
    for number in (1, 2):
        before = await federation.admin.round(run, number - 1)
        given = [await told(device) for device in federation.devices]
        assert [(job.directions, start.label.rank) for job, start in given] == [(None, 2), ([0, 1], CAP), ([0, 1, 2, 3], CAP)]
        assert given[0][0].slice == before.slices[2]
        assert "starts from its slice" in given[0][0].rank_reason

        assert before.adapter is not None
        expected = adapter(federation, before.adapter.digest)
        for (job, start), rows, device in zip(given, (10, 20, 30), federation.devices, strict=True):
            trained = slices.unpack(await device.trained(job))
            expected += rows / 60 * change(job, start, trained)
            await device.complete(job, examples=rows)
        federation.tick()
        after = (await federation.admin.round(run, number)).adapter
        assert after is not None
        u, s, v = torch.linalg.svd(expected)
        best = (u[:, :CAP] * s[:CAP]) @ v[:CAP]
        assert torch.allclose(adapter(federation, after.digest), best, atol=1e-5)


async def test_both_ways_of_starting_go_with_momentum_weights_by_direction_and_sweeping(small: Federation) -> None:
    plan = plan_of("folded", ranks=RANKS, rounds=3, norm={"bound": 1.0}, wire="bfloat16", uploads="int8")
    await enrol(small, plan)
    run = (await small.admin.create(plan)).id
    begun = set()
    while (await small.admin.run(run)).state is RunState.running:
        for device in small.devices:
            small.tick()
            sweep(small)
            if (job := await device.next_job()) is not None:
                begun.add((device.name, job.directions is None))
                await device.complete(job)
    assert (await small.admin.run(run)).state is RunState.finished
    assert begun == {("device 1", True), ("device 2", False), ("device 3", False)}
    assert set(findings(small, run)) == {"agrees"}


@pytest.mark.parametrize("buffer", [None, {"size": 1, "exponent": 0.5}])
async def test_a_client_may_change_between_the_two(small: Federation, buffer: dict[str, Any] | None) -> None:
    """Its owner takes the limit back in the middle of a run."""
    plan = plan_of("folded", ranks=RANKS, rounds=4, buffer=buffer)
    await enrol(small, plan)
    run = await small.open(plan)
    first = small.devices[0]
    begun = await first.take()
    assert begun.directions is None
    await first.put_profile(make_profile(train=10))
    await first.complete(begun)
    seen = []
    for _ in range(20):
        for device in small.devices:
            if (job := await device.next_job()) is not None:
                seen.append((device.name, job.directions))
                await device.complete(job)
        small.tick()
    assert (await small.admin.run(run)).state is RunState.finished
    assert ("device 1", [0, 1]) in seen
    assert set(findings(small, run)) == {"agrees"}


def alone() -> Plan:
    return make_plan(strategy={"name": "folded"}, cap=CAP, cohort=ALONE, times=HOUR, evaluation=UNMEASURED)


@pytest.mark.parametrize("problem", [None, errors.MemoryRefusal.slug()])
async def test_who_runs_out_of_time_or_memory_with_the_whole_adapter_gets_its_slice_next(
    federation: Federation, problem: str | None
) -> None:
    """And stays in the run, where a refusal for its memory's sake would otherwise leave it out."""
    device = await federation.enrol("tight")
    run = await federation.open(alone())
    job = await device.take()
    assert job.directions == [0, 1, 2, 3]
    if problem:
        await device.give_back(job, problem=problem)
    federation.advance(3600)
    assert await device.next_job() is None
    federation.tick()
    job = await device.take()
    assert job.directions is None
    assert job.rank_reason.endswith("it starts from its slice: a job that started from the whole adapter ran out of time or memory")
    await device.complete(job)
    federation.tick()
    assert (await device.take()).directions == [0, 1, 2, 3], "what nobody measured may be enough now"
    assert (await federation.admin.run(run)).state is RunState.running


async def test_who_has_too_little_memory_to_measure_the_whole_adapter_measures_its_slice_from_then_on(federation: Federation) -> None:
    trains = await federation.enrol("trains")
    measures = await federation.enrol("measures", make_profile(train=0))
    await federation.open(make_plan(strategy={"name": "folded"}, cap=CAP, cohort=ALONE, times=HOUR, rounds=5))
    job = await measures.take(JobKind.evaluate)
    assert job.directions is not None
    await measures.give_back(job, problem=errors.MemoryRefusal.slug())
    for _ in range(2):
        while (given := await trains.next_job()) is not None:
            await trains.complete(given)
        federation.tick()
        job = await measures.take(JobKind.evaluate)
        assert job.directions is None
        await measures.complete(job)

    federation.advance(1)
    await measures.put_profile(make_profile(train=0, memory_bytes=2 * 10**9))
    while (given := await trains.next_job()) is not None:
        await trains.complete(given)
    federation.tick()
    assert (await measures.take(JobKind.evaluate)).directions is not None, "the machine is another one now"


async def test_a_job_that_begins_late_is_cut_by_what_it_starts_from_and_what_it_measured_is_of_that(small: Federation) -> None:
    plan = alone()
    seconds = 1000  # for the whole adapter on the link, and for ten steps
    profile = make_profile(
        train=80, down_bytes_per_second=sizes.start_bytes(plan, 4, whole=True) / seconds, training_flops=OPERATIONS / seconds * 10
    )
    device = await small.enrol("late", profile)
    run = await small.open(plan)
    small.clock.advance(1800)
    job = await device.take()
    assert job.directions == [0, 1, 2, 3]
    seen = Candidate(name="late", labels={}, profile=profile)
    assert ranks.steps_within(plan, seen, 4, 1800) > ranks.steps_within(plan, seen, 4, 1800, whole=True) == job.training.max_steps
    await device.complete(job)
    small.tick()
    with small.parts.database.read() as session:
        measured = histories.of_run(session, run)[device.id].measured
    assert measured is not None
    assert measured.whole


async def test_each_measures_what_it_carries(small: Federation) -> None:
    plan = plan_of("folded", ranks=RANKS, evaluation={"every": 1})
    await enrol(small, plan)
    run = await small.open(plan)
    held = [await device.take(JobKind.evaluate) for device in small.devices]
    assert [job.directions for job in held] == [None, [0, 1], [0, 1, 2, 3]]
    assert held[0].slice == (await small.admin.round(run, 0)).slices[2]
    assert ["whole adapter" in job.rank_reason.rpartition("it starts from")[2].partition(":")[0] for job in held] == [False, True, True]
