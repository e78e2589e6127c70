"""Work from the coordinator's side: handed out, drawn anew when it is lost, ended when its time is over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple, cast

from sqlalchemy import ColumnElement, CursorResult, Select, and_, func, insert, or_, select, update
from sqlalchemy.orm import Session

from coordinator import access, aggregation, cohort, events, portions, published
from coordinator.jobs import ACTIVE, UNSETTLED, lock, plan_of
from coordinator.tables import Client, Job, Round, Run
from protocol.messages import BlobRef
from protocol.plan import Plan
from protocol.states import ClientState, JobKind, JobState, RoundState, RunState
from protocol.views import RankView

GONE = (JobState.expired, JobState.released)
STANDING = (RunState.paused, RunState.failed)  # nothing is handed out, and the run may go on


def train(
    session: Session, run: Run, round: Round, plan: Plan, chosen: Sequence[Client], able: Sequence[Client], now: datetime
) -> list[str]:
    """Queue training jobs of a round for the chosen, at the ranks that the policy gives them; gives the clients to wake."""
    base = published.round_of(session, run.id, round.number - 1)
    assert base is not None, "a round opens only after the one before it was published"
    deadline = _deadline(plan, round, now)
    views = cohort.assign(session, run.id, plan, chosen, able, min(plan.times.job, (deadline - now).total_seconds()))
    starts = _starts(session, base, plan, round.number, chosen, views)
    return _queue(session, round, plan, JobKind.train, chosen, views, starts, deadline, now)


class _Start(NamedTuple):
    file: BlobRef
    directions: list[int] | None  # of the file, that are trained; all if none


def _starts(
    session: Session, base: Round, plan: Plan, number: int, chosen: Sequence[Client], views: Mapping[str, RankView]
) -> dict[str, _Start]:
    """What training in a round starts from, by client."""
    starts, slices = published.starts(session, base.id), published.slices(session, base.id)
    portion = aggregation.load(plan.strategy.name).portion
    begun = {}
    for client in chosen:
        view = views[client.id]
        if view.whole is False:
            begun[client.id] = _Start(slices[view.rank], None)
        else:
            begun[client.id] = _Start(starts[view.rank], portions.directions(portion, plan, view.rank, number, client.name))
    return begun


def _deadline(plan: Plan, round: Round, now: datetime) -> datetime:
    """When a job must have ended: with its round, or, where jobs outlive rounds, a job's time after it is picked up."""
    return round.closes_at if plan.buffer is None else now + timedelta(seconds=plan.times.no_progress + plan.times.job)


def _queue(
    session: Session,
    round: Round,
    plan: Plan,
    kind: JobKind,
    chosen: Sequence[Client],
    views: dict[str, RankView],
    starts: Mapping[str, _Start],
    deadline: datetime,
    now: datetime,
) -> list[str]:
    same = {"round_id": round.id, "kind": kind, "state": JobState.queued, "created_at": now, "deadline": deadline}
    part = "train" if kind is JobKind.train else "held_out"
    new = []
    for client in chosen:
        view, start = views[client.id], starts[client.id]
        own = {"id": access.new_id("job"), "client_id": client.id, "rank": view.rank, "rank_view": view.model_dump(mode="json")}
        handed = {"base": start.file.digest, "base_bytes": start.file.bytes, "directions": start.directions}
        known = {"known_rows": client.profile["datasets"].get(plan.data, {}).get(part, 0)}
        new.append(same | own | handed | known)
    if new:
        session.connection().execute(_NEW, new)  # there may be thousands; as objects they would take several times as long
    return [client.id for client in chosen]


_NEW = insert(Job)


