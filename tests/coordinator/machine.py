"""A federation to which anything may happen in any order: two coordinators, their devices, and a clock.

The words here are what a state machine puts together; what must hold whatever it puts together stands in `witness.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack, ExitStack, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx

from coordinator import parts, retention, sweeping
from protocol import errors, slices
from protocol.messages import Job
from protocol.plan import Plan
from protocol.states import JobState, RunState
from tests.coordinator.witness import Exchange, Memory, Row, Rows, Witness, rows
from tests.federation import Clock, Device, Federation, Operator, moved, open_federation

T = TypeVar("T")

TURNS = 100  # in which honest devices finish everything
LOOKS = 5  # seconds between two looks
EVER = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True, repr=False)
class Held:
    """A job as it was once handed out, with the slice to start from; the device may have lost it since."""

    owner: int
    job: Job
    start: bytes

    def __repr__(self) -> str:
        return f"Held({self.job.kind} by {self.owner}, round {self.job.round}, epoch {self.job.lease.epoch})"

    def trained(self, salt: int = 0) -> bytes:
        """A slice as if it had been trained."""
        return slices.pack(moved(slices.unpack(self.start), self.job, salt=salt), self.job.layout, self.job.wire)


@dataclass
class World:
    """Two coordinators over one database and one blob store, and everybody who calls them."""

    url: str
    folder: Path
    runner: asyncio.Runner = field(default_factory=asyncio.Runner)
    clock: Clock = field(default_factory=Clock)
    closing: ExitStack = field(default_factory=ExitStack)
    open: dict[int, AsyncExitStack] = field(default_factory=dict)
    sites: dict[int, Federation] = field(default_factory=dict)
    heard: list[Exchange] = field(default_factory=list)
    devices: list[Device] = field(default_factory=list)
    handed: list[Held] = field(default_factory=list)  # every job, each time that it was handed out
    runs: list[str] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)

    def do(self, call: Coroutine[Any, Any, T]) -> T:
        """What an asynchronous call comes to."""
        return self.runner.run(call)

    def start(self, site: int) -> None:
        """A coordinator; what an earlier one had in its memory is gone."""
        self.open[site] = AsyncExitStack()
        found = self.do(self.open[site].enter_async_context(open_federation(self.url, self.folder, self.clock)))
        witness = Witness(found.parts.database.engine, self.heard)
        found.http.event_hooks = {"request": [witness.before], "response": [witness.after]}
        self.sites[site] = found

    def stop(self, site: int) -> None:
        """The end of a coordinator."""
        self.do(self.open.pop(site).aclose())

    def close(self) -> None:
        """The end of everything."""
        for site in list(self.open):
            self.stop(site)
        self.runner.close()
        self.closing.close()

    def keep_house(self, site: int) -> None:
        """Give up rounds before the last one, uploads, and every blob that nothing names, however young."""
        context = self.sites[site].parts
        with context.database.write() as session:
            parts.sweep(session, self.clock.now)
            retention.forget(session, 1, self.clock.now)
        context.quarantine.tidy(EVER)
        for _ in sweeping.sweep(context.database, context.blobs, EVER):
            pass

    def work_on(self, seconds: float) -> None:
        """Let time pass with a coordinator at work, which looks every few seconds: no outage."""
        for _ in range(int(seconds / LOOKS)):
            self.clock.advance(LOOKS)
            self.sites[0].parts.conductor.tick()

    def admin(self, site: int = 0) -> Operator:
        return self.sites[site].admin

    def device(self, number: int, site: int) -> Device:
        """A device, its next request on the way to that coordinator."""
        return replace(self.devices[number], http=self.sites[site].http)

    def enrol(self, site: int = 0) -> None:
        """One device more."""
        self.devices.append(self.do(self.sites[site].enrol(f"device {len(self.devices)}")))

    def create(self, plan: Plan, site: int = 0) -> None:
        """One run more."""
        self.runs.append(self.do(self.admin(site).create(plan)).id)

    def poll(self, number: int, site: int) -> None:
        """A device asks for work, if it may do anything still, and fetches the slice to start from."""
        device = self.device(number, site)
        with suppress(errors.Unauthenticated):
            job = self.do(device.next_job())
            if job is not None:
                self.handed.append(Held(number, job, self.do(device.blob(job.slice.digest))))

    def everybody_polls(self, site: int) -> None:
        for number in range(len(self.devices)):
            self.poll(number, site)

    def finish(self, number: int, site: int) -> None:
        """All that a device has to do, done; nothing, if it may do nothing any more."""
        device = self.device(number, site)
        with suppress(errors.Unauthenticated):
            while (job := self.do(device.next_job())) is not None:
                self.do(device.complete(job))

    def finish_all(self, site: int, but: int = -1) -> None:
        """What everybody has to do, done, and looked at."""
        for number in set(range(len(self.devices))) - {but}:
            self.finish(number, site)
        self.sites[site].tick()

    def jobs(self) -> list[Held]:
        """Every job as it was ever handed out; those that are in hand still are there several times, to be drawn more often."""
        now = self.rows()
        lively = [held for held in self.handed if _held(held, now)]
        return [*self.handed, *lively * (1 + 3 * len(self.handed) // max(1, len(lively)))]

    def holds(self, held: Held) -> bool:
        """Whether the device still has the right to work on the job: its last lease has not ended."""
        return _held(held, self.rows())

    def standing_at(self, held: Held, digest: str) -> int:
        """How many bytes of that slice are noted."""
        upload = self.rows()["uploads"].get(held.job.id)
        return int(upload["offset"]) if upload is not None and upload["digest"] == digest else 0

    def again(self, earlier: Exchange, site: int) -> httpx.Response:
        """The same request once more, byte for byte."""
        send = self.sites[site].http.request
        return self.do(send(earlier.method, earlier.path, headers=earlier.headers, content=earlier.content))

    def job(self, job: Job) -> Row:
        """What is stored of a job."""
        return self.rows()["jobs"][job.id]

    def rows(self) -> Rows:
        return rows(self.sites[0].parts.database.engine)

    def check(self) -> None:
        """What must hold at every moment."""
        self.memory.check(self.rows(), self.sites[0].parts.blobs, self.heard)

    def settle(self) -> None:
        """Whatever was, fresh devices that work, and an operator who lets them: now every job and every run ends."""
        for _ in range(3):
            self.enrol()
        for _ in range(TURNS):
            if all(self._state(run) in (RunState.finished, RunState.stopped) for run in self.runs):
                break
            for run in self.runs:
                if self._state(run) is RunState.paused:  # also again: an old attempt may still run out and be one too many
                    self.do(self.admin().change_run(run, "resume"))
            self.clock.advance(LOOKS)
            for site in self.sites:
                self.finish_all(site)
            self.check()
        now = self.rows()
        unfinished = {f"{run['id']} is {run['state']}: {run['reason']}" for run in now["runs"].values() if not run["ended_at"]}
        assert unfinished == set()
        assert {job["state"] for job in now["jobs"].values()} & {JobState.queued, JobState.leased} == set()

    def _state(self, run: str) -> RunState:
        return RunState(self.do(self.admin().run(run)).state)


def _held(held: Held, now: Rows) -> bool:
    row = now["jobs"][held.job.id]
    return bool((row["state"], row["epoch"]) == (JobState.leased, held.job.lease.epoch))
