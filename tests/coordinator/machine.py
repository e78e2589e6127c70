"""A federation to which anything may happen in any order: two coordinators, devices good and bad, and a witness of every request.

The words here are what a state machine puts together. What must hold whatever it puts together stands in `Witness`, which
sees every request, and in `World.check`, which looks at every row.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict
from collections.abc import Coroutine
from contextlib import AsyncExitStack, ExitStack, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import httpx
from sqlalchemy import Engine, text

from coordinator.housekeeping import Housekeeping
from coordinator.tables import Base
from protocol import errors, slices
from protocol.messages import Job
from protocol.plan import Plan
from protocol.states import JobState, RoundState, RunState
from tests.federation import Clock, Device, Federation, Operator, moved, open_federation, refusal

T = TypeVar("T")
Row = dict[str, Any]
Rows = dict[str, dict[str, Row]]  # table → primary key → row

WATCHED = ("runs", "rounds", "slices", "jobs", "uploads", "parts", "clients", "enrolments", "quarantine")
PASSING = ("last_seen", "touched_at")  # that somebody called may be noted of those too who are refused
NAMED = {"rounds": "adapter", "slices": "digest", "parts": "digest"}  # columns that name blobs; those of jobs are looked at one by one
COUNTED = (JobState.submitted, JobState.accepted)
TURNS = 100  # in which honest devices finish everything
LOOKS = 5  # seconds between two looks
CHORES = 6


def rows(engine: Engine) -> Rows:
    """What the database holds now."""
    found: Rows = {}
    with engine.connect() as connection:
        for name in WATCHED:
            table = Base.metadata.tables[name]
            columns = [column.name for column in table.columns if column.name not in PASSING]
            quoted = ", ".join(f'"{column}"' for column in columns)
            listed = connection.execute(text(f"select {quoted} from {name}"))
            keys = [column.name for column in table.primary_key]
            here = [dict(zip(columns, row, strict=True)) for row in listed]
            found[name] = {"/".join(str(row[key]) for key in keys): row for row in here}
    return found


def changed(before: Rows, after: Rows) -> set[str]:
    """Which rows are not the same, as table/key."""
    return {
        f"{name}/{key}"
        for name in WATCHED
        for key in before[name].keys() | after[name].keys()
        if before[name].get(key) != after[name].get(key)
    }


def later() -> Clock:
    """A clock that is ahead of the files: whatever nobody names may be swept at once."""
    clock = Clock()
    clock.now = datetime(2100, 1, 1, tzinfo=UTC)
    return clock


@dataclass(frozen=True)
class Exchange:
    """A request of a device and how it was answered."""

    method: str
    path: str
    headers: dict[str, str]
    content: bytes
    status: int
    body: bytes

    @property
    def result(self) -> bool:
        return self.path.endswith("/result")


@dataclass
class Witness:
    """Sees every request: a refusal is a problem, no defect, and leaves every row as it was."""

    engine: Engine
    heard: list[Exchange]

    async def before(self, request: httpx.Request) -> None:
        request.extensions["rows"] = rows(self.engine)

    async def after(self, response: httpx.Response) -> None:
        request = response.request
        body, content = await response.aread(), await request.aread()
        if request.url.path.startswith("/v1/jobs"):
            headers = {name: value for name, value in request.headers.items() if name not in ("host",)}
            self.heard.append(Exchange(request.method, request.url.path, headers, content, response.status_code, body))
        if response.is_success:
            return
        error = refusal(response)
        assert not isinstance(error, errors.Unavailable), error.detail
        touched = changed(request.extensions["rows"], rows(self.engine))
        assert {row for row in touched if not self._may_change(row, error, request)} == set(), (request.url.path, error, error.detail)

    def _may_change(self, row: str, error: errors.HLoRAError, request: httpx.Request) -> bool:
        """A slice that cannot count ends its job, and is held against its client; parts that came are kept, or given up."""
        table, _, key = row.partition("/")
        job = request.url.path.split("/")[3]
        if table in ("uploads", "parts"):
            return isinstance(error, (errors.InvalidSlice, errors.TruncatedBody, errors.StalledBody)) and key.startswith(job)
        ended = isinstance(error, errors.InvalidSlice) and not error.retryable
        return ended and (table in ("clients", "quarantine") or (table, key) == ("jobs", job))


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
    clock: Clock = field(default_factory=later)
    closing: ExitStack = field(default_factory=ExitStack)
    open: dict[int, AsyncExitStack] = field(default_factory=dict)
    sites: dict[int, Federation] = field(default_factory=dict)
    heard: list[Exchange] = field(default_factory=list)
    devices: list[Device] = field(default_factory=list)
    handed: list[Held] = field(default_factory=list)  # every job, each time that it was handed out
    runs: list[str] = field(default_factory=list)
    standing: dict[str, object] = field(default_factory=dict)  # what has been said and may never change
    whole: set[str] = field(default_factory=set)  # blobs whose bytes were compared with their names

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
        """Give up rounds before the last one, uploads, and every blob that nothing names."""
        parts = self.sites[site].parts
        settings = parts.settings.model_copy(update={"keep_rounds": 1})
        done = Housekeeping(parts.database, parts.blobs, parts.quarantine, settings).run_once()
        assert len(done) == CHORES, "a chore failed"

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
        now = self.rows()
        _every_end_has_its_reason(now)
        _weights_are_shares(now)
        _parts_are_one_after_the_other(now)
        self._what_was_said_stands(now)
        self._every_blob_is_there(now)

    def _what_was_said_stands(self, now: Rows) -> None:
        """A result is taken once and stays as it is; so does what a round published."""
        taken = [exchange.path for exchange in self.heard if exchange.result and exchange.status == 201]
        assert len(taken) == len(set(taken)), "a result was new twice"
        said: dict[str, object] = {}
        for id, job in now["jobs"].items():
            if f"result of {id}" in self.standing or job["state"] in COUNTED:
                assert job["state"] in (*COUNTED, JobState.rejected)  # too stale, or too far from the others
                said[f"result of {id}"] = job["result"], job["slice"], job["epoch"]
        for id, round in now["rounds"].items():
            if round["state"] == RoundState.published:
                slices = {row["rank"]: row["digest"] for row in now["slices"].values() if str(row["round_id"]) == id}
                said[f"round {round['number']} of {round['run_id']}"] = round["adapter"], slices
        assert {what for what, before in self.standing.items() if said.get(what) != before} == set()
        self.standing = said

    def _every_blob_is_there(self, now: Rows) -> None:
        """Every blob that a row names, under the name of its bytes; but not those of rounds that were forgotten."""
        kept = {id for id, round in now["rounds"].items() if not round["forgotten"]}
        names = {row["adapter"] for row in now["rounds"].values()} | {row["digest"] for row in now["parts"].values()}
        names |= {row["digest"] for row in now["slices"].values() if str(row["round_id"]) in kept}
        for job in now["jobs"].values():
            needed = str(job["counted_in"] or job["round_id"]) in kept or job["state"] in (JobState.queued, JobState.leased)
            names |= {job["base"], job["slice"]} if needed else set()
        blobs = self.sites[0].parts.blobs
        for name in names - {None}:
            assert blobs.exists(name), f"{name} is not there"
            if name not in self.whole:
                assert name == f"sha256:{hashlib.sha256(blobs.read(name)).hexdigest()}"
                self.whole.add(name)

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


def _weights_are_shares(now: Rows) -> None:
    """Of every round that is merged or merging the weights sum to one, and each is that of a result that is in."""
    shares: dict[str, list[float]] = defaultdict(list)
    for job in now["jobs"].values():
        if job["weight"] is not None:
            assert (job["state"] in COUNTED, job["kind"], job["slice"] is None) == (True, "train", False)
            shares[str(job["counted_in"] or job["round_id"])].append(job["weight"])
    for id, round in now["rounds"].items():
        if round["number"] > 0 and round["state"] in (RoundState.merging, RoundState.published):
            assert abs(sum(shares[id]) - 1) <= 1e-12


def _parts_are_one_after_the_other(now: Rows) -> None:
    """The parts of an upload reach from its first byte to its offset, without gap or overlap."""
    for job, upload in now["uploads"].items():
        parts = sorted((part["start"], part["bytes"]) for part in now["parts"].values() if part["job_id"] == job)
        assert [start for start, _ in parts] == list(accumulate((count for _, count in parts[:-1]), initial=0))[: len(parts)]
        assert sum(count for _, count in parts) == upload["offset"] <= upload["length"]


def _every_end_has_its_reason(now: Rows) -> None:
    """Whatever ended otherwise than it should says why, and nothing met a defect."""
    quiet = {*COUNTED, JobState.queued, JobState.leased, RoundState.open, RoundState.merging, RoundState.published, RunState.running}
    for row in (*now["runs"].values(), *now["rounds"].values(), *now["jobs"].values()):
        assert row["state"] in (*quiet, RunState.finished) or row["reason"], row
    assert [run["reason"] for run in now["runs"].values() if run["state"] == RunState.failed] == []
