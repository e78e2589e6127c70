"""The life of a round: opened, filled, closed or abandoned, claimed for merging, published.

    open → merging → published
        ↘ abandoned (too few contributions at the deadline)

Round 0 publishes the untrained adapter; it begins in merging. Every change of state is compare-and-set, so that it
happens once whoever tries it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, cast

from sqlalchemy import ColumnElement, CursorResult, select, update
from sqlalchemy.orm import Session

from coordinator import access, clients, cohort, events
from coordinator.jobs import ACTIVE, plan_of
from coordinator.tables import Client, Job, PublishedSlice, Round, Run
from protocol.messages import BlobRef, ClientState, JobKind, JobState, RankView, RoundState, RunState
from protocol.plan import Plan

GONE = (JobState.expired, JobState.released)


def begin(session: Session, run: Run, now: datetime) -> None:
    """Round 0: nothing is trained, the first adapter is made and published."""
    session.add(Round(run_id=run.id, number=0, attempt=1, state=RoundState.merging, opened_at=now, closes_at=now))


def current(session: Session, run_id: str) -> Round | None:
    """The newest attempt at the newest round."""
    return session.scalar(select(Round).where(Round.run_id == run_id).order_by(Round.number.desc(), Round.attempt.desc()).limit(1))


def published(session: Session, run_id: str, number: int | None = None) -> Round | None:
    """The published attempt at a round; by default of the newest published round."""
    query = select(Round).where(Round.run_id == run_id, Round.state == RoundState.published)
    if number is not None:
        query = query.where(Round.number == number)
    return session.scalar(query.order_by(Round.number.desc()).limit(1))


def slices(session: Session, round_id: int) -> dict[int, BlobRef]:
    """The slices that a round published, by rank."""
    rows = session.scalars(select(PublishedSlice).where(PublishedSlice.round_id == round_id).order_by(PublishedSlice.rank))
    return {row.rank: BlobRef(digest=row.digest, bytes=row.bytes) for row in rows}


# --- opening and filling -----------------------------------------------------------------------------------------------


def open_next(session: Session, run: Run, last: Round, now: datetime, pace: float) -> list[str]:
    """Open the round after `last`, or another attempt at it; gives the clients to wake.

    Where too few clients are able, the run waits, says for whom, and pauses when it has waited a round's time. Before
    the first round it waits for the whole target: machines that were started together do not come together.
    """
    plan = plan_of(run)
    able, reasons = cohort.eligible(session, run.id, plan, JobKind.train, now, pace)
    number = last.number + 1 if last.state == RoundState.published else last.number
    waited = timedelta(0) if run.waiting_since is None else now - run.waiting_since
    patient = number == 1 and waited < timedelta(seconds=plan.times.lease)
    if len(able) < (plan.cohort.target if patient else plan.cohort.quorum):
        _wait(session, run, plan, able, reasons, waited, now)
        return []
    run.waiting_since, run.reason = None, None
    attempt = last.attempt + 1 if last.number == number else 1
    closes = now + timedelta(seconds=plan.times.round)
    round = Round(run_id=run.id, number=number, attempt=attempt, state=RoundState.open, opened_at=now, closes_at=closes)
    session.add(round)
    session.flush()
    events.record(session, now, "round-opened", run=run.id, round=number, attempt=attempt)
    wanted = math.ceil(plan.cohort.target * plan.cohort.over_selection)
    measuring = evaluate(session, run, last, now, pace) if (number, attempt) == (1, 1) else []
    return measuring + _hand_out(session, run, round, plan, cohort.draw(plan, number, attempt, 0, able, wanted), able, now)


def _wait(
    session: Session, run: Run, plan: Plan, able: Sequence[Client], reasons: dict[str, str], waited: timedelta, now: datetime
) -> None:
    run.waiting_since = run.waiting_since or now
    shown = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:5])
    more = f"; and {len(reasons) - 5} more" if len(reasons) > 5 else ""
    run.reason = f"waits for clients: {len(able)} able of a target of {plan.cohort.target}, quorum {plan.cohort.quorum}" + (
        f" ({shown}{more})" if reasons else ""
    )
    if waited >= timedelta(seconds=plan.times.round):
        pause(session, run, f"{run.reason}; gave up after {plan.times.round:g} s", now)


def pause(session: Session, run: Run, reason: str, now: datetime) -> None:
    """Stop handing out work until an operator resumes the run."""
    run.state, run.reason, run.waiting_since = RunState.paused, reason, None
    events.record(session, now, "run-paused", run=run.id, reason=reason)


def _hand_out(
    session: Session, run: Run, round: Round, plan: Plan, chosen: Sequence[Client], able: Sequence[Client], now: datetime
) -> list[str]:
    base = published(session, run.id, round.number - 1)
    assert base is not None, "a round opens only after the one before it was published"
    views = cohort.assign(session, run.id, plan, chosen, able)
    return queue(session, round, JobKind.train, chosen, views, slices(session, base.id), round.closes_at, now)


def queue(
    session: Session,
    round: Round,
    kind: JobKind,
    chosen: Sequence[Client],
    views: dict[str, RankView],
    handed: dict[int, BlobRef],
    deadline: datetime,
    now: datetime,
) -> list[str]:
    for client in chosen:
        view = views[client.id]
        slice = handed[view.rank]
        session.add(
            Job(
                id=access.new_id("job"),
                round_id=round.id,
                client_id=client.id,
                kind=kind,
                state=JobState.queued,
                rank=view.rank,
                rank_view=view.model_dump(mode="json"),
                base=slice.digest,
                base_bytes=slice.bytes,
                created_at=now,
                deadline=deadline,
            )
        )
    return [client.id for client in chosen]


def evaluate(session: Session, run: Run, round: Round, now: datetime, pace: float) -> list[str]:
    """Ask the clients to measure the adapter that the round published, where the plan wants it; gives the clients to wake."""
    plan = plan_of(run)
    every = plan.evaluation.every
    if not every or (round.number % every and round.number != plan.rounds):
        return []
    able, _ = cohort.eligible(session, run.id, plan, JobKind.evaluate, now, pace)
    trainers, _ = cohort.eligible(session, run.id, plan, JobKind.train, now, pace)
    views = cohort.assign(session, run.id, plan, able, trainers or able)
    if plan.evaluation.rank is not None:
        views = {id: RankView(rank=plan.evaluation.rank, reason="the plan's rank for evaluation") for id in views}
    deadline = now + timedelta(seconds=plan.times.round)
    return queue(session, round, JobKind.evaluate, able, views, slices(session, round.id), deadline, now)


def expire(session: Session, now: datetime) -> None:
    """End the jobs whose times have run out, and those of clients that may not work any more."""
    rows = session.execute(
        select(Job, Round, Run, Client)
        .join(Round, Job.round_id == Round.id)
        .join(Run, Round.run_id == Run.id)
        .join(Client, Job.client_id == Client.id)
        .where(Job.state.in_(ACTIVE))
    )
    for job, round, run, client in rows:
        ended = _overdue(job, plan_of(run), client, now)
        if ended is not None and _end(session, Job.id == job.id, Job.epoch == job.epoch, state=ended[0], reason=ended[1], now=now):
            events.record(session, now, f"job-{ended[0]}", run=run.id, round=round.number, client=client.name, reason=ended[1])


def _overdue(job: Job, plan: Plan, client: Client, now: datetime) -> tuple[JobState, str] | None:
    silence = timedelta(seconds=plan.times.no_progress)
    if client.state != ClientState.active:
        return JobState.cancelled, f"the client is {client.state}"
    if now >= job.deadline:
        return JobState.expired, "the job's deadline passed"
    if job.state == JobState.queued:
        return (JobState.released, "not picked up in time") if now - job.created_at >= silence else None
    if job.lease_until is not None and now >= job.lease_until:
        return JobState.expired, f"the lease was not renewed for {plan.times.lease:g} s"
    if job.progress_at is not None and now - job.progress_at >= silence:
        return JobState.expired, f"no progress for {plan.times.no_progress:g} s"
    return None


def _end(session: Session, *which: ColumnElement[bool], state: JobState, reason: str, now: datetime) -> int:
    statement = update(Job).where(Job.state.in_(ACTIVE), *which).values(state=state, reason=reason, ended_at=now, lease_until=None)
    return cast(CursorResult[Any], session.execute(statement.execution_options(synchronize_session="fetch"))).rowcount


def refill(session: Session, run: Run, round: Round, now: datetime, pace: float) -> list[str]:
    """Draw anew for jobs that were lost, from clients that had no part yet; a lost client that is back takes its job up again."""
    plan = plan_of(run)
    jobs = training_jobs(session, round.id)
    lacking = plan.cohort.target - sum(job.state in (*ACTIVE, JobState.submitted) for job in jobs)
    if lacking <= 0:
        return []
    able, _ = cohort.eligible(session, run.id, plan, JobKind.train, now, pace)
    had = {job.client_id for job in jobs}
    fresh = cohort.draw(plan, round.number, round.attempt, len(jobs), [client for client in able if client.id not in had], lacking)
    woken = _hand_out(session, run, round, plan, fresh, able, now)
    present = {client.id: client for client in able}
    for job in jobs[:]:
        client = present.get(job.client_id)
        if len(woken) < lacking and client is not None and job.state in GONE and _returned(job, client):
            job.state, job.reason, job.ended_at, job.created_at, job.deadline = JobState.queued, None, None, now, round.closes_at
            woken.append(client.id)
    return woken


def _returned(job: Job, client: Client) -> bool:
    return job.refusal is None and job.ended_at is not None and client.last_seen is not None and client.last_seen > job.ended_at


def training_jobs(session: Session, round_id: int) -> list[Job]:
    """A round's training jobs, oldest first."""
    return list(session.scalars(select(Job).where(Job.round_id == round_id, Job.kind == JobKind.train).order_by(Job.created_at, Job.id)))


