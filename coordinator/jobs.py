"""The life of a job, seen from the client that holds it; what clients say all the time, many of them at once, is next door.

    queued → leased → submitted → accepted
       │        ├──→ expired (lease lost)       ──┐ taken up again by the same client,
       └────────┴──→ released (given back)      ──┘ if nobody replaced it and the round is still open
                └──→ rejected · cancelled

Every write of a client is one UPDATE that names the job, the client, the lease's epoch and the state it must be in, so
that no two holders of one job can both succeed.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any, cast

from sqlalchemy import ColumnElement, CursorResult, Row, and_, bindparam, or_, select, update
from sqlalchemy.orm import Session

from coordinator import aggregation, clients, events, quarantine
from coordinator.tables import Job, Round, Run
from protocol import errors, messages
from protocol.checks import Expected
from protocol.contents import body_length, largest_length
from protocol.plan import Plan
from protocol.states import JobKind, JobState

ACTIVE = (JobState.queued, JobState.leased)
Facts = Row[*tuple[Any, ...]]  # what was read of a job and its surroundings, by the names of the columns
PLANS = 64  # kept when they were parsed
# Jobs that may still change: they are worked on, or wait to be merged.
UNSETTLED = or_(Job.state.in_(ACTIVE), and_(Job.state == JobState.submitted, Job.counted_in.is_(None)))
FETCHES = 100  # a client that says it fetched its slice more often is not believed: views add these bytes up


@dataclass(frozen=True)
class Holder:
    """Who holds which job, at which epoch of its lease."""

    client: str
    job: str
    epoch: int


@lru_cache(maxsize=PLANS)
def _parsed(text: str) -> Plan:
    return Plan.model_validate_json(text)


def plan_of(run: Run) -> Plan:
    """A run's plan; plans never change, so parsing one again is saved."""
    return _parsed(json.dumps(run.plan))


def known_plan(session: Session, job: Facts) -> Plan:
    """The plan of a row's run, by the digest that the row names; it is read only where nobody has asked for it lately."""
    found = _plans.get(job.plan_digest)
    if found is None:
        found = Plan.model_validate(session.connection().execute(_PLAN, {"run": job.run_id}).scalar_one())
        if len(_plans) >= PLANS:
            _plans.clear()
        _plans[job.plan_digest] = found
    return found


_PLAN = select(Run.plan).where(Run.id == bindparam("run"))
_plans: dict[str, Plan] = {}


def refusal(job: Job | Facts | None, holder: Holder) -> errors.HLoRAError | None:
    """Why this client does not hold that job at that epoch: NotFound, StaleLease, JobOver; none where it does."""
    if job is None or job.client_id != holder.client:
        return errors.NotFound(f"there is no job {holder.job} for this client")
    if job.epoch != holder.epoch:
        return errors.StaleLease(
            f"the lease is at epoch {job.epoch}, yours was {holder.epoch}: the job was given out again", epoch=job.epoch, came=holder.epoch
        )
    if job.state != JobState.leased:
        why = f": {job.reason}" if job.reason else ""
        return errors.JobOver(f"the job is {job.state}{why}; nothing more counts for it: drop it and ask for the next one", state=job.state)
    return None


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
    refused = refusal(job, Holder(client_id, job_id, epoch))
    if refused is not None:
        raise refused
    return job


def held(client_id: str, job_id: str, epoch: int) -> ColumnElement[bool]:
    """The condition of every write to a job: that the client holds it, at that epoch."""
    return and_(Job.id == job_id, Job.client_id == client_id, Job.epoch == epoch, Job.state == JobState.leased)


def lock(session: Session, *which: ColumnElement[bool]) -> None:
    """Take these jobs until the transaction ends, in the order of clients and jobs as everywhere; then they may be changed in any order."""
    if session.get_bind().dialect.name == "sqlite":  # whose writers come one after the other
        return
    session.execute(select(Job.id).where(*which).order_by(Job.client_id, Job.id).with_for_update(key_share=True)).all()


def _advance(session: Session, client_id: str, job_id: str, epoch: int, **values: object) -> None:
    """Change a held job in one statement; whoever lost the lease meanwhile gets the reason. Raises NotFound, StaleLease, JobOver."""
    change = update(Job).where(held(client_id, job_id, epoch)).values(**values)
    # What is known of other rows stays known: reading all of them again would cost more than the change.
    changed = cast(CursorResult[Any], session.execute(change.execution_options(synchronize_session="evaluate")))
    if changed.rowcount == 0:
        session.expire_all()
        _held(session, client_id, job_id, epoch)
        raise errors.StaleLease("the job changed hands at this moment")


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


