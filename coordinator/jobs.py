"""The life of a job, seen from the client that holds it: renewed, given back, answered.

    queued → leased → submitted → accepted
       │        ├──→ expired (lease lost)       ──┐ taken up again by the same client,
       └────────┴──→ released (given back)      ──┘ if nobody replaced it and the round is still open
                └──→ rejected · cancelled

Every write of a client is one UPDATE that names the job, the client, the lease's epoch and the state it must be in, so
that no two holders of one job can both succeed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, cast

from sqlalchemy import ColumnElement, CursorResult, and_, select, update
from sqlalchemy.orm import Session

from coordinator import aggregation, clients, events, quarantine, sweeping
from coordinator.blobs import Blobs
from coordinator.tables import Job, Round, Run
from protocol import errors, messages
from protocol.checks import Expected
from protocol.messages import Progress, Renewal, Result, Verdict
from protocol.plan import Plan
from protocol.slices import body_length, largest_length
from protocol.states import JobKind, JobState, RunState

ACTIVE = (JobState.queued, JobState.leased)
FETCHES = 100  # a client that says it fetched its slice more often is not believed: views add these bytes up


@lru_cache(maxsize=64)
def _parsed(text: str) -> Plan:
    return Plan.model_validate_json(text)


def plan_of(run: Run) -> Plan:
    """A run's plan; plans never change, so parsing one again is saved."""
    return _parsed(json.dumps(run.plan))


def _own(session: Session, client_id: str, job_id: str) -> Job:
    job = session.get(Job, job_id)
    if job is None or job.client_id != client_id:
        raise errors.NotFound(f"there is no job {job_id} for this client")
    return job


def _mine(session: Session, client_id: str, job_id: str) -> Job:
    """The client's own job, until the transaction ends nobody else's: the same request sent twice at once is answered twice."""
    session.get(Job, job_id, with_for_update={"key_share": True}, populate_existing=True)
    return _own(session, client_id, job_id)


def _held(session: Session, client_id: str, job_id: str, epoch: int) -> Job:
    """The job, if the client holds it at that epoch. Raises NotFound, StaleLease, JobOver."""
    job = _own(session, client_id, job_id)
    if job.epoch != epoch:
        raise errors.StaleLease(
            f"the lease is at epoch {job.epoch}, yours was {epoch}: the job was given out again", epoch=job.epoch, came=epoch
        )
    if job.state != JobState.leased:
        why = f": {job.reason}" if job.reason else ""
        raise errors.JobOver(f"the job is {job.state}{why}; nothing more counts for it: drop it and ask for the next one", state=job.state)
    return job


def held(client_id: str, job_id: str, epoch: int) -> ColumnElement[bool]:
    """The condition of every write to a job: that the client holds it, at that epoch."""
    return and_(Job.id == job_id, Job.client_id == client_id, Job.epoch == epoch, Job.state == JobState.leased)


def _advance(session: Session, client_id: str, job_id: str, epoch: int, **values: object) -> None:
    """Change a held job in one statement; whoever lost the lease meanwhile gets the reason. Raises NotFound, StaleLease, JobOver."""
    change = update(Job).where(held(client_id, job_id, epoch)).values(**values)
    # What is known of other rows stays known: reading all of them again would cost more than the change.
    changed = cast(CursorResult[Any], session.execute(change.execution_options(synchronize_session="evaluate")))
    if changed.rowcount == 0:
        session.expire_all()
        _held(session, client_id, job_id, epoch)
        raise errors.StaleLease("the job changed hands at this moment")


def renew(session: Session, client_id: str, job_id: str, progress: Progress, now: datetime) -> Renewal:
    """Prolong the lease. The time without progress runs on while phase and step stay the same.

    Raises NotFound, StaleLease, JobOver.
    """
    job = _held(session, client_id, job_id, progress.epoch)
    _, run = _context(session, job)
    plan = plan_of(run)
    until = now + timedelta(seconds=plan.times.lease)
    values: dict[str, object] = {"lease_until": until, "progress": progress.model_dump(mode="json")}
    before = job.progress or {}
    if (before.get("phase"), before.get("step")) != (progress.phase, progress.step):
        values["progress_at"] = now
    _advance(session, client_id, job_id, progress.epoch, **values)
    clients.seen(session, client_id, now)
    going = run.state in (RunState.running, RunState.paused)
    return Renewal(
        verdict=Verdict.proceed if going else Verdict.cancel,
        lease_seconds=plan.times.lease,
        remaining_seconds=max(0.0, (job.deadline - now).total_seconds()),
    )


def release(session: Session, client_id: str, job_id: str, given: messages.GiveBack, now: datetime) -> None:
    """Take a job back from a client that cannot or will not do it. Raises NotFound, StaleLease, JobOver; again is once."""
    job = _mine(session, client_id, job_id)
    if job.state == JobState.released and job.epoch == given.epoch:
        return
    values = {"state": JobState.released, "reason": given.reason, "refusal": given.problem, "ended_at": now, "lease_until": None}
    _advance(session, client_id, job_id, given.epoch, **values)
    round, run = _context(session, job)
    name = clients.get(session, client_id).name
    events.record(session, now, "job-released", run=run.id, round=round.number, client=name, reason=given.reason, refusal=given.problem)


