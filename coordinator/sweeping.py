"""Blobs that no row names are deleted, and never one that a row names, whoever puts, names and sweeps at the same time.

    put → hold → row                    whoever names a blob
    orphan → condemned → deleted        the sweep; each arrow is a transaction

1. A transaction that names a blob (`hold`) and one that condemns blobs never run at once, on either database. So whoever
   condemns sees every row that is there, and whoever names sees every condemnation.
2. A blob is deleted only while it is condemned, and by whoever holds the row that says so. So nothing is deleted between
   a successful `hold` and the commit of the row, and after that the row itself protects the blob.
3. A put may come just before the deletion and only renew what is about to go, and the `hold` that follows just after it,
   when the blob is condemned no longer. Therefore `hold` looks whether the blob is there.

Only what was put needs `hold`. A job that is drawn names a slice that its round's predecessor names already: its run is locked
meanwhile, so that round stays the newest published one, which is never forgotten.

A sweep that dies between two arrows leaves a condemned blob, deleted or not; the next one finishes it, and until then
nobody can name it. How old an orphan must be is no part of this: it only spares those about to name one a second put.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any, cast

from sqlalchemy import CursorResult, Select, String, and_, any_, bindparam, delete, func, literal, or_, select, union
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import InstrumentedAttribute, Session

from coordinator.blobs import GROWING, Blobs, StoredBlob
from coordinator.database import Database
from coordinator.tables import Condemned, Job, Part, PublishedSlice, PublishedStart, Quarantined, Round
from protocol import errors
from protocol.states import JobState, RoundState

NAMING = 7260915  # PostgreSQL's advisory lock: shared by all who name blobs, exclusive for whoever condemns some
LOOK = 4000  # blobs looked at together; a database that is asked for few at a time reads its tables often
STILL = timedelta(hours=1)  # a file that was not written to for so long has no writer; unlike with blobs this is a guess
BATCH = 500  # blobs condemned together; none of them can be named before all of them are deleted


def hold(session: Session, blobs: Blobs, *digests: str) -> None:
    """Make sure that blobs which were put may be named by rows of this write transaction.

    Raises Unavailable where one is being swept, or was swept since it was put; whoever has the bytes puts them again.
    """
    doomed = condemned(session, digests)
    for digest in digests:
        if digest in doomed or not blobs.exists(digest):
            raise lost(digest)


def condemned(session: Session, digests: Collection[str]) -> set[str]:
    """Which of these blobs are being swept; until this write transaction ends, no other one will be."""
    # SQLite's writers exclude each other anyway. On PostgreSQL two transactions would not see each other's new rows.
    if session.get_bind().dialect.name == "postgresql":
        session.connection().execute(_NAMING)
    # A statement of its own, after the lock: it sees what was committed while the lock was waited for.
    return set(session.connection().execute(_CONDEMNED, {"digests": list(digests)}).scalars())


def lost(digest: str) -> errors.Unavailable:
    """The refusal to name a blob that is, or may be, gone."""
    return errors.Unavailable(f"the blob {digest} is being swept or was swept away; put it again", digest=digest)


_NAMING = select(func.pg_advisory_xact_lock_shared(NAMING))
_CONDEMNED = select(Condemned.digest).where(Condemned.digest.in_(bindparam("digests", expanding=True)))


def named(session: Session, digests: Collection[str]) -> set[str]:
    """Which of these blobs some row needs."""
    if session.get_bind().dialect.name == "postgresql":  # thousands of parameters take it long; one array does not
        wanted = any_(literal(list(digests), ARRAY(String)))
        return set(session.scalars(union(*(query.where(column == wanted) for column, query in _needed()))))
    return set(session.scalars(union(*(query.where(column.in_(digests)) for column, query in _needed()))))


def every_named(session: Session) -> set[str]:
    """All blobs that some row needs."""
    return set(session.scalars(union(*(query.where(column.is_not(None)) for column, query in _needed()))))


def _needed() -> list[tuple[InstrumentedAttribute[Any], Select[Any]]]:
    """The columns of digests, each with a query of those that are needed.

    What a round's manifest names is named by other rows too: its inputs by their jobs, its slices and starts by theirs, and
    adapters by their rounds, for ever. A round that was forgotten needs only its adapter.
    """
    kept = Round.forgotten.is_(False)
    waits = and_(Job.state == JobState.submitted, Job.counted_in.is_(None), Round.state != RoundState.abandoned)
    needed = or_(kept, waits, Job.state.in_((JobState.queued, JobState.leased)))
    merged = Round.id == func.coalesce(Job.counted_in, Job.round_id)
    return [
        (Round.adapter, select(Round.adapter)),
        (PublishedSlice.digest, select(PublishedSlice.digest).join(Round, PublishedSlice.round_id == Round.id).where(kept)),
        (PublishedStart.digest, select(PublishedStart.digest).join(Round, PublishedStart.round_id == Round.id).where(kept)),
        (Job.slice, select(Job.slice).join(Round, merged).where(needed)),
        (Job.base, select(Job.base).join(Round, merged).where(needed)),
        (Part.digest, select(Part.digest)),
        # Rejected slices lie in a store of their own; what is suspicious was sound and lies here.
        (Quarantined.digest, select(Quarantined.digest).join(Job, Quarantined.job_id == Job.id).where(Job.slice == Quarantined.digest)),
    ]


def orphans(database: Database, blobs: Blobs, before: datetime) -> Iterator[list[StoredBlob]]:
    """The blobs that were last put before a time and that no row names, a few at a time; an empty list where many are none."""
    listed = blobs.digests()
    while batch := list(islice(listed, LOOK)):
        old = [blob for blob in batch if blob.modified < before]
        with database.read() as session:
            needed = named(session, [blob.digest for blob in old])
        yield [blob for blob in old if blob.digest not in needed]


def condemn(session: Session, digests: Collection[str], now: datetime) -> list[str]:
    """Doom those of the blobs that nobody names, so that nobody will; gives which."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(NAMING)))
    already = session.scalars(select(Condemned.digest).where(Condemned.digest.in_(digests)))
    doomed = sorted(set(digests) - named(session, digests) - set(already))
    session.add_all(Condemned(digest=digest, at=now) for digest in doomed)
    return doomed


