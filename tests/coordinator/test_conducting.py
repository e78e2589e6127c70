"""Merging that fails, is interrupted, or comes late; and a conductor that nothing of this stops."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from coordinator import publishing, rounds, runs, tables
from coordinator.conductor import Conductor
from protocol import errors
from protocol.messages import Dataset, Verdict
from protocol.states import JobKind, JobState, RoundState, RunState
from tests.federation import Clock, Federation, make_plan, make_profile, open_federation


class Meddling(ThreadPoolExecutor):
    """An executor of one thread that lets a test do something when work comes."""

    def __init__(self, meddle: Callable[[], object]) -> None:
        super().__init__(1)
        self._meddle = meddle

    def submit(self, *task: Any, **more: Any) -> Future[Any]:
        self._meddle()
        return super().submit(*task, **more)


def conductor(federation: Federation, meddle: Callable[[], object]) -> Conductor:
    """Another conductor of the same federation, with that executor."""
    parts = federation.parts
    return Conductor(parts.database, parts.blobs, Meddling(meddle), parts.bell, pace=20)


async def closed(federation: Federation) -> tuple[str, list[str]]:
    """A run whose first round has all its contributions and waits to be merged, and the contributions' digests."""
    run, devices, held = await federation.training(make_plan(rounds=1))
    results = [await device.complete(job) for device, job in zip(devices, held, strict=True)]
    return run, [result.slice for result in results if result.slice]


def waiting_rounds(federation: Federation) -> list[int]:
    with federation.parts.database.read() as session:
        return publishing.due(session, federation.clock.now)


async def test_a_round_that_cannot_be_merged_fails_its_run_and_goes_on_when_that_is_mended(federation: Federation) -> None:
    run, slices = await closed(federation)
    lost = federation.parts.blobs.read(slices[0])
    federation.parts.blobs.delete(slices[0])
    federation.tick()

    view = await federation.admin.run(run)
    assert view.state is RunState.failed
    assert str(view.reason).startswith("round 1 could not be merged: there is no blob sha256:")
    assert view.ended_at is not None
    assert (await federation.admin.round(run, 1)).state is RoundState.merging

    federation.parts.blobs.put(lost)
    await federation.admin.change_run(run, "resume")
    federation.tick()

    view = await federation.admin.run(run)
    assert (view.state, view.reason) == (RunState.finished, None)
    assert (await federation.admin.round(run, 1)).contributions == 3


async def test_a_claim_that_was_left_behind_is_taken_up_later_with_the_same_bytes(federation: Federation) -> None:
    undisturbed, _ = await closed(federation)
    federation.tick()
    disturbed, _ = await closed_again(federation)
    with federation.parts.database.write() as session:
        runs.advance(session, disturbed, federation.clock.now, 20)
    (round_id,) = waiting_rounds(federation)
    with federation.parts.database.write() as session:
        assert publishing.claim(session, round_id, federation.clock.now) is not None

    federation.tick()
    federation.clock.advance(5.9)
    federation.tick()
    assert (await federation.admin.round(disturbed, 1)).state is RoundState.merging
    federation.clock.advance(0.1)
    federation.tick()

    ours, theirs = await federation.admin.round(disturbed, 1), await federation.admin.round(undisturbed, 1)
    assert (ours.state, ours.adapter, ours.slices) == (RoundState.published, theirs.adapter, theirs.slices)


async def closed_again(federation: Federation) -> tuple[str, list[str]]:
    """What `closed` gives, once more with the same devices."""
    run = await federation.open(make_plan(rounds=1, evaluation={"every": 0}))
    results = [await device.complete(await device.take()) for device in federation.devices]
    return run, [result.slice for result in results if result.slice]


async def test_a_claim_that_was_lost_publishes_nothing(federation: Federation) -> None:
    run = (await federation.admin.create(make_plan())).id
    (round_id,) = waiting_rounds(federation)
    now = federation.clock.now
    with federation.parts.database.write() as session:
        slow = publishing.claim(session, round_id, now)
    assert slow is not None
    federation.clock.advance(30)
    federation.tick()
    published = await federation.admin.round(run, 0)

    with federation.parts.database.write() as session:
        assert publishing.prolong(session, slow, now) is False
        publishing.fail(session, slow, "too late", now)

    assert await federation.admin.round(run, 0) == published
    assert (await federation.admin.run(run)).state is RunState.running


