"""Which rounds are given up: their contributions and slices lose the protection of their rows, and the sweep deletes them.

A round that is forgotten keeps every row, with the digests, for the record, and its global adapter; so it can still be
handed out at any rank. What protects a blob is

    an adapter                 always
    a slice, a start           while its round is not forgotten
    a contribution, its base   while the round that it was merged into, or else the round of its job, is not forgotten
    parts, quarantine          while their rows are there

and a round is forgotten only when nobody works on it any more. Once forgotten it names nothing that a later write needs:
new jobs start from the newest published round, which is never forgotten.
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime

from sqlalchemy import ColumnElement, and_, exists, func, or_, select, update
from sqlalchemy.orm import Session

from coordinator import events
from coordinator.jobs import ACTIVE
from coordinator.tables import Job, Round, Run
from protocol.states import JobState, RoundState, RunState

OVER = (RunState.finished, RunState.stopped)  # a failed run can go on
AT_ONCE = 1000  # rounds that one transaction gives up


def forget(session: Session, keep: int, now: datetime) -> int:
    """Give up all rounds but the newest `keep` ≥ 1 published ones of each run, and abandoned attempts; gives how many.

    Rounds whose jobs are still worked on, or wait to be merged, are left for a later look.
    """
    newest = (
        select(Round.run_id, func.max(Round.number).label("number"))
        .where(Round.state == RoundState.published)
        .group_by(Round.run_id)
        .subquery()
    )
    old = and_(Round.state.in_((RoundState.published, RoundState.abandoned)), Round.number <= newest.c.number - keep)
    vain = and_(Round.state == RoundState.abandoned, Run.state.in_(OVER))
    query = (
        select(Round.id, Round.run_id)
        .join(Run, Round.run_id == Run.id)
        .outerjoin(newest, newest.c.run_id == Round.run_id)
        .where(~Round.forgotten, or_(old, vain), ~_live())
        .order_by(Round.id)
        .limit(AT_ONCE)
    )
    found = session.execute(query).all()
    session.execute(update(Round).where(Round.id.in_([row.id for row in found])).values(forgotten=True))
    for run, count in Counter(row.run_id for row in found).items():
        events.record(session, now, "rounds-forgotten", run=run, rounds=count)
    return len(found)


def _live() -> ColumnElement[bool]:
    """Whether the round has jobs that are worked on, or whose contribution waits to be merged into this or a later round."""
    waiting = and_(Job.state == JobState.submitted, Job.counted_in.is_(None), Round.state != RoundState.abandoned)
    own = and_(Job.round_id == Round.id, or_(Job.state.in_(ACTIVE), waiting))
    return exists(select(Job.id).where(own).correlate(Round))