def finish(database: Database, blobs: Blobs) -> list[str]:
    """Delete what is condemned, also what an earlier sweep left; gives what was deleted here.

    Raises Unavailable where the store let go of all but some; they stay condemned, and nothing more is before they are gone.
    """
    with database.read() as session:
        doomed = session.scalars(select(Condemned.digest).order_by(Condemned.digest)).all()
    deleted: list[str] = []
    failure: errors.Unavailable | None = None
    for digest in doomed:
        try:
            deleted += [digest] * delete_condemned(database, blobs, digest)
        except errors.Unavailable as error:
            failure = error
    if failure is not None:
        raise failure
    return deleted


def delete_condemned(database: Database, blobs: Blobs, digest: str) -> bool:
    """Delete a blob if it is condemned still; says whether it was. Raises Unavailable."""
    with database.write() as session:
        # Whoever takes the row out deletes the blob before that is committed: everybody else still sees it condemned.
        taken = cast(CursorResult[Any], session.execute(delete(Condemned).where(Condemned.digest == digest))).rowcount == 1
        if taken:
            blobs.delete(digest)
    return taken


def sweep(database: Database, blobs: Blobs, before: datetime) -> Iterator[list[StoredBlob]]:
    """Delete the orphans that were last put before a time; gives them as `orphans` does. Raises Unavailable."""
    finish(database, blobs)
    for batch in orphans(database, blobs, before):
        if not batch:
            yield []
        for start in range(0, len(batch), BATCH):
            found = {blob.digest: blob for blob in batch[start : start + BATCH]}
            with database.write() as session:
                condemn(session, found, database.clock(session))
            yield [found[digest] for digest in finish(database, blobs) if digest in found]


def leftovers(blobs: Blobs, spool: Path) -> Iterator[Path]:
    """What puts, uploads and merges that were cut off have left: files, and folders of files, that nobody writes to any more."""
    still = time.time() - STILL.total_seconds()  # by the clock of the files, not by the database's
    for path in (*blobs.unfinished(), *spool.glob("upload-*"), *Path(tempfile.gettempdir()).glob(f"{GROWING}*")):
        with suppress(FileNotFoundError):  # finished since the folder was read
            facts = [path.lstat(), *(each.lstat() for each in path.glob("*"))]
            # In a folder that others may write to, a name proves nothing.
            if facts[0].st_uid == os.geteuid() and max(each.st_mtime for each in facts) < still:
                yield path


def clear(paths: Iterable[Path]) -> int:
    """Delete files and folders; gives how many."""
    count = 0
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        count += 1
    return count
