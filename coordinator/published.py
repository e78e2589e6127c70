"""What rounds have published: the adapter's rounds, their slices by rank, and what training starts from."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from coordinator.tables import PublishedSlice, PublishedStart, Round
from protocol.messages import BlobRef
from protocol.states import RoundState


def round_of(session: Session, run_id: str, number: int | None = None) -> Round | None:
    """The published attempt at a round; by default of the newest published round."""
    query = select(Round).where(Round.run_id == run_id, Round.state == RoundState.published)
    if number is not None:
        query = query.where(Round.number == number)
    return session.scalar(query.order_by(Round.number.desc()).limit(1))


def slices(session: Session, round_id: int) -> dict[int, BlobRef]:
    """The slices that a round published, by rank."""
    rows = session.scalars(select(PublishedSlice).where(PublishedSlice.round_id == round_id).order_by(PublishedSlice.rank))
    return {row.rank: BlobRef(digest=row.digest, bytes=row.bytes) for row in rows}


def starts(session: Session, round_id: int) -> dict[int, BlobRef]:
    """What training starts from after a round, by rank, by whom can carry it: its slices, unless something else was published for it."""
    return own_starts(session, round_id) or slices(session, round_id)


def own_starts(session: Session, round_id: int) -> dict[int, BlobRef]:
    """What a round published for training to start from beside its slices, by rank; nothing where these serve for it."""
    rows = session.scalars(select(PublishedStart).where(PublishedStart.round_id == round_id).order_by(PublishedStart.rank))
    return {row.rank: BlobRef(digest=row.digest, bytes=row.bytes) for row in rows}
