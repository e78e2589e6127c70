"""What agents bring to the desk: the job goes on, its slice is stored, it is done. Each of them for many clients at once.

Refusals are given, not raised: what is refused to one is done for the others, and has written nothing. The jobs are read and
locked in one statement, in the order of their clients as everywhere, and changed in another, which names once more the job, the
client, the lease's epoch and the state that it must be in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol

from sqlalchemy import Update, bindparam, delete, select, update
from sqlalchemy.orm import Session

from coordinator import clients, events, jobs, sweeping
from coordinator.blobs import Blobs
from coordinator.jobs import FETCHES, Facts, Holder
from coordinator.tables import Client, Job, Round, Run, Upload
from protocol import errors
from protocol.errors import HLoRAError
from protocol.messages import BlobRef, Progress, Renewal, Result, ResultReceipt, Verdict
from protocol.states import JobKind, JobState, RunState

# Built once: to build a statement costs more than to carry it out.
_JOBS = (
    select(
        *(Job.id, Job.client_id, Job.kind, Job.state, Job.reason, Job.epoch, Job.deadline, Job.progress, Job.progress_at),
        *(Job.base_bytes, Job.slice, Job.result, Round.number, Round.run_id, Run.state.label("run_state"), Run.plan_digest),
        Client.name.label("client_name"),
    )
    .join(Round, Job.round_id == Round.id)
    .join(Run, Round.run_id == Run.id)
    .join(Client, Job.client_id == Client.id)
    .where(Job.id.in_(bindparam("ids", expanding=True)))
    .order_by(Job.client_id, Job.id)
    .with_for_update(of=Job, key_share=True)  # the same request sent twice at once is answered twice
)


def _change(*columns: str, **values: object) -> Update:
    """The change of a held job: these values, and these columns from what is given for each job."""
    table = Job.__table__
    mine = (table.c.id == bindparam("held_job"), table.c.client_id == bindparam("held_client"), table.c.epoch == bindparam("held_epoch"))
    given = {name: bindparam(f"new_{name}", type_=table.c[name].type) for name in columns}
    return update(Job).where(*mine, table.c.state == JobState.leased).values(**given, **values)


_RENEWED = _change("lease_until", "progress", "progress_at")
_STORED = _change("slice", "slice_bytes", "change_norm")
_ANSWERED = _change("state", "ended_at", "result", "fetched_bytes", reason=None, lease_until=None)


class Errand(Protocol):
    """Something that the holder of a job brings."""

    @property
    def holder(self) -> Holder: ...


Found = Mapping[str, Facts]


def _read(session: Session, brought: Iterable[Errand]) -> Found:
    """The jobs that these errands are about; until the transaction ends nobody else changes them."""
    ids = [each.holder.job for each in brought]
    return {row.id: row for row in session.connection().execute(_JOBS, {"ids": ids})} if ids else {}


def _write(session: Session, change: Update, values: Sequence[tuple[Holder, Mapping[str, object]]]) -> None:
    """Change jobs that are held. Raises StaleLease where one of them is held no more; then nothing may be committed."""
    if not values:
        return
    rows = [
        {"held_job": holder.job, "held_client": holder.client, "held_epoch": holder.epoch} | {f"new_{k}": v for k, v in new.items()}
        for holder, new in values
    ]
    if session.connection().execute(change, rows).rowcount != len(rows):
        raise errors.StaleLease("the job changed hands at this moment")


# --- the job goes on ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Renewing:
    """A lease that is to be prolonged, and how far the work is."""

    holder: Holder
    progress: Progress


def renew(session: Session, brought: Sequence[Renewing], now: datetime) -> list[Renewal | HLoRAError]:
    """Prolong leases. The time without progress runs on while phase and step stay the same.

    Refuses with NotFound, StaleLease, JobOver.
    """
    found = _read(session, brought)
    told = [jobs.refusal(found.get(each.holder.job), each.holder) for each in brought]
    going = [each for each, refusal in zip(brought, told, strict=True) if refusal is None]
    leases = {each.holder.job: jobs.known_plan(session, found[each.holder.job]).times.lease for each in going}
    _write(session, _RENEWED, [(e.holder, _prolonged(found[e.holder.job], e.progress, leases[e.holder.job], now)) for e in going])
    clients.all_seen(session, [each.holder.client for each in going], now)
    return [refusal or _renewal(found[each.holder.job], leases[each.holder.job], now) for each, refusal in zip(brought, told, strict=True)]


def _prolonged(job: Facts, progress: Progress, lease: float, now: datetime) -> dict[str, object]:
    before = job.progress or {}
    same = (before.get("phase"), before.get("step")) == (progress.phase, progress.step)
    at = job.progress_at if same else now
    return {"lease_until": now + timedelta(seconds=lease), "progress": progress.model_dump(mode="json"), "progress_at": at}


def _renewal(job: Facts, lease: float, now: datetime) -> Renewal:
    going = job.run_state in (RunState.running, RunState.paused)
    return Renewal(
        verdict=Verdict.proceed if going else Verdict.cancel,
        lease_seconds=lease,
        remaining_seconds=max(0.0, (job.deadline - now).total_seconds()),
    )


# --- its slice is stored -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A slice that was checked and is in the store."""

    holder: Holder
    blob: BlobRef
    norm: float  # of the change
    blobs: Blobs  # where it is


