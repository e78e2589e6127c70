"""The database as one file: copied out of a database that is in use, and put back into an empty one.

SQLite is copied by its own online backup, PostgreSQL by its own pg_dump and pg_restore, which must be on the PATH.
"""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from sqlalchemy import func, inspect, make_url, select
from sqlalchemy.orm import Session

from coordinator import schema
from coordinator.database import Database, open_engine, sqlite_file
from protocol import errors

OPTIONS = ("--no-owner", "--no-privileges")  # whoever restores it owns it
Look = Callable[[Session], set[str]]


def name(url: str) -> str:
    """What the copy of a database of this kind is called."""
    return "database.dump" if sqlite_file(url) is None else "database.sqlite"


def write(url: str, path: Path, look: Look) -> set[str]:
    """Copy the database as it is at one moment; gives what `look` sees in it at that very moment."""
    path.unlink(missing_ok=True)
    file = sqlite_file(url)
    if file is None:
        return _dump(url, path, look)
    _copy(file, path, "mode=ro")
    return _seen(f"sqlite:///{path}", look)


def unpack(file: Path, path: Path, look: Look) -> tuple[Path, set[str]]:
    """Lay a copy of SQLite beside the file that it shall become, at this program's schema; gives where, and what `look` sees in it.

    Raises Conflict where the copy is of a newer program.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.new")
    for suffix in ("", "-wal", "-shm", "-journal"):  # of a try that was cut off
        new.with_name(new.name + suffix).unlink(missing_ok=True)
    _copy(path, new, "immutable=1")  # it may lie where nothing can be written
    schema.migrate(f"sqlite:///{new}")
    return new, _seen(f"sqlite:///{new}", look)


def read(url: str, path: Path, look: Look) -> set[str]:
    """Put a dump into a PostgreSQL database that `is_empty`, whole or not at all, and at this program's schema; gives what `look` sees."""
    _postgres(url, "pg_restore", *OPTIONS, "--single-transaction", "--exit-on-error", str(path))
    schema.migrate(url)
    return _seen(url, look)


def is_empty(url: str) -> bool:
    """Whether there is nothing yet that a copy could overwrite: no file, or no tables."""
    file = sqlite_file(url)
    if file is not None:
        # A log that another database left behind would be played into the new one.
        return not any(file.with_name(file.name + suffix).exists() for suffix in ("", "-wal", "-journal"))
    engine = open_engine(url)
    try:
        return not inspect(engine).get_table_names()
    finally:
        engine.dispose()


def _seen(url: str, look: Look) -> set[str]:
    database = Database(url)
    try:
        with database.read() as session:
            return look(session)
    finally:
        database.close()


def _copy(file: Path, to: Path, how: str) -> None:
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?{how}", uri=True)) as source, closing(sqlite3.connect(to)) as copy:
        source.backup(copy)


def _dump(url: str, path: Path, look: Look) -> set[str]:
    engine = open_engine(url)
    try:
        with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection, Session(connection) as session:
            moment = session.scalar(select(func.pg_export_snapshot()))
            _postgres(url, "pg_dump", *OPTIONS, "--format=custom", f"--snapshot={moment}", f"--file={path}")
            return look(session)
    finally:
        engine.dispose()


def _postgres(url: str, program: str, *words: str) -> None:
    """Run one of PostgreSQL's programs on the database; the password goes through a file, not through the list of processes."""
    if shutil.which(program) is None:
        raise errors.Unavailable(f"{program} is not on the PATH; install PostgreSQL's client programs, as new as the server")
    where = make_url(url).set(drivername="postgresql")
    with tempfile.NamedTemporaryFile("w", prefix="hlora-") as file:  # readable by its owner only, as the programs want it
        password = where.normalized_query.get("password", (where.password,))[-1]  # an option counts more than what is before the @
        if password is not None:
            file.write("*:*:*:*:" + password.replace("\\", "\\\\").replace(":", "\\:"))
            file.flush()
            where = where.set(password=None).difference_update_query(["password"]).update_query_dict({"passfile": file.name})
        place = where.render_as_string(hide_password=False)
        done = subprocess.run([program, *words, f"--dbname={place}"], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise errors.Unavailable(f"{program} failed: {' '.join(done.stderr.split())[:1000]}")
