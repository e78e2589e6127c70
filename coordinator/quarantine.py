"""Contributions that were set apart, each with its reason: by them an operator tells a fault from an attack.

The bytes of a rejected slice lie in a store of their own, where no job can name them; a contribution that is suspicious but
sound stays where it is. How much is kept is bounded by client, by bytes and by time: nobody fills disk or database with what
is refused. Rows go before bytes, so what a crash leaves is bytes without a row, and those are swept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Self

import structlog
from sqlalchemy import ColumnElement, Select, and_, case, delete, exists, func, select, update
from sqlalchemy.orm import Session

from coordinator import access, events, paging
from coordinator.blobs import Blobs
from coordinator.database import Database
from coordinator.tables import Client, Job, Quarantined, Round
from protocol import errors
from protocol.messages import BlobRef
from protocol.views import Page, QuarantineView

log = structlog.get_logger()
MOST = 10  # the newest contributions that are kept of one client
NEWEST = (Quarantined.at.desc(), Quarantined.id.desc())
ELSEWHERE = exists(select(Job.id).where(Job.id == Quarantined.job_id, Job.slice == Quarantined.digest))  # suspicious, but sound


def keep(session: Session, job: Job, problem: str, reason: str, slice: BlobRef | None, now: datetime) -> None:
    """Set a job's contribution apart; `slice` names its bytes if they are kept, here or among the other blobs."""
    round = session.get_one(Round, job.round_id)
    client = session.get_one(Client, job.client_id)
    row = Quarantined(
        id=access.new_id("quarantine"),
        at=now,
        job_id=job.id,
        client_id=client.id,
        problem=problem,
        reason=reason,
        digest=slice and slice.digest,
        bytes=slice and slice.bytes,
    )
    session.add(row)
    facts = {"contribution": row.id, "problem": problem, "reason": reason}
    events.record(session, now, "contribution-quarantined", run=round.run_id, round=round.number, client=client.name, **facts)


def list_views(session: Session, run: str | None, client: str | None, cursor: str | None, limit: int) -> Page[QuarantineView]:
    """What was set apart of a run, of a client, or at all; newest first."""
    query = select(Quarantined)
    if run is not None:
        query = query.join(Job, Quarantined.job_id == Job.id).join(Round, Job.round_id == Round.id).where(Round.run_id == run)
    if client is not None:
        query = query.where(Quarantined.client_id == client)
    return paging.page(session, query, Quarantined.at, Quarantined.id, cursor, limit, _viewer(session))


def view(session: Session, id: str) -> QuarantineView:
    """One contribution that was set apart. Raises NotFound."""
    row = session.get(Quarantined, id)
    if row is None:
        raise errors.NotFound(f"there is no {id} in quarantine; the oldest are given up by and by")
    return _viewer(session)(row)


def _viewer(session: Session) -> Callable[[Quarantined], QuarantineView]:
    def viewed(row: Quarantined) -> QuarantineView:
        round = session.get_one(Round, session.get_one(Job, row.job_id).round_id)
        return QuarantineView(
            id=row.id,
            at=row.at,
            run=round.run_id,
            round=round.number,
            job=row.job_id,
            client=row.client_id,
            client_name=session.get_one(Client, row.client_id).name,
            problem=row.problem,
            reason=row.reason,
            slice=None if row.digest is None or row.bytes is None else BlobRef(digest=row.digest, bytes=row.bytes),
        )

    return viewed


def counts(session: Session) -> dict[str, int]:
    """How many contributions are set apart by problem."""
    query = select(Quarantined.problem, func.count().label("total")).group_by(Quarantined.problem)
    return {row.problem: row.total for row in session.execute(query)}


@dataclass(frozen=True)
class Quarantine:
    """The bytes that were set apart, and how many may be."""

    database: Database
    store: Blobs
    limit: int  # bytes in all
    lasting: timedelta

    @classmethod
    def beside(cls, blobs: Blobs, database: Database, limit: int, lasting: timedelta) -> Self:
        """The quarantine of a coordinator, in a folder or under a prefix of its blob store."""
        return cls(database, Blobs.open(blobs.url.rstrip("/") + "/quarantine"), limit, lasting)

    def take(self, path: Path, digest: str, length: int) -> BlobRef | None:
        """Keep the bytes of a slice, in place of the oldest here where there is no room; none where they cannot be kept."""
        if length > self.limit:
            return None
        try:
            self._thin(self.limit - length)
            return self.store.put_file(path, digest)
        except errors.Unavailable as error:  # a slice that cannot count is rejected all the same
            log.warning("rejected-slice-not-kept", digest=digest, reason=str(error))
            return None

    def find(self, digest: str, blobs: Blobs) -> Blobs:
        """The store that has these bytes: this one, or the one of all other blobs. Raises NotFound."""
        for store in (self.store, blobs):
            if store.exists(digest):
                return store
        raise errors.NotFound("the bytes of this slice were given up; what is known of it is still here", digest=digest)

    def remove(self, id: str) -> None:
        """Forget one contribution. Raises NotFound."""
        with self.database.write() as session:
            view(session, id)
            unnamed = _remove(session, Quarantined.id == id)
        self._delete(unnamed)

    def tidy(self, before: datetime) -> int:
        """Give up what is beyond the bounds, and bytes without a row that were put before a time; gives how many bytes' blobs."""
        given = self._thin(self.limit)
        old = [blob.digest for blob in self.store.digests() if blob.modified < before]
        with self.database.read() as session:
            orphans = _unnamed(session, old)
        self._delete(orphans)
        return given + len(orphans)

    def _thin(self, limit: int) -> int:
        with self.database.write() as session:
            unnamed = _remove(session, Quarantined.at < self.database.clock(session) - self.lasting)
            turn = func.row_number().over(partition_by=Quarantined.client_id, order_by=NEWEST)
            unnamed += _remove(session, _beyond(turn, MOST))
            held = func.sum(case((ELSEWHERE, 0), else_=Quarantined.bytes)).over(order_by=NEWEST)
            unnamed += _give_up(session, and_(~ELSEWHERE, _beyond(held, limit)))
        self._delete(unnamed)
        return len(unnamed)

    def _delete(self, digests: Iterable[str]) -> None:
        # A slice that is put again at this very moment may lose its bytes here; its row stays, and says that they are gone.
        for digest in digests:
            self.store.delete(digest)


def _beyond(measure: ColumnElement[int] | ColumnElement[int | None], limit: int) -> ColumnElement[bool]:
    """The rows whose measure, taken over all rows, is above the limit."""
    measured = select(Quarantined.id, measure.label("measure")).subquery()
    return Quarantined.id.in_(select(measured.c.id).where(measured.c.measure > limit))


def _remove(session: Session, which: ColumnElement[bool]) -> list[str]:
    digests = _digests(session, select(Quarantined.digest).where(which))
    session.execute(delete(Quarantined).where(which).execution_options(synchronize_session=False))
    return _unnamed(session, digests)


def _give_up(session: Session, which: ColumnElement[bool]) -> list[str]:
    digests = _digests(session, select(Quarantined.digest).where(which))
    session.execute(update(Quarantined).where(which).values(digest=None, bytes=None).execution_options(synchronize_session=False))
    return _unnamed(session, digests)


def _digests(session: Session, query: Select[str | None]) -> list[str]:
    return [digest for digest in session.scalars(query) if digest is not None]


def _unnamed(session: Session, digests: Iterable[str]) -> list[str]:
    named = set(session.scalars(select(Quarantined.digest).where(Quarantined.digest.is_not(None))))
    return sorted(set(digests) - named)
