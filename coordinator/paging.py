"""Lists by cursor: newest first, stable while rows are added."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeVar

from sqlalchemy import Select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from protocol import errors
from protocol.views import Page

Row = TypeVar("Row")
View = TypeVar("View")
_ID = re.compile("[a-z]+-[0-9a-f]{16}")


def page(
    session: Session,
    query: Select[Row],
    at: InstrumentedAttribute[datetime],
    id: InstrumentedAttribute[str],
    cursor: str | None,
    limit: int,
    view: Callable[[Row], View],
) -> Page[View]:
    """One page of a query, ordered by time and then id, both falling. Raises InvalidRequest for a cursor that is none of ours."""
    if cursor is not None:
        query = query.where(tuple_(at, id) < tuple_(*_decode(cursor)))
    rows = list(session.scalars(query.order_by(at.desc(), id.desc()).limit(limit + 1)))
    last = rows[limit - 1] if len(rows) > limit else None
    following = None if last is None else _encode(getattr(last, at.key), getattr(last, id.key))
    return Page(items=[view(row) for row in rows[:limit]], next=following)


def _encode(at: datetime, id: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([at.isoformat(), id]).encode()).decode()


def _decode(cursor: str) -> tuple[datetime, str]:
    try:
        at, id = json.loads(base64.urlsafe_b64decode(cursor))
        moment = datetime.fromisoformat(at)
        if moment.tzinfo is None or not _ID.fullmatch(id):
            raise ValueError(id)
        return moment.astimezone(UTC), id
    except (ValueError, TypeError, OverflowError, binascii.Error):
        raise errors.InvalidRequest("the cursor is not one that this coordinator gave out; begin without one") from None
