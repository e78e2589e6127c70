"""Which merges are tried again: those that lost a worker, always; those that follow from what went in, never."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from sqlalchemy import event, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from coordinator import publishing, tables
from coordinator.bell import Bell
from coordinator.conductor import Conductor
from coordinator.database import Database
from coordinator.executors import open_executor
from protocol import crash, errors, slices
from protocol.contents import Label
from protocol.plan import Dtype
from protocol.slices import Factors
from protocol.states import RoundState, RunState
from tests.federation import LAYOUT, Federation, make_plan


def conductor(federation: Federation, executor: Executor) -> Conductor:
    """Another conductor of the same federation, with that executor."""
    parts = federation.parts
    return Conductor(parts.database, parts.blobs, executor, parts.bell, pace=20)


async def closed(federation: Federation) -> str:
    """A run whose first round has all its contributions and waits to be merged."""
    run, devices, held = await federation.training(make_plan(rounds=1))
    for device, job in zip(devices, held, strict=True):
        await device.complete(job)
    return run


def attempts(federation: Federation, run: str, number: int) -> tuple[int, int]:
    """How often the round was claimed, and how many merges of it failed."""
    with federation.parts.database.read() as session:
        row = session.execute(select(tables.Round).where(tables.Round.run_id == run, tables.Round.number == number)).scalar_one()
        return row.merge_epoch, row.merge_failures


class Losing(ThreadPoolExecutor):
    """An executor that loses its worker with every task."""

    def submit(self, *task: Any, **more: Any) -> Future[Any]:
        lost: Future[Any] = Future()
        lost.set_exception(BrokenProcessPool("a process died"))
        return lost


async def test_losing_workers_is_no_failure_however_often_it_happens(federation: Federation) -> None:
    run = await closed(federation)
    losing = conductor(federation, Losing(1))
    for _ in range(publishing.FAILURES + 1):
        with pytest.raises(errors.Unavailable):
            losing.tick()

    waits = await federation.admin.run(run)
    assert waits.state is RunState.running
    assert str(waits.reason).startswith("round 1 waits to be merged: a worker was lost")
    assert attempts(federation, run, 1) == (publishing.FAILURES + 1, 0)

    federation.tick()
    view = await federation.admin.run(run)
    assert (view.state, view.reason) == (RunState.finished, None)


class Dying(Executor):
    """Processes, of which one dies when the first task comes."""

    def __init__(self, processes: Executor) -> None:
        self._processes = processes
        self._died = threading.Event()

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if not self._died.is_set():
            self._died.set()
            self._processes.submit(os._exit, 1)
        return self._processes.submit(function, *args, **kwargs)


async def test_a_round_whose_process_was_killed_is_merged_by_new_ones_to_the_bytes_of_an_undisturbed_round(federation: Federation) -> None:
    undisturbed = await closed(federation)
    federation.tick()
    disturbed = await federation.open(make_plan(rounds=1, evaluation={"every": 0}))
    for device in federation.devices:
        await device.complete(await device.take())
    with open_executor("processes://1") as processes:
        dying = conductor(federation, Dying(processes))
        with pytest.raises(errors.Unavailable):
            dying.tick()
        assert (await federation.admin.round(disturbed, 1)).state is RoundState.merging
        dying.tick()

    ours, theirs = await federation.admin.round(disturbed, 1), await federation.admin.round(undisturbed, 1)
    assert (ours.state, ours.adapter, ours.slices) == (RoundState.published, theirs.adapter, theirs.slices)


class Counting(ThreadPoolExecutor):
    """One worker, and how many tasks it was given."""

    tasks = 0

    def submit(self, *task: Any, **more: Any) -> Future[Any]:
        self.tasks += 1
        return super().submit(*task, **more)


async def test_a_round_that_could_not_be_published_at_once_is_not_merged_again(federation: Federation) -> None:
    """The connection is lost in the middle of the transaction that publishes."""
    run = await closed(federation)
    engine = federation.parts.database.engine
    lost: list[str] = []

    def lose(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("INSERT INTO slices") and not lost:
            lost.append(statement)
            raise OperationalError(statement, None, ConnectionError("the server closed the connection"))

    event.listen(engine, "before_cursor_execute", lose)
    with Counting(1) as executor:
        conductor(federation, executor).tick()
    event.remove(engine, "before_cursor_execute", lose)

    assert lost
    assert executor.tasks == len(LAYOUT.modules) + len(LAYOUT.full)
    assert attempts(federation, run, 1) == (1, 0)
    assert (await federation.admin.round(run, 1)).state is RoundState.published


class Mute(Database):
    """A database that commits what publishes round 1, and does not get that told the first time."""

    def __init__(self, same: Database) -> None:
        vars(self).update(vars(same))
        self.lost = False

    @contextmanager
    def write(self, point: crash.Point | None = None) -> Iterator[Session]:
        with super().write(point) as session:
            yield session
            published = session.scalar(select(tables.Round.id).where(tables.Round.number == 1, tables.Round.state == RoundState.published))
        if published and not self.lost:
            self.lost = True
            raise OperationalError("commit", None, ConnectionError("the server closed the connection"))


class Heard(Bell):
    """Counts how often everybody is woken."""

    times = 0

    def wake_everybody(self) -> None:
        self.times += 1
        super().wake_everybody()


async def test_clients_hear_of_a_round_whose_publishing_was_committed_though_that_was_not_told(federation: Federation) -> None:
    run, parts = await closed(federation), federation.parts
    database, bell = Mute(parts.database), Heard()
    with Counting(1) as executor:
        Conductor(database, parts.blobs, executor, bell, pace=20).tick()

    assert database.lost
    assert bell.times == 1
    assert attempts(federation, run, 1) == (1, 0)
    assert (await federation.admin.round(run, 1)).state is RoundState.published


async def test_an_adapter_that_outgrows_its_wire_fails_the_run_at_the_first_attempt_and_says_what_would_hold_it(
    federation: Federation,
) -> None:
    """With the split to the left a direction of size s σ stands in b as σ, and float16 ends at 65,504."""
    (device,) = await federation.enrol_many(1)
    adapter = {"modules": ["key", "query"], "split": "left"}
    cohort = {"target": 1, "quorum": 1}
    run = await federation.open(make_plan(rounds=4, wire="float16", adapter=adapter, cohort=cohort, evaluation={"every": 0}))
    for b, a in ((30_000.0, 1.0), (60_000.0, 1.0), (60_000.0, 1.5)):
        job = await device.take()
        start = slices.unpack(await device.blob(job.slice.digest))
        pair = start.factors["attention.key"]
        factors = {**start.factors, "attention.key": Factors(b=corner(pair.b, b), a=corner(pair.a, a))}
        label = Label(rank=job.rank, scale=job.scale, round=job.round, base=job.slice.digest, examples=5)
        receipt = await device.put_slice(job, slices.pack(replace(start, label=label, factors=factors), job.layout, Dtype.float16))
        await device.put_result(job, device.result(job, receipt.digest))
        federation.tick()

    view = await federation.admin.run(run)
    assert (view.state, view.round) == (RunState.failed, 2)
    assert view.reason == (
        "round 3 could not be merged: factors/attention.key/b of the merged adapter holds numbers beyond 65504, the most that slices of "
        "this plan can carry; start a run whose wire is bfloat16 or float32"
    )
    assert attempts(federation, run, 3) == (1, 1)


def corner(like: torch.Tensor, value: float) -> torch.Tensor:
    """Zeros but for the first number."""
    made = torch.zeros_like(like)
    made[0, 0] = value
    return made
