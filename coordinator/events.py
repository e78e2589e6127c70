"""The log of state changes: one row per change, in the transaction that makes it; operators follow it live."""

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
    session.add(tables.Event(at=now, kind=kind, run_id=run, round=round, client=client, facts=facts))
    session.info.setdefault("events", []).append(kind)  # each is a point to crash at, once it is committed
    log.info(kind, run=run, round=round, client=client, **facts)


@dataclass(frozen=True)
class Change:
    """A change of state, to be noted together with others."""

    kind: str
    run: str
    round: int
    client: str
    facts: Mapping[str, JsonValue]


def record_all(session: Session, now: datetime, changes: Sequence[Change]) -> None:
    """Note many changes of state in one statement."""
    if not changes:
        return
    rows = [{"at": now, "kind": c.kind, "run_id": c.run, "round": c.round, "client": c.client, "facts": dict(c.facts)} for c in changes]
    session.connection().execute(_INSERT, rows)
    session.info.setdefault("events", []).extend(change.kind for change in changes)
    for change in changes:
        log.info(change.kind, run=change.run, round=change.round, client=change.client, **change.facts)


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
