"""Blobs that no row names are deleted, and never one that a row names, whoever puts, names and sweeps at the same time.

    put → hold → row          whoever names a blob
    condemned → deleted       the sweep

`hold` is called in the transaction that makes a row name a blob. That transaction and the one that condemns exclude each
other; between being condemned and being gone a blob cannot be named; and a blob that is gone cannot be named before it
was put again. So a row that was written names a blob that is there, and that nobody may delete while the row names it.
"""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from coordinator.blobs import Blobs
from coordinator.tables import Condemned
from protocol import errors

NAMING = 7260915  # PostgreSQL's advisory lock: shared by all who name blobs, exclusive for whoever condemns some


def hold(session: Session, blobs: Blobs, *digests: str) -> None:
    """Make sure that blobs which were put may be named by rows of this write transaction.

    Raises Unavailable where one is being swept, or was swept since it was put; whoever has the bytes puts them again.
    """
    # SQLite's writers exclude each other anyway. On PostgreSQL two transactions would not see each other's new rows.
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock_shared(NAMING)))
    # A statement of its own, after the lock: it sees what was committed while the lock was waited for.
    condemned = session.scalar(select(Condemned.digest).where(Condemned.digest.in_(digests)).limit(1))
    # Not condemned is not enough: a put renews an old blob just before it is deleted, and its name is free again after that.
    lost = condemned or next((digest for digest in digests if not blobs.exists(digest)), None)
    if lost is not None:
        raise errors.Unavailable(f"the blob {lost} is being swept or was swept away; put it again", digest=lost)
