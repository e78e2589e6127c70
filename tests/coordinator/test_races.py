"""Two at once: whoever comes second finds what the first one did, and nothing is lost or done twice.

Most tests hold one side's transaction open until the other side waits for it. On SQLite the second waits at its beginning,
on PostgreSQL at the first row that both want, with everything that it read before already in its hands.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from coordinator import clients, errands, outage, publishing, rounds, runs, tables
from coordinator.errands import Answering, Renewing
from coordinator.merge import RoundTask, merge_round
from protocol import errors
from protocol.messages import Job, Progress
from protocol.states import ClientState, JobKind, JobState, RoundState, RunState
from protocol.views import ClientChange
from tests.federation import Clock, Federation, make_plan, open_federation

T = TypeVar("T")
WAITING = text("select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()")


async def second(federation: Federation, first: Callable[[Session], object], call: Awaitable[T]) -> T:
    """The outcome of a call that begins while a transaction is open, and that meets it before it is committed."""
    database = federation.parts.database
    with database.write() as session:
        first(session)
        session.flush()
        task = asyncio.ensure_future(call)
        await asyncio.to_thread(meet, federation, task)
    return await task


def meet(federation: Federation, task: asyncio.Future[T]) -> None:
    """Return when the call waits for a row, or is over. SQLite cannot say; there a call that has begun is given a moment."""
    if federation.parts.database.engine.dialect.name == "sqlite":
        time.sleep(0.2)
        return
    waits = False
    while not waits and not task.done():
        time.sleep(0.01)
        with federation.parts.database.read() as session:
            waits = bool(session.scalar(WAITING))


def close(run: str) -> Callable[[Session], object]:
    """The conductor's closing of a run's open round."""

    def transaction(session: Session) -> None:
        round = rounds.current(session, run)
        assert round is not None
        rounds.close(session, session.get_one(tables.Run, run), round, "the test says so", round.opened_at)

    return transaction


def kinds(federation: Federation, kind: str) -> int:
    """How many events of a kind there are."""
    with federation.parts.database.read() as session:
        return session.scalar(select(func.count()).select_from(tables.Event).where(tables.Event.kind == kind)) or 0


async def test_a_poll_does_not_revive_a_job_that_ends_at_this_moment(federation: Federation) -> None:
    devices = await federation.enrol_many(3)
    run = await federation.open(make_plan(evaluation={"every": 0}))
    for device in devices[:2]:
        await device.complete(await device.take())

    job = await second(federation, close(run), devices[2].next_job())

    assert job is None
    states = {view.client_name: view.state for view in (await federation.admin.round(run, 1)).jobs}
    assert states["device 3"] is JobState.cancelled
    federation.tick()
    assert (await federation.admin.run(run)).round == 1


async def test_a_result_that_arrives_while_the_round_closes_counts_whole_or_is_over(federation: Federation) -> None:
    """Three of four close the round while the fourth's result is on its way into the database."""
    run, devices, held = await federation.training(make_plan(cohort={"target": 3, "quorum": 2, "over_selection": 1.3}), count=4)
    for device, job in zip(devices[:3], held[:3], strict=True):
        await device.complete(job)
    late, job = devices[3], held[3]
    result = late.result(job, (await late.put_slice(job, await late.trained(job))).digest)

    def answer(session: Session) -> None:
        errands.answer(session, [Answering(late.holds(job), result)], federation.clock.now)

    await second(federation, answer, asyncio.to_thread(federation.tick))

    view = await federation.admin.round(run, 1)
    assert view.state is RoundState.published
    assert sum(each.weight or 0 for each in view.jobs) == pytest.approx(1)
    assert all((each.weight is not None) == (each.state is JobState.accepted) for each in view.jobs)
    assert {each.state for each in view.jobs} == {JobState.accepted}


