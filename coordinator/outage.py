"""Time in which no coordinator was at work counts for nobody: what was to end meanwhile ends as much later.

A coordinator that is at work writes a beat every few seconds. Whoever finds the last one too long ago, or in the future,
moves the times of everything that goes on by the gap, in the transaction that writes the next beat: once, whoever looks first.
A clock that jumps looks like an outage and is treated like one. Claims to merge are not moved: who held them is gone.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, cast

from sqlalchemy import ColumnElement, CursorResult, exists, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import InstrumentedAttribute, Session

from coordinator import events
from coordinator.columns import Base
from coordinator.handout import GONE
from coordinator.jobs import ACTIVE, lock
from coordinator.tables import Beat, Client, Job, Round, Run, Upload
from protocol.states import JobState, RoundState

BEAT = timedelta(seconds=2)
LATE = timedelta(seconds=5)  # that a beat may come later: a slow look, a restart


def late(session: Session, now: datetime) -> bool:
    """Whether the next beat is due: a look that changes nothing."""
    last = session.scalar(select(Beat.at))
    return last is None or not -LATE <= now - last < BEAT


def beat(session: Session, now: datetime) -> None:
    """Note that a coordinator is at work; if none was since the last beat, move all times on by as much."""
    last = session.scalar(select(Beat.at))
    if last is None:
        _first(session, now)
        return
    gap = now - last
    statement = update(Beat).where(Beat.at == last).values(at=now).execution_options(synchronize_session=False)
    noticed = cast(CursorResult[Any], session.execute(statement)).rowcount == 1
    if noticed and not -LATE <= gap <= BEAT + LATE:
        _move_on(session, gap)
        events.record(session, now, "outage", seconds=round(gap.total_seconds(), 1))


def _first(session: Session, now: datetime) -> None:
    try:
        with session.begin_nested():
            session.add(Beat(id=1, at=now))
    except IntegrityError:  # another coordinator has begun at this moment
        session.expire_all()


def _move_on(session: Session, gap: timedelta) -> None:
    """In the order in which everybody takes rows: runs, rounds, jobs, clients."""
    _shift(session, Run, gap, [Run.waiting_since], Run.waiting_since.is_not(None))
    _shift(session, Round, gap, [Round.closes_at], Round.state == RoundState.open)
    lock(session, Job.state.in_(ACTIVE))
    _shift(session, Job, gap, [Job.created_at], Job.state == JobState.queued)
    _shift(session, Job, gap, [Job.deadline, Job.lease_until, Job.progress_at], Job.state.in_(ACTIVE))
    _shift(session, Upload, gap, [Upload.touched_at])
    # Present machines count as present until they had time to poll; but who lost a job is not back before it was seen.
    lost = exists(
        select(Job.id)
        .join(Round, Job.round_id == Round.id)
        .where(Job.client_id == Client.id, Round.state == RoundState.open, Job.state.in_(GONE), Job.ended_at >= Client.last_seen)
        .correlate(Client)
    )
    _shift(session, Client, gap, [Client.last_seen], Client.last_seen.is_not(None), ~lost)


def _shift(
    session: Session,
    table: type[Base],
    gap: timedelta,
    times: list[InstrumentedAttribute[datetime]] | list[InstrumentedAttribute[datetime | None]],
    *which: ColumnElement[bool],
) -> None:
    """Row by row, because SQLite keeps times as text and cannot add to them."""
    (key,) = table.__table__.primary_key
    query = select(key, *times).where(*which).order_by(key).with_for_update(key_share=True)
    moved = [
        {name: value + gap if isinstance(value, datetime) else value for name, value in row._mapping.items()}
        for row in session.execute(query)
    ]
    if moved:
        session.execute(update(table), moved)