def evaluate(session: Session, run: Run, round: Round, now: datetime, pace: float) -> list[str]:
    """Ask the clients to measure the adapter that the round published, where the plan wants it; gives the clients to wake.

    Each measures what it would train from next, or, where the plan names a rank, everybody the slice of that rank.
    """
    plan = plan_of(run)
    every = plan.evaluation.every
    if not every or (round.number % every and round.number != plan.rounds):
        return []
    able, _ = cohort.eligible(session, run.id, plan, JobKind.evaluate, now, pace)
    if plan.buffer is not None:  # whoever is still at work would measure, one after the other, all versions that it missed
        busy = at_work(session, run, round)
        able = [client for client in able if client.id not in busy]
    if plan.evaluation.rank is None:
        trainers, _ = cohort.eligible(session, run.id, plan, JobKind.train, now, pace)
        views = cohort.assign(session, run.id, plan, able, trainers or able, plan.times.job)
        starts = _starts(session, round, plan, round.number + 1, able, views)
    else:
        rank = plan.evaluation.rank
        ids = [client.id for client in able]
        views = dict.fromkeys(ids, RankView(rank=rank, reason="the plan's rank for evaluation"))
        starts = dict.fromkeys(ids, _Start(published.slices(session, round.id)[rank], None))
    deadline = now + timedelta(seconds=plan.times.round)
    return _queue(session, round, plan, JobKind.evaluate, able, views, starts, deadline, now)


def expire(session: Session, run: Run, now: datetime) -> None:
    """End the run's jobs whose times have run out, and those of clients that may not work any more.

    While the run stands still nobody can pick a job up, and none ends because nobody did.
    """
    plan, standing = plan_of(run), run.state in STANDING
    silent = now - timedelta(seconds=plan.times.no_progress)
    over = or_(
        Job.deadline <= now,
        Job.lease_until <= now,
        Job.progress_at <= silent,
        and_(Job.state == JobState.queued, Job.created_at <= silent),
    )
    due = (
        select(Job, Round, Client)
        .join(Round, Job.round_id == Round.id)
        .join(Client, Job.client_id == Client.id)
        .where(Round.run_id == run.id, Job.state.in_(ACTIVE))
        # Those for whom no reason below can hold are not even read: there may be thousands.
        .where(or_(Client.state != ClientState.active, and_(over, Job.state != JobState.queued) if standing else over))
        .order_by(Job.client_id, Job.id)
    )
    if session.execute(due.with_only_columns(Job.id).limit(1)).first() is None:
        return
    # All that this transaction may come to change, the rest when it closes the round: whoever takes a few first and others then may be
    # waited for by whom it waits for. A lease that is renewed at this moment has not ended.
    lock(session, Job.round_id.in_(select(Round.id).where(Round.run_id == run.id)), UNSETTLED)
    for job, round, client in session.execute(due.execution_options(populate_existing=True)):
        ended = _overdue(job, plan, client, now, standing)
        if ended is not None and end(session, Job.id == job.id, Job.epoch == job.epoch, state=ended[0], reason=ended[1], now=now):
            events.record(session, now, f"job-{ended[0]}", run=run.id, round=round.number, client=client.name, reason=ended[1])


def _overdue(job: Job, plan: Plan, client: Client, now: datetime, standing: bool) -> tuple[JobState, str] | None:
    silence = timedelta(seconds=plan.times.no_progress)
    if client.state != ClientState.active:
        return JobState.cancelled, f"the client is {client.state}"
    if standing and job.state == JobState.queued:
        return None
    if now >= job.deadline:
        return JobState.expired, "the job's deadline passed"
    if job.state == JobState.queued:
        return (JobState.released, "not picked up in time") if now - job.created_at >= silence else None
    if job.lease_until is not None and now >= job.lease_until:
        return JobState.expired, f"the lease was not renewed for {plan.times.lease:g} s"
    if job.progress_at is not None and now - job.progress_at >= silence:
        return JobState.expired, f"no progress for {plan.times.no_progress:g} s"
    return None


def give_time_back(session: Session, run: Run, since: datetime, now: datetime) -> None:
    """The time since a run stood still counts for nobody who waited: its open round and its queued jobs end as much later.

    What was in hand went on meanwhile, and so did its times.
    """
    open = select(Round).where(Round.run_id == run.id, Round.state == RoundState.open)
    for round in session.scalars(open.with_for_update(key_share=True)):
        round.closes_at += now - since
    queued = select(Job).join(Round, Job.round_id == Round.id).where(Round.run_id == run.id, Job.state == JobState.queued)
    for job in session.scalars(queued.order_by(Job.client_id, Job.id).with_for_update(of=Job, key_share=True)):
        stood = now - max(since, job.created_at)  # a merge that was under way may have been published, and to be measured, since
        job.created_at, job.deadline = job.created_at + stood, job.deadline + stood


