"""The log of state changes: one row per change, in the transaction that makes it, at its end; operators follow it live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

import structlog
from pydantic import JsonValue
from sqlalchemy import CursorResult, delete, func, insert, select
from sqlalchemy.orm import Session

from coordinator import tables
from coordinator.database import LAST
from protocol.views import Event

log = structlog.get_logger()


def record(
    session: Session,
    now: datetime,
    kind: str,
    *,
    run: str | None = None,
    round: int | None = None,
    client: str | None = None,
    **facts: JsonValue,
) -> None:
    """Note one change of state; it is told to operators once the transaction commits."""
    record_all(session, now, [Change(kind, run, round, client, facts)])


@dataclass(frozen=True)
class Change:
    """A change of state, to be noted together with others."""

    kind: str
    run: str | None
    round: int | None
    client: str | None
    facts: Mapping[str, JsonValue]


def record_all(session: Session, now: datetime, changes: Sequence[Change]) -> None:
    """Note many changes of state."""
    for c in changes:
        row = {"at": now, "kind": c.kind, "run_id": c.run, "round": c.round, "client": c.client, "facts": dict(c.facts)}
        session.info.setdefault(NOTED, []).append(row)
        session.info[LAST] = _write
        log.info(c.kind, run=c.run, round=c.round, client=c.client, **c.facts)


NOTED = "events"  # where they stand in a session's `info`
ORDER = 7_260_916  # PostgreSQL's advisory lock of whoever draws ids


def _write(session: Session) -> list[str]:
    """The last step of a transaction: ids come in the order of commits, so that whoever has read one has read all before it.

    Who holds the lock asks for no other, so that nobody waits in a circle; it is let go of when the commit can be seen.
    """
    session.flush()
    rows = session.info.pop(NOTED)
    if session.get_bind().dialect.name == "postgresql":  # SQLite has one writer at a time
        session.connection().execute(_LOCK)
    session.connection().execute(_INSERT, rows)
    return [row["kind"] for row in rows]


_LOCK = select(func.pg_advisory_xact_lock(ORDER))
_INSERT = insert(tables.Event)


def after(session: Session, id: int, run: str | None, limit: int = 500) -> list[Event]:
    """Events with a larger id, oldest first."""
    query = select(tables.Event).where(tables.Event.id > id).order_by(tables.Event.id).limit(limit)
    if run is not None:
        query = query.where(tables.Event.run_id == run)
    return [
        Event(id=row.id, at=row.at, kind=row.kind, run=row.run_id, round=row.round, client=row.client, facts=row.facts)
        for row in session.scalars(query)
    ]


def forget(session: Session, before: datetime, limit: int) -> int:
    """Delete events from before a time, the oldest first; gives how many, at most `limit`."""
    oldest = select(tables.Event.id, tables.Event.at).order_by(tables.Event.id).limit(limit).subquery()
    gone = delete(tables.Event).where(tables.Event.id.in_(select(oldest.c.id).where(oldest.c.at < before)))
    return cast(CursorResult[Any], session.execute(gone.execution_options(synchronize_session=False))).rowcount


def newest(session: Session) -> int:
    """The id of the newest event; 0 if there is none."""
    return session.scalar(select(func.max(tables.Event.id))) or 0