async def test_a_claim_can_be_held_for_as_long_as_a_merge_takes(small: Federation) -> None:
    await small.admin.create(make_plan())
    (round_id,) = waiting_rounds(small)
    with small.parts.database.write() as session:
        claim = publishing.claim(session, round_id, small.clock.now)
    assert claim is not None
    for _ in range(5):
        small.clock.advance(5)
        with small.parts.database.write() as session:
            assert publishing.prolong(session, claim, small.clock.now)
            assert publishing.claim(session, round_id, small.clock.now) is None


async def test_a_run_stopped_while_its_round_is_merged_publishes_nothing(federation: Federation) -> None:
    run, _ = await closed(federation)

    def stop() -> None:
        with federation.parts.database.write() as session:
            runs.stop(session, run, federation.clock.now)

    conductor(federation, stop).tick()

    assert (await federation.admin.run(run)).state is RunState.stopped
    view = await federation.admin.round(run, 1)
    assert (view.state, view.reason, view.adapter) == (RoundState.abandoned, "the run was stopped", None)


async def test_a_run_stopped_while_its_merge_fails_for_the_last_time_stays_stopped(federation: Federation) -> None:
    run, _ = await closed(federation)
    tries = []

    def stop() -> None:
        tries.append(1)
        if len(tries) == publishing.FAILURES:
            with federation.parts.database.write() as session:
                runs.stop(session, run, federation.clock.now)
        raise RuntimeError("a worker died")

    breaking = conductor(federation, stop)
    for _ in range(publishing.FAILURES + 1):
        breaking.tick()

    view = await federation.admin.run(run)
    assert (view.state, view.reason) == (RunState.stopped, "by an operator")


async def test_a_run_paused_while_its_round_is_merged_publishes_it(federation: Federation) -> None:
    run, _ = await closed(federation)

    def pause() -> None:
        with federation.parts.database.write() as session:
            runs.pause(session, run, federation.clock.now)

    conductor(federation, pause).tick()

    assert (await federation.admin.round(run, 1)).state is RoundState.published
    assert (await federation.admin.run(run)).state is RunState.paused


async def test_what_is_to_be_measured_since_some_time_in_a_pause_waits_no_longer_than_ever(federation: Federation) -> None:
    """The run is paused while its last round is merged, which takes ten seconds more."""
    devices = await federation.enrol_many(2)
    run = await federation.open(make_plan(rounds=1, cohort={"target": 2, "quorum": 2}, evaluation={"every": 5}))
    for device in devices:
        await device.complete(await device.take(JobKind.evaluate))
        await device.complete(await device.take())

    def pause() -> None:
        with federation.parts.database.write() as session:
            if runs.get(session, run).state == RunState.running:
                runs.pause(session, run, federation.clock.now)
                federation.clock.advance(10)

    conductor(federation, pause).tick()
    federation.clock.advance(1800)
    await federation.admin.change_run(run, "resume")

    now = federation.clock.now
    with federation.parts.database.read() as session:
        queued = session.scalars(select(tables.Job).where(tables.Job.state == JobState.queued)).all()
    assert [(job.created_at, job.deadline) for job in queued] == [(now, now + timedelta(seconds=7200))] * 2


async def test_a_round_whose_bytes_cannot_be_read_now_holds_up_no_other(federation: Federation) -> None:
    sick, (slice, *_) = await closed(federation)
    blob = federation.parts.settings.data / "blobs" / slice.replace(":", "/")
    blob.rename(blob.with_suffix(".away"))
    blob.mkdir()  # what is no file cannot be read
    sound = (await federation.admin.create(make_plan(rounds=1))).id

    with pytest.raises(errors.Unavailable):
        federation.tick()

    assert (await federation.admin.round(sound, 0)).state is RoundState.published
    assert (await federation.admin.round(sick, 1)).state is RoundState.merging
    blob.rmdir()
    blob.with_suffix(".away").rename(blob)
    federation.tick()
    assert (await federation.admin.round(sick, 1)).state is RoundState.published