def keep(session: Session, brought: Sequence[Stored], _: datetime) -> list[BlobRef | HLoRAError]:
    """Let jobs name their slices; uploads in parts are over with that.

    Refuses with NotFound, StaleLease, JobOver; Unavailable, to put the blob again.
    """
    condemned = sweeping.condemned(session, [each.blob.digest for each in brought])
    lost = condemned.union(*(blobs.missing(named) for blobs, named in _named(brought).items()))
    found = _read(session, brought)
    told: list[BlobRef | HLoRAError] = []
    for each in brought:
        gone = each.blob.digest in lost
        refusal = sweeping.lost(each.blob.digest) if gone else jobs.refusal(found.get(each.holder.job), each.holder)
        told.append(refusal or each.blob)
    kept = [each for each, outcome in zip(brought, told, strict=True) if outcome is each.blob]
    new = [(e.holder, {"slice": e.blob.digest, "slice_bytes": e.blob.bytes, "change_norm": e.norm}) for e in kept]
    _write(session, _STORED, new)
    if kept:
        session.connection().execute(_PARTS_GONE, {"ids": [each.holder.job for each in kept]})
    return told


def _named(brought: Sequence[Stored]) -> dict[Blobs, set[str]]:
    found: dict[Blobs, set[str]] = defaultdict(set)
    for each in brought:
        found[each.blobs].add(each.blob.digest)
    return found


_PARTS_GONE = delete(Upload).where(Upload.job_id.in_(bindparam("ids", expanding=True)))


# --- it is done --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answering:
    """What a client says came of its job."""

    holder: Holder
    result: Result


@dataclass(frozen=True)
class Answered:
    """What it is told."""

    receipt: ResultReceipt
    new: bool  # or said before


def answer(session: Session, brought: Sequence[Answering], now: datetime) -> list[Answered | HLoRAError]:
    """Record results; the same one again is told what was told before.

    Refuses with NotFound, StaleLease, JobOver, DifferentResult, InvalidResult.
    """
    found = _read(session, brought)
    said = [each.result.model_dump(mode="json") for each in brought]
    told = [_told(found.get(each.holder.job), each, stored) for each, stored in zip(brought, said, strict=True)]
    new = [
        (each, found[each.holder.job], stored)
        for each, stored, outcome in zip(brought, said, told, strict=True)
        if isinstance(outcome, Answered) and outcome.new
    ]
    _write(session, _ANSWERED, [(each.holder, _ended(job, each.result, stored, now)) for each, job, stored in new])
    clients.all_seen(session, [each.holder.client for each, _, _ in new], now)
    events.record_all(session, now, [_event(job, each.result) for each, job, _ in new])
    return told


def _told(job: Facts | None, answering: Answering, stored: dict[str, Any]) -> Answered | HLoRAError:
    holder, result = answering.holder, answering.result
    if job is not None and job.client_id == holder.client and job.epoch == holder.epoch and job.result is not None:
        if job.result != stored:  # whatever became of the first one since: it was taken
            return errors.DifferentResult("this job was answered already, with another result; the first one stands")
        return Answered(ResultReceipt(job=job.id, state=JobState(job.state)), new=False)
    refusal = jobs.refusal(job, holder)
    if refusal is not None:
        return refusal
    assert job is not None, "where there is no job, that is the refusal"
    return _objection(job, result) or Answered(ResultReceipt(job=job.id, state=_after(job)), new=True)


def _objection(job: Facts, result: Result) -> HLoRAError | None:
    if job.kind == JobKind.evaluate:
        return None if result.slice is None else errors.InvalidResult("an evaluation's result names no slice")
    if job.slice is None:
        return errors.InvalidResult("no slice was uploaded for this job; upload it, then send the result")
    if result.slice != job.slice:
        return errors.InvalidResult(f"the result names slice {result.slice}; {job.slice} was uploaded", uploaded=job.slice)
    return None


def _after(job: Facts) -> JobState:
    return JobState.submitted if job.kind == JobKind.train else JobState.accepted


def _ended(job: Facts, result: Result, stored: dict[str, Any], now: datetime) -> dict[str, object]:
    fetched = min(result.usage.download_bytes, FETCHES * job.base_bytes)
    return {"state": _after(job), "ended_at": now, "result": stored, "fetched_bytes": fetched}


def _event(job: Facts, result: Result) -> events.Change:
    facts = {"work": job.kind, "examples": result.examples}
    return events.Change(f"job-{_after(job)}", run=job.run_id, round=job.number, client=job.client_name, facts=facts)
