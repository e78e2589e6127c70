"""Time in which no coordinator was at work counts for nobody; time in which one was counts for everybody."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pytest
from sqlalchemy import select

from coordinator import outage, parts, publishing, tables
from protocol.messages import Job
from protocol.states import JobState, RoundState, RunState
from tests.federation import MINUTE, Clock, Federation, make_plan, open_federation

PLAN = make_plan(evaluation={"every": 0})  # a lease of one minute, ten without progress, an hour for a job, two for a round


@contextmanager
def at_work(federation: Federation) -> Iterator[None]:
    """The conductor's own loop, in a thread, while the block lasts; it has looked once when the block begins."""
    stop = threading.Event()
    thread = threading.Thread(target=federation.parts.conductor.run, args=(stop, 0.02))
    thread.start()
    try:
        until_looked(federation)
        yield
    finally:
        stop.set()
        federation.parts.bell.ring_conductor()
        thread.join()


def until(true: Callable[[], bool]) -> None:
    """Return when it is true; fail when it never comes true."""
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def last_beat(federation: Federation) -> datetime | None:
    with federation.parts.database.read() as session:
        return session.scalar(select(tables.Beat.at))


def outages(federation: Federation) -> list[float]:
    """The seconds of each outage that was noticed."""
    with federation.parts.database.read() as session:
        facts = session.scalars(select(tables.Event.facts).where(tables.Event.kind == "outage").order_by(tables.Event.id))
        return [float(each["seconds"]) for each in facts]


def pass_time(federation: Federation, seconds: int) -> None:
    """Let time pass while the coordinator is at work, no faster than it looks."""
    for second in range(0, seconds, 4):
        federation.clock.advance(min(4, seconds - second))
        until_looked(federation)


def until_looked(federation: Federation) -> None:
    """Return when a coordinator has been at work at the present time."""

    def looked() -> bool:
        last = last_beat(federation)
        return last is not None and abs(federation.clock.now - last) < outage.BEAT

    until(looked)


def state(federation: Federation, job: Job) -> str:
    with federation.parts.database.read() as session:
        return session.get_one(tables.Job, job.id).state


async def test_work_in_hand_outlives_an_outage_of_any_length(federation: Federation) -> None:
    """Two days: longer than the lease, the time without progress, the job's and the round's."""
    run, devices, held = await federation.training(PLAN)
    with at_work(federation):
        pass
    federation.clock.advance(2 * 24 * 60 * MINUTE)

    with at_work(federation):
        for device, job in zip(devices, held, strict=True):
            assert (await device.renew(job, step=1)).remaining_seconds == pytest.approx(PLAN.times.job)
            await device.complete(job)
        await asyncio.to_thread(until, lambda: state(federation, held[0]) == JobState.accepted)

    assert outages(federation) == [2 * 24 * 60 * MINUTE]
    assert (await federation.admin.round(run, 1)).contributions == 3