def end(session: Session, *which: ColumnElement[bool], state: JobState, reason: str, now: datetime) -> int:
    """End the jobs of this kind that have not ended yet; gives their number."""
    lock(session, Job.state.in_(ACTIVE), *which)
    statement = update(Job).where(Job.state.in_(ACTIVE), *which).values(state=state, reason=reason, ended_at=now, lease_until=None)
    return cast(CursorResult[Any], session.execute(statement.execution_options(synchronize_session="fetch"))).rowcount


def refill(session: Session, run: Run, round: Round, now: datetime, pace: float) -> list[str]:
    """Draw anew for jobs that were lost, from clients that had no part yet; a lost client that is back takes its job up again."""
    plan = plan_of(run)
    if plan.buffer is None and _taken(session, round) >= plan.cohort.target:
        return []
    busy = at_work(session, run, round)
    if plan.buffer is None:
        answered = (Job.round_id == round.id, Job.kind == JobKind.train, Job.state == JobState.submitted)
        busy |= set(session.scalars(select(Job.client_id).where(*answered)))
    lacking = plan.cohort.target - len(busy)
    if lacking <= 0:
        return []
    jobs = training_jobs(session, round.id)
    able, _ = cohort.eligible(session, run.id, plan, JobKind.train, now, pace)
    had = busy | {job.client_id for job in jobs}
    fresh = cohort.draw(plan, round.number, round.attempt, len(jobs), [client for client in able if client.id not in had], lacking)
    woken = train(session, run, round, plan, fresh, able, now)
    present = {client.id: client for client in able}
    for job in jobs:
        client = present.get(job.client_id)
        if len(woken) < lacking and client is not None and job.state in GONE and _returned(job, client):
            job.state, job.reason, job.ended_at, job.created_at, job.deadline = (
                JobState.queued,
                None,
                None,
                now,
                _deadline(plan, round, now),
            )
            woken.append(client.id)
    return woken


def _taken(session: Session, round: Round) -> int:
    """How many of the round's training jobs are in work or in."""
    mine = (Job.round_id == round.id, Job.kind == JobKind.train, Job.state.in_((*ACTIVE, JobState.submitted)))
    return session.scalar(select(func.count()).where(*mine)) or 0


def _returned(job: Job, client: Client) -> bool:
    return job.refusal is None and job.ended_at is not None and client.last_seen is not None and client.last_seen > job.ended_at


def at_work(session: Session, run: Run, round: Round) -> set[str]:
    """The clients that have a training job of the round; with a buffer, of the run: a client has one at a time."""
    return set(session.scalars(_at_work(run, round)))


def anybody_at_work(session: Session, run: Run, round: Round) -> bool:
    """Whether `at_work` finds anybody; in a large fleet that is told sooner than who."""
    return session.scalar(_at_work(run, round).limit(1)) is not None


def _at_work(run: Run, round: Round) -> Select[str]:
    mine = Round.id == round.id if plan_of(run).buffer is None else Round.run_id == run.id
    return select(Job.client_id).join(Round, Job.round_id == Round.id).where(mine, Job.kind == JobKind.train, Job.state.in_(ACTIVE))


def take_over(session: Session, before: Round, round: Round) -> None:
    """Let a new attempt at a buffered round have what is in work, and what is in, of the one before it."""
    mine = (Job.round_id == before.id, Job.kind == JobKind.train, UNSETTLED)
    lock(session, *mine)
    session.execute(update(Job).where(*mine).values(round_id=round.id).execution_options(synchronize_session="fetch"))


def training_jobs(session: Session, round_id: int) -> list[Job]:
    """A round's training jobs, oldest first."""
    return list(session.scalars(select(Job).where(Job.round_id == round_id, Job.kind == JobKind.train).order_by(Job.created_at, Job.id)))