_TRAINING = (
    select(
        *(
            Job.id,
            Job.client_id,
            Job.kind,
            Job.state,
            Job.reason,
            Job.epoch,
            Job.rank,
            Job.base,
            Job.directions,
            Job.slice,
            Job.slice_bytes,
        ),
        *(Round.number, Round.run_id, Run.plan_digest),
    )
    .join(Round, Job.round_id == Round.id)
    .join(Run, Round.run_id == Run.id)
    .where(Job.id.in_(bindparam("jobs", expanding=True)))
)


@dataclass(frozen=True)
class Planned:
    """A job, as it was looked up for its slice, and its plan."""

    job: Facts
    plan: Plan


def at_hand(session: Session, ids: Collection[str]) -> dict[str, Planned]:
    """Those of the jobs whose plans need not be read, whoever holds them, in one look."""
    rows = session.connection().execute(_TRAINING, {"jobs": list(ids)}).all() if ids else ()
    return {row.id: Planned(row, plan) for row in rows if (plan := _plans.get(row.plan_digest)) is not None}


def training(session: Session, holder: Holder) -> Facts:
    """The job, if the client holds it at that epoch and it takes a slice. Raises NotFound, StaleLease, JobOver, Conflict."""
    return _taking(session.connection().execute(_TRAINING, {"jobs": [holder.job]}).first(), holder)


def _taking(job: Facts | None, holder: Holder) -> Facts:
    refused = refusal(job, holder)
    if refused is not None:
        raise refused
    assert job is not None, "where there is no job, that is the refusal"
    if job.kind != JobKind.train:
        raise errors.Conflict("an evaluation job takes no slice")
    return job


def upload(session: Session, holder: Holder) -> Upload:
    """What the job's slice must be, known before its first byte comes. Raises NotFound, StaleLease, JobOver, Conflict."""
    job = training(session, holder)
    return wanted(Planned(job, known_plan(session, job)), holder)


def wanted(found: Planned, holder: Holder) -> Upload:
    """The same of a job that was looked up just now."""
    job, plan = _taking(found.job, holder), found.plan
    assert plan.layout is not None, "a plan without layout is refused when the run is made"
    expected = Expected(
        layout=plan.adapter.trained(plan.layout),
        rank=job.rank,
        scale=plan.adapter.scale(job.rank),
        dtype=plan.upload,
        base=job.base,
        round=job.number,
        directions=None if job.directions is None else tuple(job.directions),
        sides=aggregation.load(plan.strategy.name).sides,
        wire=plan.wire,
    )
    bound = plan.norm.bound if plan.norm is not None and plan.norm.action == "reject" else None
    largest, largest_head = lengths(plan, job)
    return Upload(expected=expected, largest=largest, largest_head=largest_head, bound=bound)


def lengths(plan: Plan, job: Facts) -> tuple[int, int]:
    """Bytes that the job's slice may have, and those of them before the first number."""
    return _lengths(_Kind(job.plan_digest, job.rank, plan))


@dataclass(frozen=True)
class _Kind:
    """The slices of one rank of one plan."""

    digest: str  # of the plan
    rank: int
    plan: Plan = field(compare=False)


@lru_cache(maxsize=256)
def _lengths(kind: _Kind) -> tuple[int, int]:
    plan = kind.plan
    assert plan.layout is not None, "a plan without layout is refused when the run is made"
    layout, sides = plan.adapter.trained(plan.layout), aggregation.load(plan.strategy.name).sides
    largest = largest_length(layout, kind.rank, plan.upload, sides)
    return largest, largest - body_length(layout, kind.rank, plan.upload, sides)


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


def _context(session: Session, job: Job) -> tuple[Round, Run]:
    round, run = session.execute(select(Round, Run).join(Run, Round.run_id == Run.id).where(Round.id == job.round_id)).one()
    return round, run


def may_read(session: Session, client_id: str, digest: str) -> bool:
    """Whether a blob is the slice of one of the client's unfinished jobs."""
    query = select(Job.id).where(Job.client_id == client_id, Job.base == digest, Job.state == JobState.leased).limit(1)
    return session.scalar(query) is not None