async def test_an_executor_that_breaks_is_tried_three_times(small: Federation) -> None:
    run, _ = await closed(small)
    tries = []

    def explode() -> None:
        tries.append(1)
        raise RuntimeError("a worker died\nwith a long story")

    breaking = conductor(small, explode)
    for _ in range(5):
        breaking.tick()

    assert len(tries) == 3
    view = await small.admin.run(run)
    assert (view.state, view.reason) == (RunState.failed, "round 1 could not be merged: RuntimeError: a worker died")


async def test_clients_of_a_failed_run_are_told_to_stop(small: Federation) -> None:
    """The last evaluation of round 0 is still going on when round 1 fails to merge."""
    measuring, *_ = await small.enrol_many(3)
    run = await small.open(make_plan())
    evaluation = await measuring.take(JobKind.evaluate)
    for device in small.devices[1:]:
        await device.complete(await device.take(JobKind.evaluate))
    with small.parts.database.write() as session:
        session.execute(update(tables.Run).where(tables.Run.id == run).values(state=RunState.failed, reason="a test"))

    assert (await measuring.renew(evaluation)).verdict is Verdict.cancel
    assert [await device.next_job() for device in small.devices] == [None] * 3
    small.advance(60)
    assert (await small.admin.job(run, evaluation)).state is JobState.expired


async def test_a_defect_that_one_run_meets_fails_that_run_and_stops_no_other(federation: Federation) -> None:
    await federation.enrol_many(3)
    broken = (await federation.admin.create(make_plan(name="broken", evaluation={"every": 0}))).id
    federation.tick()
    with federation.parts.database.write() as session:
        own = select(tables.Round.id).where(tables.Round.run_id == broken)
        session.execute(delete(tables.Job).where(tables.Job.round_id.in_(own)))
        session.execute(delete(tables.Round).where(tables.Round.run_id == broken, tables.Round.number == 1))
        session.execute(delete(tables.PublishedSlice).where(tables.PublishedSlice.round_id.in_(own)))
    sound = await federation.open(make_plan(name="sound"))

    (view,) = await federation.play([sound])

    assert view.state is RunState.finished
    failed = await federation.admin.run(broken)
    assert (failed.state, failed.reason) == (RunState.failed, "KeyError: 4")


async def test_a_plan_that_cannot_be_read_any_more_stops_no_other_run(small: Federation) -> None:
    devices = await small.enrol_many(3)
    old = await small.open(make_plan(evaluation={"every": 0}))
    for device in devices:
        await device.take()
    with small.parts.database.write() as session:
        session.execute(update(tables.Run).where(tables.Run.id == old).values(plan={"of": "another release"}))

    new = await small.open(make_plan(rounds=1, evaluation={"every": 0}))

    assert (await small.admin.round(new, 1)).state is RoundState.open


# --- the loop -----------------------------------------------------------------------------------------------------------


@contextmanager
def running(federation: Federation, conductor: Conductor | None = None) -> Iterator[None]:
    """A conductor's own loop, in a thread, while the block lasts."""
    stop = threading.Event()
    thread = threading.Thread(target=(conductor or federation.parts.conductor).run, args=(stop, 0.02))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        federation.parts.bell.ring_conductor()
        thread.join()


async def until(true: Callable[[], bool]) -> None:
    """Return when it is true; fail when it never comes true."""

    def look() -> None:
        end = time.monotonic() + 20
        while not true():
            assert time.monotonic() < end, "it never came true"
            time.sleep(0.01)

    await asyncio.to_thread(look)


def published(federation: Federation) -> int:
    with federation.parts.database.read() as session:
        query = select(func.count()).select_from(tables.Round).where(tables.Round.state == RoundState.published)
        return session.scalar(query) or 0


