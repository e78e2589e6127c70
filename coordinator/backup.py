"""Everything that a coordinator must not lose, copied to a folder beside its work, and put back.

    FOLDER/database.sqlite or database.dump    the rows, as they were at one moment
    FOLDER/blobs/                              every blob that those rows need

The database is copied first: a row is written only when its blobs are there, and blobs never change. The copy gets its name
when its blobs are complete, so whatever interrupts a backup, the one before it stays whole. Putting back goes the other way
round, for the same reason; which blobs must be there, the rows say and not the folder, which may have lost some.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from coordinator import dumps, sweeping
from coordinator.blobs import Blobs
from coordinator.database import sqlite_file
from coordinator.verification import READ, state
from protocol import errors

TRIES = 3
Tell = Callable[[str], None]  # told how far it is, often


@dataclass(frozen=True)
class Copied:
    """What a backup or its way back came to."""

    database: str  # where the copy of the database is
    blobs: int = 0  # there now, every one held against its digest
    new: int = 0  # of these, copied this time
    bytes: int = 0  # of the new ones
    lost: tuple[str, ...] = ()  # the rows need them, and they are missing, or damaged, where they were to be copied from
    placed: bool = True  # the database is where it was to go

    def line(self) -> str:
        """For a person."""
        said = f"{self.database}: the database, and {self.blobs} blobs, {self.new} of them new ({self.bytes:,} bytes)"
        said += f"; LOST: {', '.join(self.lost)}" if self.lost else "; all sound"
        return said if self.placed else f"{said}; the database was NOT put in place: complete the backup and repeat, or add --incomplete"


def back_up(url: str, store: Blobs, folder: Path, tell: Tell) -> Copied:
    """Copy a database that may be in use, and the blobs that it names, to a folder; what is there already is not copied again.

    Raises InvalidRequest where the folder is the coordinator's own; Unavailable where the database cannot be copied.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    where = (folder / "blobs").absolute().as_uri()
    if where == store.url:
        raise errors.InvalidRequest(f"{folder} is where the coordinator keeps its blobs; a backup needs a folder of its own")
    target, copy = Blobs.open(where), folder / dumps.name(url)
    new = copy.with_name(f"{copy.name}.new")
    done = Copied(str(copy))
    for _ in range(TRIES):
        needed = dumps.write(url, new, sweeping.every_named)
        done = _copy_all(store, target, needed, folder, tell, done)
        if not done.lost:
            break
        # Given up and swept while this went on? Then a newer copy of the rows needs them no more.
    new.replace(copy)
    return done


def restore(url: str, store: Blobs, folder: Path, spool: Path, tell: Tell, *, incomplete: bool = False) -> Copied:
    """Put a backup into an empty database, at this program's schema, and a store of blobs; may be repeated until it succeeds.

    Where blobs that the rows need are lost, SQLite's database stays out unless `incomplete` wants it all the same.
    Raises NotFound where the folder holds no backup of this kind of database, Conflict where there is a database already.
    """
    copy = folder / dumps.name(url)
    if not copy.exists():
        raise errors.NotFound(f"{folder} holds no {copy.name}: it is no backup of this kind of database")
    if not dumps.is_empty(url):
        raise errors.Conflict(
            "there is a database already, or what one left behind, and nothing is overwritten: name an empty one, or move that one away"
        )
    spool.mkdir(parents=True, exist_ok=True)
    source, file, done = Blobs.open((folder / "blobs").absolute().as_uri()), sqlite_file(url), Copied(str(copy))
    if file is None:
        return _restore_dump(url, copy, source, store, spool, tell, done)
    new, needed = dumps.unpack(file, copy, sweeping.every_named)
    done = _copy_all(source, store, needed, spool, tell, done)
    if done.lost and not incomplete:
        new.unlink()
        return replace(done, placed=False)
    new.replace(file)
    return done


def _restore_dump(url: str, copy: Path, source: Blobs, store: Blobs, spool: Path, tell: Tell, before: Copied) -> Copied:
    """PostgreSQL's dump says what it needs only when it is in place: first comes all that there is, then what is still missing."""
    held = {blob.digest for blob in source.digests()}
    done = _copy_all(source, store, held, spool, tell, before)
    needed = dumps.read(url, copy, sweeping.every_named)
    done = _copy_all(source, store, needed - (held - set(done.lost)), spool, tell, done)
    return replace(done, blobs=len(needed) - len(done.lost))


def _copy_all(source: Blobs, target: Blobs, digests: set[str], spool: Path, tell: Tell, before: Copied) -> Copied:
    """Have every blob in the target, sound; gives what is there then, and what is new since `before` too."""
    lost, sizes = [], []
    for number, digest in enumerate(sorted(digests), 1):
        tell(f"blob {number} of {len(digests)}")
        found = state(target, digest)
        if found == "sound":
            continue
        if found == "damaged":
            target.delete(digest)  # a blob that is there is not written again
        size = _copy(source, target, digest, spool)
        if size is None:
            lost.append(digest)
        else:
            sizes.append(size)
    blobs = len(digests) - len(lost)
    return replace(before, blobs=blobs, new=before.new + len(sizes), bytes=before.bytes + sum(sizes), lost=tuple(lost))


def _copy(source: Blobs, target: Blobs, digest: str, spool: Path) -> int | None:
    """One blob; gives its length in bytes, or none where the source has it no more, or damaged."""
    with tempfile.NamedTemporaryFile(dir=spool, prefix="upload-") as file:  # so called, housekeeping clears it away after a crash
        hashed = hashlib.sha256()
        try:
            for chunk in source.chunks(digest, size=READ):
                hashed.update(chunk)
                file.write(chunk)
        except errors.NotFound:
            return None
        file.flush()
        return target.put_file(Path(file.name), digest).bytes if digest == f"sha256:{hashed.hexdigest()}" else None