# --- closing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What shall become of an open round."""

    close: bool
    reason: str


def verdict(session: Session, run: Run, round: Round, now: datetime) -> Verdict | None:
    """Close or abandon the round, because the target is in or time is up; or leave it open."""
    plan = plan_of(run)
    submitted = sum(job.state == JobState.submitted for job in training_jobs(session, round.id))
    if submitted >= plan.cohort.target:
        return Verdict(True, f"the target of {plan.cohort.target} is in")
    if now >= round.closes_at:
        return Verdict(submitted >= plan.cohort.quorum, f"{submitted} contributions at the deadline, quorum {plan.cohort.quorum}")
    return None


def last_verdict(session: Session, run: Run, round: Round) -> Verdict | None:
    """Of a round that could not be filled up: close it if the quorum is in and nobody is left to wait for."""
    quorum = plan_of(run).cohort.quorum
    states = [job.state for job in training_jobs(session, round.id)]
    submitted = states.count(JobState.submitted)
    if submitted < quorum or any(state in ACTIVE for state in states):
        return None
    return Verdict(True, f"{submitted} contributions, quorum {quorum}, and nobody left to wait for")


def close(session: Session, run: Run, round: Round, reason: str, now: datetime) -> bool:
    """open → merging: settle the weights of what is in, and cancel the rest."""
    if not _move(session, round, RoundState.open, RoundState.merging, reason=reason):
        return False
    _end(session, Job.round_id == round.id, Job.kind == JobKind.train, state=JobState.cancelled, reason="the round closed", now=now)
    jobs = [job for job in training_jobs(session, round.id) if job.state == JobState.submitted]
    for job, weight in zip(jobs, _weights(session, plan_of(run), jobs), strict=True):
        job.weight = weight
    events.record(session, now, "round-closed", run=run.id, round=round.number, contributions=len(jobs), reason=reason)
    return True