async def test_the_same_result_twice_at_once_is_one_result(federation: Federation) -> None:
    run, (device, *_), (job, *_) = await federation.training(make_plan())
    result = device.result(job, (await device.put_slice(job, await device.trained(job))).digest)

    receipt = await second(
        federation,
        lambda session: errands.answer(session, [Answering(device.holds(job), result)], federation.clock.now),
        device.put_result(job, result),
    )

    assert (receipt.job, receipt.state) == (job.id, JobState.submitted)
    assert kinds(federation, "job-submitted") == 1
    assert (await federation.admin.round(run, 1)).contributions == 1


async def test_of_two_different_results_at_once_one_stands(federation: Federation) -> None:
    run, (device, *_), (job, *_) = await federation.training(make_plan())
    slice = (await device.put_slice(job, await device.trained(job))).digest

    outcomes = await asyncio.gather(
        *(device.put_result(job, device.result(job, slice, examples=examples)) for examples in (3, 4, 5)), return_exceptions=True
    )

    assert [type(outcome) for outcome in outcomes if isinstance(outcome, Exception)] == [errors.DifferentResult] * 2
    assert (await federation.admin.job(run, job)).examples in (3, 4, 5)


async def test_two_polls_at_once_hold_one_job_under_two_epochs(federation: Federation) -> None:
    device, *_ = await federation.enrol_many(3)
    await federation.open(make_plan(evaluation={"every": 0}))

    held = await asyncio.gather(*(device.take() for _ in range(4)))

    assert len({job.id for job in held}) == 1
    assert sorted(job.lease.epoch for job in held) == [1, 2, 3, 4]


async def test_a_poll_during_ones_own_result_takes_nothing_back(federation: Federation) -> None:
    run, (device, *_), (job, *_) = await federation.training(make_plan())
    result = device.result(job, (await device.put_slice(job, await device.trained(job))).digest)

    again = await second(
        federation, lambda session: errands.answer(session, [Answering(device.holds(job), result)], federation.clock.now), device.next_job()
    )

    assert again is None
    assert (await federation.admin.job(run, job)).state is JobState.submitted


async def test_a_rejection_does_not_undo_a_revocation(federation: Federation) -> None:
    _, (device, *_), (job, *_) = await federation.training(make_plan())
    with federation.parts.database.write() as session:
        session.get_one(tables.Client, device.id).rejections = 2

    async def nonsense() -> None:
        with pytest.raises((errors.MalformedSlice, errors.JobOver)):
            await device.put_slice(job, b"nonsense")

    change = ClientChange(state=ClientState.revoked)
    await second(federation, lambda session: clients.change(session, device.id, change, federation.clock.now), nonsense())

    assert (await federation.admin.client(device)).state is ClientState.revoked


async def test_a_run_that_finishes_at_this_moment_is_not_paused(federation: Federation) -> None:
    await federation.enrol_many(3)
    run = await federation.open(make_plan(rounds=1, evaluation={"every": 0}))
    for device in federation.devices:
        await device.complete(await device.take())
    federation.parts.conductor.tick()
    assert (await federation.admin.run(run)).state is RunState.running

    async def pause() -> None:
        with pytest.raises(errors.Conflict):
            await federation.admin.change_run(run, "pause")

    await second(federation, lambda session: runs.advance(session, run, federation.clock.now, 20), pause())

    assert (await federation.admin.run(run)).state is RunState.finished


async def test_a_lease_that_is_renewed_at_this_moment_has_not_ended(federation: Federation) -> None:
    run, (device, *_), (job, *_) = await federation.training(make_plan())
    federation.clock.advance(60)
    progress = Progress(epoch=job.lease.epoch, phase="train", step=1)

    await second(
        federation,
        lambda session: errands.renew(session, [Renewing(device.holds(job), progress)], federation.clock.now),
        asyncio.to_thread(federation.tick),
    )

    assert (await federation.admin.job(run, job)).state is JobState.leased
    assert kinds(federation, "job-expired") == 2


