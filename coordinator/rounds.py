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

from sqlalchemy import CursorResult, select, update
from sqlalchemy.orm import Session

from coordinator import clients, cohort, events, handout
from coordinator.jobs import ACTIVE, plan_of
from coordinator.tables import Client, Job, Round, Run
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
    wanted = math.ceil(plan.cohort.target * plan.cohort.over_selection)
    measuring = handout.evaluate(session, run, last, now, pace) if (number, attempt) == (1, 1) else []
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
    run.state, run.reason, run.waiting_since = RunState.paused, reason, None
    events.record(session, now, "run-paused", run=run.id, reason=reason)


def fail(session: Session, run: Run, reason: str, now: datetime) -> None:
    """End a running run because of something that an operator has to look at, who can then resume it."""
    if run.state == RunState.running:
        run.state, run.reason, run.ended_at = RunState.failed, reason, now
        events.record(session, now, "run-failed", run=run.id, reason=reason)


@dataclass(frozen=True)
class Verdict:
    """What shall become of an open round."""

    close: bool
    reason: str


def verdict(session: Session, run: Run, round: Round, now: datetime) -> Verdict | None:
    """Close or abandon the round, because the target is in or time is up; or leave it open."""
    plan = plan_of(run)
    submitted = sum(job.state == JobState.submitted for job in handout.training_jobs(session, round.id))
    if submitted >= plan.cohort.target:
        return Verdict(True, f"the target of {plan.cohort.target} is in")
    if now >= round.closes_at:
        return Verdict(submitted >= plan.cohort.quorum, f"{submitted} contributions at the deadline, quorum {plan.cohort.quorum}")
    return None


def last_verdict(session: Session, run: Run, round: Round) -> Verdict | None:
    """Of a round that could not be filled up: close it if the quorum is in and nobody is left to wait for."""
    quorum = plan_of(run).cohort.quorum
    states = [job.state for job in handout.training_jobs(session, round.id)]
    submitted = states.count(JobState.submitted)
    if submitted < quorum or any(state in ACTIVE for state in states):
        return None
    return Verdict(True, f"{submitted} contributions, quorum {quorum}, and nobody left to wait for")


def close(session: Session, run: Run, round: Round, reason: str, now: datetime) -> bool:
    """open → merging: settle the weights of what is in, and cancel the rest."""
    if not _move(session, round, RoundState.open, RoundState.merging, reason=reason):
        return False
    handout.end(session, Job.round_id == round.id, Job.kind == JobKind.train, state=JobState.cancelled, reason="the round closed", now=now)
    jobs = [job for job in handout.training_jobs(session, round.id) if job.state == JobState.submitted]
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