def _weights(session: Session, plan: Plan, jobs: Sequence[Job]) -> list[float]:
    counts = []
    for job in jobs:
        known = clients.get(session, job.client_id).profile["datasets"].get(plan.data, {}).get("train", 0)
        assert job.result is not None, "a submitted job has a result"
        counts.append(max(1, min(int(job.result["examples"]), int(known))))
    return shares(counts, plan.largest_share)


def shares(counts: Sequence[int], largest: float) -> list[float]:
    """Weights that sum to one, in proportion to the counts, none above `largest` (or an equal share, if that is more).

    What is cut from the largest goes to the others in proportion, until none is above.
    """
    limit = max(largest, 1 / len(counts)) if counts else 1.0
    free = set(range(len(counts)))
    weights = [0.0] * len(counts)
    while free:
        room, total = 1 - limit * (len(counts) - len(free)), sum(counts[i] for i in free)
        over = {i for i in free if room * counts[i] / total > limit}
        for i in over or free:
            weights[i] = limit if over else room * counts[i] / total
        free = free - over if over else set()
    return weights


def abandon(session: Session, run: Run, round: Round, reason: str, now: datetime) -> None:
    """open → abandoned; after the plan's number of attempts the run pauses and says why."""
    if not _move(session, round, RoundState.open, RoundState.abandoned, reason=reason, ended_at=now):
        return
    _end(session, Job.round_id == round.id, state=JobState.cancelled, reason="the round was abandoned", now=now)
    events.record(session, now, "round-abandoned", run=run.id, round=round.number, attempt=round.attempt, reason=reason)
    attempts = plan_of(run).cohort.attempts
    if round.attempt % attempts == 0:
        pause(session, run, f"round {round.number} was abandoned {attempts} times, the last because of {reason}", now)


def _move(session: Session, round: Round, before: RoundState, after: RoundState, **values: object) -> bool:
    statement = update(Round).where(Round.id == round.id, Round.state == before).values(state=after, **values)
    moved = cast(CursorResult[Any], session.execute(statement.execution_options(synchronize_session=False))).rowcount == 1
    session.refresh(round)
    return moved