async def test_half_an_upload_outlives_an_outage_in_which_it_would_have_been_given_up(federation: Federation) -> None:
    _, (device, *_), (job, *_) = await federation.training(PLAN)
    data = await device.trained(job)
    half = await device.patch(job, data, 0, len(data) // 2)
    with at_work(federation):
        pass
    federation.clock.now += 2 * parts.IDLE
    with at_work(federation):
        federation.parts.housekeeping.run_once()

    assert (await device.head(job))["Upload-Offset"] == str(half)
    await device.complete(job)


async def test_after_an_outage_the_times_go_on_where_they_stood(federation: Federation) -> None:
    """Forty seconds of a lease of one minute were over before, and twenty are left."""
    run, _, (job, *_) = await federation.training(PLAN)
    with at_work(federation):
        await asyncio.to_thread(pass_time, federation, 40)
    federation.clock.advance(60 * MINUTE)
    with at_work(federation):
        await asyncio.to_thread(pass_time, federation, 19)
        assert state(federation, job) == JobState.leased
        await asyncio.to_thread(pass_time, federation, 3)
        await asyncio.to_thread(until, lambda: state(federation, job) == JobState.expired)

    assert outages(federation) == [60 * MINUTE]
    assert (await federation.admin.round(run, 1)).state is RoundState.open


async def test_a_restart_within_seconds_is_no_outage(small: Federation) -> None:
    _, _, (job, *_) = await small.training(PLAN)
    with at_work(small):
        pass
    small.clock.advance(6)
    with at_work(small):
        pass

    assert outages(small) == []
    assert (await small.devices[0].renew(job)).remaining_seconds == pytest.approx(PLAN.times.job - 6)


async def test_a_job_that_nobody_had_picked_up_waits_as_long_again(federation: Federation) -> None:
    await federation.enrol_many(3)
    run = await federation.open(PLAN)
    with at_work(federation):
        pass
    federation.clock.advance(30 * MINUTE)
    with at_work(federation):
        pass

    assert {job.state for job in (await federation.admin.round(run, 1)).jobs} == {JobState.queued}


async def test_present_machines_are_present_until_they_had_time_to_poll(federation: Federation) -> None:
    """A round ends and the next one opens before anybody was heard of again."""
    run, devices, held = await federation.training(PLAN)
    with at_work(federation):
        pass
    for device, job in zip(devices, held, strict=True):
        await device.complete(job)
    federation.clock.advance(60 * MINUTE)
    with at_work(federation):
        pass
    federation.tick()

    assert (await federation.admin.round(run, 2)).cohort == 3


async def test_a_client_that_gave_its_job_back_before_the_outage_is_not_back_by_it(federation: Federation) -> None:
    run, (leaving, *_), (job, *_) = await federation.training(PLAN)
    await leaving.give_back(job)
    with at_work(federation):
        pass
    federation.clock.advance(60 * MINUTE)
    with at_work(federation):
        pass
    federation.tick()

    assert (await federation.admin.job(run, job)).state is JobState.released
    federation.clock.advance(5)
    await leaving.next_job()
    federation.tick()
    assert (await federation.admin.job(run, job)).state is JobState.queued


async def test_a_run_that_waits_for_clients_waits_as_long_again(federation: Federation) -> None:
    run = (await federation.admin.create(PLAN)).id
    federation.tick()
    with at_work(federation):
        pass
    federation.clock.advance(2 * PLAN.times.round)
    with at_work(federation):
        pass
    federation.tick()

    view = await federation.admin.run(run)
    assert view.state is RunState.running
    assert str(view.reason).startswith("waits for clients")


async def test_an_outage_during_a_pause_is_given_back_once(federation: Federation) -> None:
    """An hour's pause of which forty minutes are an outage."""
    one, *_ = await federation.enrol_many(3)
    run = await federation.open(PLAN.model_copy(update={"times": PLAN.times.model_copy(update={"job": PLAN.times.round})}))
    federation.clock.advance(MINUTE)
    await federation.admin.change_run(run, "pause")
    with at_work(federation):
        pass
    federation.clock.advance(40 * MINUTE)
    with at_work(federation):
        pass
    federation.clock.advance(20 * MINUTE)
    await federation.admin.change_run(run, "resume")

    assert outages(federation) == [40 * MINUTE]
    assert (await one.take()).remaining_seconds == PLAN.times.round - MINUTE


@pytest.mark.parametrize("jump", [-60 * MINUTE, 60 * MINUTE], ids=["back", "forth"])
async def test_a_clock_that_jumps_ends_nothing_and_makes_nothing_last(federation: Federation, jump: float) -> None:
    _, _, (job, *_) = await federation.training(PLAN)
    with at_work(federation):
        await asyncio.to_thread(pass_time, federation, 40)
        federation.clock.advance(jump)
        await asyncio.to_thread(until_looked, federation)
        await asyncio.to_thread(pass_time, federation, 19)
        assert state(federation, job) == JobState.leased
        await asyncio.to_thread(pass_time, federation, 3)
        await asyncio.to_thread(until, lambda: state(federation, job) == JobState.expired)

    assert len(outages(federation)) == 1


@pytest.fixture
async def pair(database_url: str, tmp_path: Path) -> AsyncIterator[tuple[Federation, Federation]]:
    """Two coordinators over one database and one blob store."""
    clock = Clock()
    async with open_federation(database_url, tmp_path, clock) as one, open_federation(database_url, tmp_path, clock) as two:
        yield one, two


async def test_of_several_coordinators_one_gives_the_time_back_once(pair: tuple[Federation, Federation]) -> None:
    one, two = pair
    _, (device, *_), (job, *_) = await one.training(PLAN)
    with at_work(one):
        pass
    one.clock.advance(60 * MINUTE)
    with at_work(one), at_work(two):
        pass

    assert outages(one) == [60 * MINUTE]
    assert (await device.renew(job)).remaining_seconds == pytest.approx(PLAN.times.job)


async def test_while_one_coordinator_is_at_work_there_is_no_outage(pair: tuple[Federation, Federation]) -> None:
    """The other was away for a minute, and a lease that nobody renewed has ended."""
    one, two = pair
    _, _, (job, *_) = await one.training(PLAN)
    with at_work(two):
        pass
    with at_work(one):
        await asyncio.to_thread(pass_time, one, 61)
    with at_work(two):
        await asyncio.to_thread(until, lambda: state(two, job) == JobState.expired)

    assert outages(one) == []


async def test_a_claim_to_merge_ends_also_while_nobody_is_at_work(federation: Federation) -> None:
    """Whoever held it is gone; and time stands still from here on."""
    with at_work(federation):
        pass
    run = (await federation.admin.create(PLAN)).id
    with federation.parts.database.write() as session:
        (round_id,) = publishing.due(session, federation.clock.now)
        assert publishing.claim(session, round_id, federation.clock.now) is not None
    federation.clock.advance(60 * MINUTE)
    with at_work(federation):
        await asyncio.to_thread(until, lambda: merged(federation, round_id))

    assert (await federation.admin.round(run, 0)).state is RoundState.published


def merged(federation: Federation, round_id: int) -> bool:
    with federation.parts.database.read() as session:
        return session.get_one(tables.Round, round_id).state == RoundState.published