async def test_a_run_stopped_while_its_round_is_published_has_nothing_left_to_measure(federation: Federation) -> None:
    devices = await federation.enrol_many(3)
    run = await federation.open(make_plan(rounds=1))
    for device in devices:
        await device.complete(await device.take(JobKind.evaluate))
        await device.complete(await device.take())
    parts, now = federation.parts, federation.clock.now
    with parts.database.write() as session:
        runs.advance(session, run, now, 20)
        claim = publishing.claim(session, publishing.due(session, now)[0], now)
        assert claim is not None
        task = publishing.task(session, claim, parts.blobs.url)
    assert isinstance(task, RoundTask)
    merged = merge_round(task, parts.executor, parts.blobs)

    await second(
        federation,
        lambda session: publishing.publish(session, parts.blobs, claim, task, merged, 0.1, now, 20),
        federation.admin.change_run(run, "stop"),
    )

    view = await federation.admin.round(run, 1)
    assert view.state is RoundState.published
    measuring = [job.state for job in view.jobs if job.kind is JobKind.evaluate]
    assert measuring == [JobState.cancelled] * 3


async def test_the_first_beats_of_two_coordinators_are_one(federation: Federation) -> None:
    database, now = federation.parts.database, federation.clock.now

    def beat() -> None:
        with database.write() as session:
            outage.beat(session, now)

    await second(federation, lambda session: outage.beat(session, now), asyncio.to_thread(beat))

    with database.read() as session:
        assert session.scalars(select(tables.Beat.at)).all() == [now]


@pytest.fixture
async def pair(database_url: str, tmp_path: Path) -> AsyncIterator[tuple[Federation, Federation]]:
    """Two coordinators over one database and one blob store."""
    clock = Clock()
    async with open_federation(database_url, tmp_path, clock) as one, open_federation(database_url, tmp_path, clock) as two:
        yield one, two


async def both_look(one: Federation, two: Federation) -> None:
    await asyncio.gather(asyncio.to_thread(one.tick), asyncio.to_thread(two.tick))


async def test_two_conductors_open_close_and_publish_each_round_once(pair: tuple[Federation, Federation]) -> None:
    one, two = pair
    await one.enrol_many(4)
    run = (await one.admin.create(make_plan(evaluation={"every": 0}))).id
    for _ in range(4):
        await both_look(one, two)
        for device in one.devices:
            job = await device.next_job()
            if job is not None:
                await device.complete(job)
    await both_look(one, two)

    assert (await two.admin.run(run)).state is RunState.finished
    assert [kinds(one, f"round-{change}") for change in ("opened", "closed", "published", "abandoned")] == [2, 2, 3, 0]
    assert kinds(one, "merge-failed") == 0
    assert [(await one.admin.round(run, number)).cohort for number in (1, 2)] == [3, 3]


async def test_a_conductor_waits_for_another_that_opens_the_same_round(pair: tuple[Federation, Federation]) -> None:
    one, two = pair
    await one.enrol_many(3)
    run = (await one.admin.create(make_plan(evaluation={"every": 0}))).id
    one.parts.conductor.tick()

    await second(one, lambda session: runs.advance(session, run, one.clock.now, 20), asyncio.to_thread(two.tick))

    assert kinds(one, "round-opened") == 1
    assert (await one.admin.round(run, 1)).cohort == 3


async def test_two_conductors_do_not_draw_twice_for_one_lost_job(pair: tuple[Federation, Federation]) -> None:
    one, two = pair
    devices = await one.enrol_many(6)
    run = await one.open(make_plan(evaluation={"every": 0}))
    held: dict[str, Job] = {}
    for device in devices:
        if (job := await device.next_job()) is not None:
            held[device.name] = job
            if len(held) == 1:
                await device.give_back(job)

    await second(one, lambda session: runs.advance(session, run, one.clock.now, 20), asyncio.to_thread(two.tick))

    assert (await one.admin.round(run, 1)).cohort == 4


async def test_a_merge_is_claimed_by_one(pair: tuple[Federation, Federation]) -> None:
    """The second conductor finds the round claimed and goes on; the first one's publication is the only one."""
    one, two = pair
    run = (await one.admin.create(make_plan())).id

    await both_look(one, two)

    view = await one.admin.round(run, 0)
    assert view.state is RoundState.published
    assert kinds(one, "round-published") == 1
