"""Finished work, on disk until the coordinator has it: a trained slice, and the result that names it. Never rows.

outbox/<job>/slice.safetensors     what was trained; none for an evaluation
outbox/<job>/entry.json            what was asked, what came of it, and how far the delivery is

The slice is written before the entry that names it, and removed after it, so a crash leaves no entry without its slice.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import structlog
from pydantic import ValidationError

from agent import durable, rounding
from agent.training import Outcome
from protocol import crash
from protocol.compact import trained_parts
from protocol.crash import Point
from protocol.messages import BlobRef, Job, Metric, Result, Usage
from protocol.slices import Slice
from protocol.strict import Strict

log = structlog.get_logger("agent")
ENTRY, SLICE = "entry.json", "slice.safetensors"
KEPT = 4  # jobs, the newest; of those that were given to others nobody tells this agent when they are over


class Entry(Strict):
    """One finished job."""

    job: Job  # as it was handed out last
    result: Result
    bytes: int = 0  # of the slice
    sent: bool = False  # the coordinator has said that it has the slice

    @property
    def slice(self) -> BlobRef | None:
        """The trained slice's name and length."""
        return None if self.result.slice is None else BlobRef(digest=self.result.slice, bytes=self.bytes)

    def under(self, job: Job) -> Entry:
        """The same work, under the lease with which the job was handed out again."""
        result = self.result.model_copy(update={"epoch": job.lease.epoch})
        return self.model_copy(update={"job": job, "result": result, "sent": False})

    def after_upload(self, seconds: float) -> Entry:
        """The slice is there. From now on the result stays as it is, so that a repetition is the same."""
        usage = self.result.usage.model_copy(update={"upload_bytes": self.bytes, "upload_seconds": seconds})
        return self.model_copy(update={"result": self.result.model_copy(update={"usage": usage}), "sent": True})


@dataclass(frozen=True)
class Outbox:
    """The entries of one agent."""

    folder: Path

    def store(self, job: Job, start: Slice, outcome: Outcome, usage: Usage) -> Entry:
        """Keep what came of a job and the slice that it started from, durably. Raises InsufficientStorage, and leaves nothing then."""
        place = durable.folder(self.folder, job.id)
        try:
            ref = None if outcome.slice is None else _write(place / SLICE, outcome.slice, start, job)
            digest, count = (None, 0) if ref is None else (ref.digest, ref.bytes)
            metrics = outcome.metrics | _rounding(outcome, start, job)
            result = Result(epoch=job.lease.epoch, slice=digest, examples=outcome.examples, metrics=metrics, usage=usage)
            entry = self.save(Entry(job=job, result=result, bytes=count))
            durable.settle(place)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        crash.reached(Point.agent_work_kept)
        keep_newest(self.folder)
        return entry

    def save(self, entry: Entry) -> Entry:
        """Write down how far an entry is. Should the power fail at this moment, the coordinator says it again."""
        durable.write(durable.folder(self.folder, entry.job.id) / ENTRY, [entry.model_dump_json().encode()])
        return entry

    def file(self, entry: Entry) -> Path:
        """Where an entry's slice lies."""
        return durable.folder(self.folder, entry.job.id) / SLICE

    def sound(self, entry: Entry) -> bool:
        """Whether an entry's slice is as it was written."""
        return entry.slice is None or durable.holds(self.file(entry), entry.slice)

    def entries(self) -> list[Entry]:
        """What waits to be delivered, oldest first. What was damaged is removed, and logged."""
        names = [place.name for place in _oldest_first(self.folder)]
        return [entry for name in names if (entry := self._read(name)) is not None]

    def find(self, job: Job) -> Entry | None:
        """What was done already of a job that is handed out again and asks for the same."""
        entry = self._read(durable.folder(self.folder, job.id).name)
        if entry is None or _asked(entry.job) == _asked(job):
            return entry
        self.remove(job.id, "the job starts from another slice now, or trains another part of it")
        return None

    def remove(self, job: str, why: str) -> None:
        """Forget an entry, if there is one."""
        place = durable.folder(self.folder, job)
        if place.exists():
            log.info("outbox-removed", entry=job, why=why)
            (place / ENTRY).unlink(missing_ok=True)
            shutil.rmtree(place, ignore_errors=True)

    def _read(self, job: str) -> Entry | None:
        try:
            entry = Entry.model_validate_json((durable.folder(self.folder, job) / ENTRY).read_bytes())
        except FileNotFoundError:
            self.remove(job, "it was not finished")
            return None
        except ValidationError as error:
            self.remove(job, f"its entry cannot be read: {error.error_count()} faults; the job is done anew if it is handed out again")
            return None
        if durable.folder(self.folder, entry.job.id).name == job and self.sound(entry):
            return entry
        self.remove(job, "its slice was damaged; the job is done anew if it is handed out again")
        return None


def _asked(job: Job) -> tuple[object, ...]:
    return job.id, job.kind, job.slice, job.directions, job.sides


def _write(file: Path, slice: Slice, start: Slice, job: Job) -> BlobRef:
    """Write a slice tensor by tensor; gives its name."""
    seen, count = hashlib.sha256(), 0
    with durable.writing(file) as stream:
        for part in trained_parts(slice, start, job.trained, job.upload, directions=job.directions, sides=job.sides):
            seen.update(part)
            count += stream.write(part)
    return BlobRef(digest=f"sha256:{seen.hexdigest()}", bytes=count)


def _rounding(outcome: Outcome, start: Slice, job: Job) -> dict[str, Metric]:
    """The share of the change by which the slice was rounded on its way, where it was."""
    found = None if outcome.slice is None else rounding.share(outcome.slice, start, job)
    return {} if found is None else {"rounding": Metric(value=found, weight=outcome.examples)}


def _oldest_first(folder: Path) -> list[Path]:
    places = folder.iterdir() if folder.is_dir() else ()
    return sorted((p for p in places if p.is_dir() and durable.PLAIN.fullmatch(p.name)), key=lambda p: (p.stat().st_mtime, p.name))


def keep_newest(folder: Path) -> None:
    """Remove the folders of all but the newest jobs."""
    for place in _oldest_first(folder)[:-KEPT]:
        log.info("old-work-removed", entry=place.name, folder=folder.name)
        shutil.rmtree(place, ignore_errors=True)
