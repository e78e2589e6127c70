"""The life of a round: opened, filled, closed or abandoned, claimed for merging, published.

    open → merging → published
        ↘ abandoned (too few contributions at the deadline)

Round 0 publishes what training begins with; its first state is merging. Every change of state is compare-and-set, so that it
happens once whoever tries it. Where a plan has a buffer, rounds only collect: jobs belong to the round in which they were
handed out, outlive it, and are merged into the round in which they come.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, cast

from sqlalchemy import CursorResult, select, update
from sqlalchemy.orm import Session

from coordinator import cohort, counting, events, handout
from coordinator.jobs import plan_of
from coordinator.tables import Client, Job, Round, Run
from protocol.course import Buffer
from protocol.plan import Plan
from protocol.states import JobKind, JobState, RoundState, RunState


def begin(session: Session, run: Run, now: datetime) -> None:
    """Round 0: nothing is trained, the first adapter is made and published."""
    session.add(Round(run_id=run.id, number=0, attempt=1, state=RoundState.merging, opened_at=now, closes_at=now))


def current(session: Session, run_id: str) -> Round | None:
    """The newest attempt at the newest round."""
    return session.scalar(select(Round).where(Round.run_id == run_id).order_by(Round.number.desc(), Round.attempt.desc()).limit(1))


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
    measuring = handout.evaluate(session, run, last, now, pace) if (number, attempt) == (1, 1) else []
    if plan.buffer is not None:
        if attempt > 1:
            handout.take_over(session, last, round)
        return measuring + handout.refill(session, run, round, now, pace)
    wanted = math.ceil(plan.cohort.target * plan.cohort.over_selection)
    return measuring + handout.train(session, run, round, plan, cohort.draw(plan, number, attempt, 0, able, wanted), able, now)


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
    run.state, run.reason, run.waiting_since = RunState.paused, reason, now
    events.record(session, now, "run-paused", run=run.id, reason=reason)


def fail(session: Session, run: Run, reason: str, now: datetime) -> None:
    """End a running run because of something that an operator has to look at, who can then resume it."""
    if run.state == RunState.running:
        run.state, run.reason, run.ended_at, run.waiting_since = RunState.failed, reason, now, now
        events.record(session, now, "run-failed", run=run.id, reason=reason)


@dataclass(frozen=True)
class Verdict:
    """What shall become of an open round."""

    close: bool
    reason: str


def verdict(session: Session, run: Run, round: Round, now: datetime) -> Verdict | None:
    """Close or abandon the round, because the target is in or time is up; or leave it open."""
    plan = plan_of(run)
    submitted, target, quorum = counting.number_waiting(session, run, round), counting.target(plan), counting.quorum(plan)
    if submitted >= target:
        return Verdict(True, f"the target of {target} is in" if plan.buffer is None else f"the buffer of {target} is full")
    if now >= round.closes_at:
        return Verdict(submitted >= quorum, f"{submitted} contributions at the deadline, quorum {quorum}")
    return None


def last_verdict(session: Session, run: Run, round: Round) -> Verdict | None:
    """Of a round that could not be filled up: close it if the quorum is in and nobody is left to wait for."""
    submitted, quorum = counting.number_waiting(session, run, round), counting.quorum(plan_of(run))
    if submitted < quorum or handout.anybody_at_work(session, run, round):
        return None
    return Verdict(True, f"{submitted} contributions, quorum {quorum}, and nobody left to wait for")


def close(session: Session, run: Run, round: Round, reason: str, now: datetime) -> bool:
    """open → merging: settle what is merged with which weight, and end what can never be."""
    if not _move(session, round, RoundState.open, RoundState.merging, reason=reason):
        return False
    plan, closed = plan_of(run), f"the round closed at {now:%Y-%m-%d %H:%M:%S} UTC: {reason}"
    counting.lock(session, run, round)
    if plan.buffer is None:
        handout.end(session, Job.round_id == round.id, Job.kind == JobKind.train, state=JobState.cancelled, reason=closed, now=now)
    count = counting.settle(session, run, round, now)
    if plan.buffer is not None:
        _retire(session, run, round, plan.buffer, closed, now)
    events.record(session, now, "round-closed", run=run.id, round=round.number, contributions=count, reason=round.reason)
    return True


def _retire(session: Session, run: Run, round: Round, buffer: Buffer, closed: str, now: datetime) -> None:
    """End the jobs, and reject the contributions, that no later round will merge: they are too old, or this was the last."""
    last = round.number >= plan_of(run).rounds
    started = round.number if last else round.number - buffer.largest_staleness
    old = select(Round.id).where(Round.run_id == run.id, Round.number <= started)
    limit = f"it started too long ago for any later round: the plan allows {buffer.largest_staleness} versions between start and merge"
    reason = f"it comes after the last round; {closed}" if last else f"{limit}; {closed}"
    handout.end(session, Job.round_id.in_(old), Job.kind == JobKind.train, state=JobState.cancelled, reason=reason, now=now)
    for found in counting.waiting(session, run, round):
        if last or found.staleness >= buffer.largest_staleness:
            state = JobState.cancelled if last else JobState.rejected
            counting.leave_out(session, run, round, found, state, reason, now)


def abandon(session: Session, run: Run, round: Round, reason: str, now: datetime) -> None:
    """open → abandoned; after the plan's number of attempts the run pauses and says why."""
    if not _move(session, round, RoundState.open, RoundState.abandoned, reason=reason, ended_at=now):
        return
    if plan_of(run).buffer is None:  # otherwise the next attempt takes over what is in work and what is in
        handout.end(session, Job.round_id == round.id, state=JobState.cancelled, reason="the round was abandoned", now=now)
    events.record(session, now, "round-abandoned", run=run.id, round=round.number, attempt=round.attempt, reason=reason)
    attempts = plan_of(run).cohort.attempts
    if round.attempt % attempts == 0:
        pause(session, run, f"round {round.number} was abandoned {attempts} times, the last because of {reason}", now)


def _move(session: Session, round: Round, before: RoundState, after: RoundState, **values: object) -> bool:
    statement = update(Round).where(Round.id == round.id, Round.state == before).values(state=after, **values)
    moved = cast(CursorResult[Any], session.execute(statement.execution_options(synchronize_session=False))).rowcount == 1
    session.refresh(round)
    return moved
