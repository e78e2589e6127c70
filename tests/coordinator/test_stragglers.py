"""Slow, late and lost clients, and those far from the others: none of them holds a round up, and each is told why."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import sizes
from coordinator.counting import suspects
from protocol import errors
from protocol.messages import Job, Profile, Result, Usage
from protocol.states import JobState, RoundState, RunState
from protocol.views import Page, QuarantineView
from tests.federation import Device, Federation, make_plan, make_profile

UNMEASURED = {"every": 0}
HOUR = {"lease": 3600, "no_progress": 3600, "job": 3600, "round": 3600}
ALONE = {"target": 1, "quorum": 1}
OPERATIONS = 8 * 128 * (4 * (1000 - 80) + 6 * 234)  # of a step of 8 rows of 128 tokens, at rank 4: 234 numbers in a slice


def slow(step_seconds: float, train: int = 80, **changes: Any) -> Profile:
    """A machine that takes so long for each of the ten steps of its eighty rows."""
    return make_profile(train=train, training_flops=OPERATIONS / step_seconds, **changes)


# --- fewer steps, or none ------------------------------------------------------------------------------------------------


async def test_a_job_is_cut_to_the_steps_that_its_time_holds_and_says_so_whenever_it_is_handed_out(federation: Federation) -> None:
    device = await federation.enrol("slow", slow(700))
    run = await federation.open(make_plan(cohort=ALONE, times=HOUR, evaluation=UNMEASURED))

    job = await device.take()

    assert job.training.max_steps == 4  # four fifths of the hour are 2880 s
    assert job.rank == 4
    assert job.rank_reason == "4: the plan gives every client the same rank; cut to 4 steps, which its time holds"
    federation.clock.advance(1000)
    again = await device.take()
    assert (again.id, again.training, again.rank_reason) == (job.id, job.training, job.rank_reason)
    await device.complete(again)
    federation.tick()
    view = await federation.admin.job(run, job)
    assert (view.state, view.max_steps, view.rank.reason) == (JobState.accepted, 4, job.rank_reason)


async def test_where_there_is_plenty_of_time_the_plan_is_what_is_trained(small: Federation) -> None:
    device = await small.enrol("quick enough", slow(288))
    plan = make_plan(cohort=ALONE, times=HOUR, evaluation=UNMEASURED)
    run = await small.open(plan)

    job = await device.take()

    assert job.training == plan.training
    assert (await small.admin.job(run, job)).max_steps is None


async def test_what_the_last_job_measured_decides_the_next_ones_steps(small: Federation) -> None:
    device = await small.enrol("declared too fast", make_profile(train=80))
    await small.open(make_plan(cohort=ALONE, times=HOUR, evaluation=UNMEASURED))
    job = await device.take()
    assert job.training.max_steps is None
    await device.complete(job, usage=Usage(step_seconds=300).model_dump(mode="json"))
    small.tick()

    assert (await device.take()).training.max_steps == 9  # of 300 s each in 2880 s


async def test_no_measurement_of_its_own_keeps_a_client_from_its_next_job(small: Federation) -> None:
    """A step of next to no time, on a link that leaves none of the share that may be planned: a number of steps without end."""
    device = await small.enrol("odd", make_profile(train=80))
    plan = make_plan(cohort=ALONE, times=HOUR, evaluation=UNMEASURED)
    await small.open(plan)
    usage = Usage(step_seconds=1e-320, download_bytes=sizes.start_bytes(plan, 4), download_seconds=3240)
    await device.complete(await device.take(), usage=usage.model_dump(mode="json"))
    small.tick()

    assert (await device.take()).training.max_steps == 1


async def test_a_job_for_which_no_time_is_left_is_not_handed_out_and_somebody_else_is_asked(federation: Federation) -> None:
    late = await federation.enrol("late", slow(1000))
    run = await federation.open(make_plan(cohort=ALONE, times=HOUR, evaluation=UNMEASURED))
    federation.clock.advance(2700)
    spare = await federation.enrol("spare")

    assert await late.next_job() is None
    federation.tick()

    job = await spare.take()
    assert await late.next_job() is None
    views = {view.client_name: view for view in (await federation.admin.round(run, 1)).jobs}
    assert views["late"].state is JobState.cancelled
    assert views["late"].reason == (
        "too little time to hand it out: 900 s are left; a single step at rank 4 takes about 1e+03 s, and slices 0 s on the link"
    )
    await spare.complete(job)
    federation.tick()
    assert (await federation.admin.run(run)).round == 1


async def test_a_job_that_is_drawn_late_is_cut_to_what_is_left_of_its_round(federation: Federation) -> None:
    """Half the hour is gone when the first one gives up: the second has 1800 s, and does 14 of 20 steps of 100 s."""
    first = await federation.enrol("first")
    await federation.open(make_plan(cohort=ALONE, times=HOUR, evaluation=UNMEASURED))
    lost = await first.take()
    federation.clock.advance(1800)
    second = await federation.enrol("second", slow(100, train=160))
    await first.give_back(lost, "no such model", problem="model-refusal")
    federation.tick()

    job = await second.take()

    assert (job.training.max_steps, job.remaining_seconds) == (14, 1800)


async def test_a_slow_link_leaves_less_time_for_steps(small: Federation) -> None:
    device = await small.enrol("far away", slow(100, up_bytes_per_second=1.2, down_bytes_per_second=1.2))
    await small.open(make_plan(cohort=ALONE, times=HOUR, evaluation=UNMEASURED))

    job = await device.take()

    assert job.training.max_steps is not None
    assert job.training.max_steps <= (2880 - 2 * job.slice.bytes / 1.2) / 100


# --- over-selection, and who comes late ----------------------------------------------------------------------------------


async def test_who_is_lost_is_replaced_only_when_over_selection_does_not_cover_it(federation: Federation) -> None:
    """Three are drawn for a target of two: one may be lost, for the second somebody else is asked."""
    devices = await federation.enrol_many(4)
    run = await federation.open(make_plan(cohort={"target": 2, "quorum": 1, "over_selection": 1.5}, evaluation=UNMEASURED))
    held = {device: job for device in devices if (job := await device.next_job()) is not None}
    (spare,) = set(devices) - set(held)
    first, second, third = held

    await first.give_back(held[first])
    federation.tick()
    assert await spare.next_job() is None
    await second.give_back(held[second])
    federation.tick()

    await spare.complete(await spare.take())
    await third.complete(held[third])
    federation.tick()
    view = await federation.admin.round(run, 1)
    assert (view.reason, view.contributions, view.cohort) == ("the target of 2 is in", 2, 4)


async def test_who_comes_late_is_told_when_and_why_the_round_closed_and_what_to_do(federation: Federation) -> None:
    run, (*quick, late), (*jobs, lost) = await federation.training(make_plan(cohort={"target": 2, "quorum": 1, "over_selection": 1.5}))
    federation.clock.advance(30)
    for device, job in zip(quick, jobs, strict=True):
        await device.complete(job)
    federation.tick()
    federation.clock.advance(20)

    with pytest.raises(errors.JobOver) as caught:
        await late.put_result(lost, late.result(lost))

    assert str(caught.value) == (
        "the job is cancelled: the round closed at 2026-01-01 00:00:30 UTC: the target of 2 is in; "
        "nothing more counts for it: drop it and ask for the next one"
    )
    assert (await federation.admin.client(late)).rejections == 0
    assert (await late.take()).round == 2
    assert (await federation.admin.run(run)).state is RunState.running


# --- far from the others --------------------------------------------------------------------------------------------------


async def send(device: Device, job: Job, size: float) -> Result:
    """A contribution that was moved so far; gives the result that was told."""
    result = device.result(job, (await device.put_slice(job, await device.trained(job, size=size))).digest)
    await device.put_result(job, result)
    return result


async def test_a_change_far_larger_than_the_others_is_set_apart_and_the_rest_is_the_round(federation: Federation) -> None:
    run, devices, jobs = await federation.training(make_plan(suspicious=3.0, rounds=1))
    told = [await send(device, job, size) for device, job, size in zip(devices, jobs, (0.1, 5.0, 0.1), strict=True)]

    federation.tick()

    view = await federation.admin.round(run, 1)
    assert (view.state, view.contributions) == (RoundState.published, 2)
    found = {job.client_name: job for job in view.jobs}
    assert found["device 2"].state is JobState.rejected
    assert str(found["device 2"].reason).endswith("of the 3 contributions; the plan allows 3 times")
    assert (found["device 2"].weight, found["device 2"].counted_in) == (None, None)
    assert found["device 1"].weight == found["device 3"].weight == pytest.approx(0.5)
    (kept,) = (await federation.admin.get("/v1/quarantine", Page[QuarantineView])).items
    assert (kept.problem, kept.client_name, kept.reason, kept.slice) == (
        "suspicious-change",
        "device 2",
        found["device 2"].reason,
        found["device 2"].slice,
    )
    assert (await federation.admin.client(devices[1])).rejections == 0
    again = await devices[1].put_result(jobs[1], told[1])
    assert again.state is JobState.rejected  # a result that was taken is answered like the first time, whatever became of it


async def test_nothing_is_set_apart_where_the_rest_would_be_no_quorum(federation: Federation) -> None:
    run, devices, jobs = await federation.training(make_plan(suspicious=3.0, rounds=1, cohort={"target": 3, "quorum": 3}))
    for device, job, size in zip(devices, jobs, (0.1, 5.0, 0.1), strict=True):
        await send(device, job, size)

    federation.tick()

    view = await federation.admin.round(run, 1)
    assert (view.state, view.contributions) == (RoundState.published, 3)
    assert view.reason == "the target of 3 is in; suspicious contributions count, 1 of 3: the rest would be no quorum"
    assert [job.state for job in view.jobs] == [JobState.accepted] * 3


async def test_a_buffer_is_merged_without_what_is_suspicious(federation: Federation) -> None:
    plan = make_plan(suspicious=2.0, buffer={"size": 3}, cohort={"target": 3, "quorum": 2})
    run, devices, jobs = await federation.training(plan)
    for device, job, size in zip(devices, jobs, (0.1, 5.0, 0.1), strict=True):
        await send(device, job, size)

    federation.tick()

    view = await federation.admin.round(run, 1)
    assert {job.client_name: job.state for job in view.jobs} == {
        "device 1": JobState.accepted,
        "device 2": JobState.rejected,
        "device 3": JobState.accepted,
    }


@pytest.mark.parametrize(
    ("norms", "factor", "found"),
    [
        ([1.0, 2.0, 7.0], 3.0, [2]),
        ([1.0, 2.0, 6.0], 3.0, []),  # exactly three times is not more
        ([9.0, 1.0, 9.0, 1.0, 1.0], 2.0, [0, 2]),
        ([0.0, 0.0, 5.0], 2.0, []),  # a typical change of zero is no measure
        ([5.0], 1.5, []),
        ([], 2.0, []),
        ([1.0, 100.0, 1.0], None, []),
    ],
)
def test_suspects_worked_by_hand(norms: list[float], factor: float | None, found: list[int]) -> None:
    assert list(suspects(norms, factor)) == found


@given(norms=st.lists(st.floats(0, 1e30), min_size=1, max_size=20), factor=st.floats(1.01, 1e6))
def test_never_half_of_the_contributions_are_suspicious(norms: list[float], factor: float) -> None:
    assert 2 * len(suspects(norms, factor)) <= len(norms)
