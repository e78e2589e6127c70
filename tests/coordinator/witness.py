"""What must hold of a federation after every request and after every step, whatever happened before."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import httpx
from sqlalchemy import Engine, text

from coordinator.blobs import Blobs
from coordinator.tables import Run
from protocol import errors
from protocol.states import JobState, RoundState, RunState
from tests.federation import refusal

Row = dict[str, Any]
Rows = dict[str, dict[str, Row]]  # table → primary key → row

WATCHED = ("runs", "rounds", "slices", "jobs", "uploads", "parts", "clients", "enrolments", "quarantine")
PASSING = ("last_seen", "touched_at")  # that somebody called may be noted of those too who are refused
COUNTED = (JobState.submitted, JobState.accepted)


def rows(engine: Engine) -> Rows:
    """What the database holds now."""
    found: Rows = {}
    with engine.connect() as connection:
        for name in WATCHED:
            table = Run.metadata.tables[name]
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


@dataclass
class Memory:
    """What was seen before, and may not be otherwise now."""

    standing: dict[str, object] = field(default_factory=dict)  # what has been said and may never change
    whole: set[str] = field(default_factory=set)  # blobs whose bytes were compared with their names

    def check(self, now: Rows, blobs: Blobs, heard: Sequence[Exchange]) -> None:
        """What must hold at every moment."""
        _every_end_has_its_reason(now)
        _weights_are_shares(now)
        _parts_are_one_after_the_other(now)
        self._what_was_said_stands(now, heard)
        self._every_blob_is_there(now, blobs)

    def _what_was_said_stands(self, now: Rows, heard: Sequence[Exchange]) -> None:
        """A result is taken once and stays as it is; so does what a round published."""
        taken = [exchange.path for exchange in heard if exchange.result and exchange.status == 201]
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

    def _every_blob_is_there(self, now: Rows, blobs: Blobs) -> None:
        """Every blob that a row names, under the name of its bytes; but not those of rounds that were forgotten."""
        kept = {id for id, round in now["rounds"].items() if not round["forgotten"]}
        names = {row["adapter"] for row in now["rounds"].values()} | {row["digest"] for row in now["parts"].values()}
        names |= {row["digest"] for row in now["slices"].values() if str(row["round_id"]) in kept}
        for job in now["jobs"].values():
            needed = str(job["counted_in"] or job["round_id"]) in kept or job["state"] in (JobState.queued, JobState.leased)
            names |= {job["base"], job["slice"]} if needed else set()
        for name in names - {None}:
            assert blobs.exists(name), f"{name} is not there"
            if name not in self.whole:
                assert name == f"sha256:{hashlib.sha256(blobs.read(name)).hexdigest()}"
                self.whole.add(name)


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