async def test_the_loop_carries_a_run_on_by_itself(federation: Federation) -> None:
    await federation.enrol_many(3)
    with running(federation):
        run = (await federation.admin.create(make_plan(rounds=2, evaluation={"every": 0}))).id
        for number in (1, 2):
            await until(lambda number=number: published(federation) == number)  # type: ignore[misc]
            for device in federation.devices:
                job = await device.next_job(wait=10)
                assert job is not None
                await device.complete(job)
        await until(lambda: published(federation) == 3)

    federation.tick()
    assert (await federation.admin.run(run)).state is RunState.finished


def state(federation: Federation, run: str) -> str | None:
    """Of a run's newest round."""
    with federation.parts.database.read() as session:
        round = rounds.current(session, run)
        return None if round is None else round.state


async def test_a_long_merge_holds_up_no_other_run(federation: Federation) -> None:
    pictures = {"pictures": Dataset(train=10, held_out=3).model_dump(mode="json")}
    others = [await federation.enrol(f"other {number}", make_profile(datasets=pictures)) for number in range(3)]
    other = await federation.open(make_plan(data="pictures", rounds=1, evaluation={"every": 0}))
    slow, _ = await closed(federation)
    begun, go_on = threading.Event(), threading.Event()

    def block() -> None:
        begun.set()
        assert go_on.wait(20)

    with running(federation, conductor(federation, block)):
        await asyncio.to_thread(begun.wait, 20)
        for device in others:
            await device.complete(await device.take())
        federation.parts.bell.ring_conductor()
        await until(lambda: state(federation, other) == RoundState.merging)
        assert state(federation, slow) == RoundState.merging
        go_on.set()
        await until(lambda: (state(federation, slow), state(federation, other)) == (RoundState.published, RoundState.published))


class LastCall(Clock):
    """A clock that tells the conductor to stop when its merging thread asks for the time: when it looks what is due."""

    def __init__(self) -> None:
        super().__init__()
        self.stop = threading.Event()

    def __call__(self, session: Session) -> datetime:
        if threading.current_thread().name == "merging":
            self.stop.set()
        return super().__call__(session)


async def test_a_conductor_that_is_stopped_before_its_merge_began_leaves_the_round_to_others_at_once(
    database_url: str, tmp_path: Path
) -> None:
    clock = LastCall()
    async with open_federation(database_url, tmp_path, clock) as federation:
        await federation.admin.create(make_plan())
        (round_id,) = waiting_rounds(federation)

        await asyncio.to_thread(federation.parts.conductor.run, clock.stop, 0.02)

        assert waiting_rounds(federation) == [round_id]
        with federation.parts.database.read() as session:
            assert session.get_one(tables.Round, round_id).merge_epoch == 1, "it was claimed"


async def test_the_loop_survives_a_defect_of_its_own(small: Federation) -> None:
    """A waiter of an event loop that is gone cannot be woken; the clients behind it, and their rounds, go on."""
    device, *_ = await small.enrol_many(3)

    async def leave() -> None:
        small.parts.bell.listen(device.id).__enter__()

    await asyncio.to_thread(asyncio.run, leave())
    with running(small):
        run = (await small.admin.create(make_plan(evaluation={"every": 0}))).id
        await until(lambda: published(small) == 1)
        for each in small.devices:
            job = None
            while job is None:
                job = await each.next_job(wait=1)
            await each.complete(job)
        await until(lambda: published(small) == 2)
    assert (await small.admin.run(run)).round == 1


@pytest.mark.slow
async def test_a_merge_longer_than_its_claim_keeps_it(small: Federation) -> None:
    """A third of the claim's time passes for real; then the claim that stands in the database is a later one."""
    run, _ = await closed(small)

    def limit() -> Any:
        with small.parts.database.read() as session:
            return session.scalar(select(tables.Round.merge_until).where(tables.Round.state == RoundState.merging))

    def wait_for_prolonging() -> None:
        before = limit()
        small.clock.advance(5)
        end = time.monotonic() + 2 * publishing.CLAIM.total_seconds()
        while limit() == before and time.monotonic() < end:
            time.sleep(0.1)
        assert limit() > before

    meddled = threading.Event()

    def once() -> None:
        if not meddled.is_set():
            meddled.set()
            wait_for_prolonging()

    conductor(small, once).tick()

    assert (await small.admin.round(run, 1)).state is RoundState.published