@dataclass(frozen=True)
class Upload:
    """What a slice that is about to come must be."""

    expected: Expected
    largest: int  # bytes
    largest_head: int  # bytes before the first number
    bound: float | None  # of the change's norm; beyond it the slice is rejected


def training(session: Session, client_id: str, job_id: str, epoch: int) -> Job:
    """The job, if the client holds it at that epoch and it takes a slice. Raises NotFound, StaleLease, JobOver, Conflict."""
    job = _held(session, client_id, job_id, epoch)
    if job.kind != JobKind.train:
        raise errors.Conflict("an evaluation job takes no slice")
    return job


def upload(session: Session, client_id: str, job_id: str, epoch: int) -> Upload:
    """What the job's slice must be, known before its first byte comes. Raises NotFound, StaleLease, JobOver, Conflict."""
    job = training(session, client_id, job_id, epoch)
    round, run = _context(session, job)
    plan = plan_of(run)
    assert plan.layout is not None, "a plan without layout is refused when the run is made"
    sides = aggregation.load(plan.strategy.name).sides
    expected = Expected(
        layout=plan.layout,
        rank=job.rank,
        scale=plan.adapter.scale(job.rank),
        dtype=plan.upload,
        base=job.base,
        round=round.number,
        directions=None if job.directions is None else tuple(job.directions),
        sides=sides,
        wire=plan.wire,
    )
    bound = plan.norm.bound if plan.norm is not None and plan.norm.action == "reject" else None
    largest = largest_length(plan.layout, job.rank, plan.upload, sides)
    largest_head = largest - body_length(plan.layout, job.rank, plan.upload, sides)
    return Upload(expected=expected, largest=largest, largest_head=largest_head, bound=bound)


def uploaded(session: Session, blobs: Blobs, client_id: str, job_id: str, epoch: int, blob: messages.BlobRef, norm: float) -> None:
    """Note that the job's slice is stored and sound. Raises NotFound, StaleLease, JobOver; Unavailable, to put the blob again."""
    sweeping.hold(session, blobs, blob.digest)
    _advance(session, client_id, job_id, epoch, slice=blob.digest, slice_bytes=blob.bytes, change_norm=norm)


def reject(
    session: Session,
    client_id: str,
    job_id: str,
    epoch: int,
    error: errors.InvalidSlice,
    slice: messages.BlobRef | None,
    limit: int,
    now: datetime,
) -> None:
    """End a job whose slice cannot count, set it apart, and count it against the client. Raises NotFound, StaleLease, JobOver."""
    reason = str(error)
    _advance(session, client_id, job_id, epoch, state=JobState.rejected, reason=reason, ended_at=now, lease_until=None)
    job = _own(session, client_id, job_id)
    round, run = _context(session, job)
    quarantine.keep(session, job, error.slug(), reason, slice, now)
    events.record(session, now, "job-rejected", run=run.id, round=round.number, client=clients.get(session, client_id).name, reason=reason)
    clients.count_rejection(session, client_id, limit, reason, now)


def answer(session: Session, client_id: str, job_id: str, result: Result, now: datetime) -> tuple[messages.ResultReceipt, bool]:
    """Record a job's result; gives the receipt, and whether it is new.

    Raises NotFound, StaleLease, JobOver, DifferentResult, InvalidResult.
    """
    job = _mine(session, client_id, job_id)
    stored = result.model_dump(mode="json")
    if job.result is not None and job.epoch == result.epoch:  # whatever became of it since: it was taken
        if job.result != stored:
            raise errors.DifferentResult("this job was answered already, with another result; the first one stands")
        return messages.ResultReceipt(job=job.id, state=JobState(job.state)), False
    job = _held(session, client_id, job_id, result.epoch)
    _check_result(job, result)
    round, run = _context(session, job)
    state = JobState.submitted if job.kind == JobKind.train else JobState.accepted
    ended: dict[str, object] = {"state": state, "reason": None, "ended_at": now, "lease_until": None}
    fetched = min(result.usage.download_bytes, FETCHES * job.base_bytes)
    _advance(session, client_id, job_id, result.epoch, **ended, result=stored, fetched_bytes=fetched)
    clients.seen(session, client_id, now)
    name = clients.get(session, client_id).name
    events.record(session, now, f"job-{state}", run=run.id, round=round.number, client=name, work=job.kind, examples=result.examples)
    return messages.ResultReceipt(job=job_id, state=state), True


def _check_result(job: Job, result: Result) -> None:
    if job.kind == JobKind.evaluate and result.slice is not None:
        raise errors.InvalidResult("an evaluation's result names no slice")
    if job.kind == JobKind.train and job.slice is None:
        raise errors.InvalidResult("no slice was uploaded for this job; upload it, then send the result")
    if job.kind == JobKind.train and result.slice != job.slice:
        raise errors.InvalidResult(f"the result names slice {result.slice}; {job.slice} was uploaded", uploaded=job.slice)


def _context(session: Session, job: Job) -> tuple[Round, Run]:
    round, run = session.execute(select(Round, Run).join(Run, Round.run_id == Run.id).where(Round.id == job.round_id)).one()
    return round, run


def may_read(session: Session, client_id: str, digest: str) -> bool:
    """Whether a blob is the slice of one of the client's unfinished jobs."""
    query = select(Job.id).where(Job.client_id == client_id, Job.base == digest, Job.state == JobState.leased).limit(1)
    return session.scalar(query) is not None
