"""Which contributions a round merges, and how much each of them counts.

A round that waits for its own clients takes what these sent. Where contributions are buffered, a round takes the oldest
`size` that are in, whichever version each of them started from, and leaves the others to the next one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import median

from sqlalchemy import ColumnElement, and_, func, select
from sqlalchemy.orm import Session

from coordinator import events, jobs, quarantine
from coordinator.jobs import plan_of
from coordinator.tables import Client, Job, Round, Run
from protocol.messages import BlobRef
from protocol.plan import Plan
from protocol.states import JobKind, JobState

SUSPICIOUS = "suspicious-change"


@dataclass(frozen=True)
class Waiting:
    """A contribution that is in and was not merged yet."""

    job: Job
    client: Client
    staleness: int  # versions published since the one that it started from


def target(plan: Plan) -> int:
    """The contributions that close a round at once."""
    return plan.cohort.target if plan.buffer is None else plan.buffer.size


def quorum(plan: Plan) -> int:
    """The contributions that suffice when a round's time is over."""
    return min(plan.cohort.quorum, target(plan))


def waiting(session: Session, run: Run, round: Round) -> list[Waiting]:
    """The contributions that the round may merge, in the order in which they came.

    Those that came in the same moment are ordered by what does not change from one execution to the next.
    """
    query = select(Job, Client, Round.number).join(Client, Job.client_id == Client.id).join(Round, Job.round_id == Round.id)
    ordered = query.where(_may_be_merged(run, round)).order_by(Job.ended_at, Round.number, Client.name)
    # As they are now: some came in while this transaction waited for them.
    found = session.execute(ordered.execution_options(populate_existing=True))
    return [Waiting(job, client, round.number - number) for job, client, number in found]


def lock(session: Session, run: Run, round: Round) -> None:
    """Take all jobs that closing the round may change: those that are worked on, and those that wait to be merged."""
    rounds = select(Round.id).where(_mine(run, round))
    jobs.lock(session, Job.round_id.in_(rounds), Job.kind == JobKind.train, jobs.UNSETTLED)


def number_waiting(session: Session, run: Run, round: Round) -> int:
    """How many contributions the round may merge."""
    query = select(func.count()).select_from(Job).join(Round, Job.round_id == Round.id).where(_may_be_merged(run, round))
    return session.scalar(query) or 0


def _may_be_merged(run: Run, round: Round) -> ColumnElement[bool]:
    return and_(_mine(run, round), Job.kind == JobKind.train, Job.state == JobState.submitted, Job.counted_in.is_(None))


def _mine(run: Run, round: Round) -> ColumnElement[bool]:
    return Round.id == round.id if plan_of(run).buffer is None else Round.run_id == run.id


def counted(session: Session, round_id: int) -> list[Job]:
    """The jobs whose contributions are merged into a round that has closed."""
    query = select(Job).where(Job.counted_in == round_id, Job.state.in_((JobState.submitted, JobState.accepted)))
    return list(session.scalars(query.order_by(Job.ended_at, Job.id)))


def settle(session: Session, run: Run, round: Round, now: datetime) -> int:
    """Say what a closed round merges, and with which weights; set apart what is far from the others. Gives how many count.

    Nothing is set apart where the rest would be no quorum; then the round's reason says so.
    """
    plan = plan_of(run)
    taken = waiting(session, run, round)
    taken = taken if plan.buffer is None else taken[: plan.buffer.size]
    apart = suspects([found.job.change_norm or 0.0 for found in taken], plan.suspicious)
    if len(taken) - len(apart) < quorum(plan):
        round.reason = f"{round.reason}; suspicious contributions count, {len(apart)} of {len(taken)}: the rest would be no quorum"
        apart = {}
    for at, reason in apart.items():
        _set_apart(session, run, round, taken[at], reason, now)
    kept = [found for at, found in enumerate(taken) if at not in apart]
    for found, weight in zip(kept, _weights(plan, kept), strict=True):
        found.job.counted_in, found.job.weight = round.id, weight
    return len(kept)


def suspects(norms: Sequence[float], factor: float | None) -> dict[int, str]:
    """Which of these changes are more than `factor` times as large as their median, and a sentence for each.

    Where the typical change is zero there is nothing to compare with.
    """
    typical = median(norms) if norms else 0.0
    if factor is None or not typical > 0:
        return {}
    words = f"times the median of {typical:.4g} of the {len(norms)} contributions; the plan allows {factor:g} times"
    return {at: f"its change of {norm:.4g} is {norm / typical:.3g} {words}" for at, norm in enumerate(norms) if norm > factor * typical}


def _set_apart(session: Session, run: Run, round: Round, found: Waiting, reason: str, now: datetime) -> None:
    job = found.job
    assert job.slice is not None, "a submitted job has a slice"
    assert job.slice_bytes is not None, "a slice has a length"
    leave_out(session, run, round, found, JobState.rejected, reason, now)
    quarantine.keep(session, job, SUSPICIOUS, reason, BlobRef(digest=job.slice, bytes=job.slice_bytes), now)


def leave_out(session: Session, run: Run, round: Round, found: Waiting, state: JobState, reason: str, now: datetime) -> None:
    """End a contribution that no round will merge."""
    found.job.state, found.job.reason = state, reason
    events.record(session, now, f"job-{state}", run=run.id, round=round.number, client=found.client.name, reason=reason)


def _weights(plan: Plan, kept: Sequence[Waiting]) -> list[float]:
    """The shares of the examples."""
    return shares([_examples(plan, found) for found in kept], plan.largest_share)


def _examples(plan: Plan, found: Waiting) -> int:
    known = found.client.profile["datasets"].get(plan.data, {}).get("train", 0)
    assert found.job.result is not None, "a submitted job has a result"
    return max(1, min(int(found.job.result["examples"]), int(known)))


def shares(counts: Sequence[float], largest: float) -> list[float]:
    """Weights that sum to one, in proportion to the counts > 0, none above `largest` (or an equal share, if that is more).

    What is cut from the largest goes to the others in proportion, until none is above. The order is no part of the result.
    """
    limit = max(largest, 1 / len(counts)) if counts else 1.0
    free = set(range(len(counts)))
    weights = [0.0] * len(counts)
    while free:
        room, total = 1 - limit * (len(counts) - len(free)), math.fsum(counts[i] for i in free)
        over = {i for i in free if room * counts[i] / total > limit}
        for i in over or free:
            weights[i] = limit if over else room * counts[i] / total
        free = free - over if over else set()
    return weights
