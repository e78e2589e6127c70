"""Two ways to touch the database: `read()` and `write()`, each one short transaction; and the clock that all share.

On SQLite a writer takes the write lock when it begins (BEGIN IMMEDIATE): a transaction that reads first and writes later
would otherwise fail, not wait, when another writer came between.
"""

from __future__ import annotations

import fcntl
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import URL, Connection, create_engine, event, make_url, text
from sqlalchemy.engine import Engine, ExceptionContext
from sqlalchemy.exc import ArgumentError, OperationalError
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry

from protocol import crash, errors

Clock = Callable[[Session], datetime]
Last = Callable[[Session], Sequence[str]]  # what a transaction does before it commits; gives the crash points behind that
LAST = "last"  # where it stands in a session's `info`
# Of a server that vanished without a word nothing is heard; the operating system asks after it.
ALIVE: dict[str, Any] = {"keepalives_idle": 15, "keepalives_interval": 5, "keepalives_count": 3, "connect_timeout": 10}
# Nor does the server hear of a coordinator that vanished or hangs, whose open transaction would keep its rows from all others.
WATCHED = """
    set idle_in_transaction_session_timeout = '60s';
    set tcp_keepalives_idle = 15; set tcp_keepalives_interval = 5; set tcp_keepalives_count = 3
"""


def database_clock(session: Session) -> datetime:
    """The database's own time, so that several coordinators agree."""
    if session.get_bind().dialect.name == "sqlite":
        value = session.scalar(text("select strftime('%Y-%m-%d %H:%M:%f', 'now')"))
        return datetime.fromisoformat(str(value)).replace(tzinfo=UTC)
    now = session.scalar(text("select clock_timestamp()"))
    assert isinstance(now, datetime)
    return now.astimezone(UTC)


def open_engine(url: str) -> Engine:
    """An engine for SQLite (a file, write-ahead log) or PostgreSQL (psycopg 3).

    Raises InvalidRequest for any other URL, and for a file whose folder cannot be made.
    """
    parsed, file = _parsed(url), sqlite_file(url)
    if file is None:
        parsed, alive = parsed.set(drivername="postgresql+psycopg"), {key: ALIVE[key] for key in ALIVE.keys() - parsed.query.keys()}
        return create_engine(parsed, connect_args=alive, pool_pre_ping=True, pool_size=20, max_overflow=20)
    with _writable(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(parsed, connect_args={"timeout": 30}, pool_size=20, max_overflow=30)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _parsed(url: str) -> URL:
    with suppress(ArgumentError, ValueError):  # the latter for a port that is no number
        parsed = make_url(url)
        if parsed.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
            return parsed
        if parsed.drivername == "sqlite" and parsed.database not in (None, "", ":memory:"):
            return parsed
    # The URL is not repeated: it may hold a password.
    raise errors.InvalidRequest("a database is sqlite:///FILE or postgresql://USER@HOST/NAME; this URL is neither")


def place(url: URL) -> str:
    """Where a database is, for the log: without user and options, of which a password may be one."""
    return URL.create(url.drivername, host=url.host, port=url.port, database=url.database).render_as_string()


def sqlite_file(url: str) -> Path | None:
    """The file of a SQLite database; none for PostgreSQL. Raises InvalidRequest for any other URL."""
    parsed = _parsed(url)
    return Path(str(parsed.database)) if parsed.get_backend_name() == "sqlite" else None


@contextmanager
def claimed(url: str) -> Iterator[None]:
    """Keep other coordinators from a SQLite file while the block lasts, and no other command; PostgreSQL serves any number.

    Raises Conflict if another coordinator is at work on the file, InvalidRequest if nothing can be written beside it.
    """
    file = sqlite_file(url)
    if file is None:
        yield
        return
    with _writable(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        held = file.with_name(f"{file.name}.lock").open("a")
    with held as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when the process ends, however it ends
        except BlockingIOError:
            raise errors.Conflict(
                f"another coordinator is at work on {file}, and one SQLite file serves one: stop that one first, or "
                "set HLORA_COORDINATOR_DATABASE_URL to a PostgreSQL database, which serves several"
            ) from None
        yield


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Raises InvalidRequest, with what to do, where the block cannot write in a folder."""
    try:
        yield
    except OSError as error:
        raise errors.InvalidRequest(
            f"{folder} cannot be the database's folder ({error.strerror}): name one that can be written to, by HLORA_COORDINATOR_DATA "
            "or HLORA_COORDINATOR_DATABASE_URL, or mend its permissions"
        ) from None


def _prepare_sqlite(connection: sqlite3.Connection, _: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # the driver shall not begin transactions by itself; _begin_sqlite does
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=30000"):
        connection.execute(f"PRAGMA {pragma}")


def _watch(connection: psycopg.Connection, _: ConnectionPoolEntry) -> None:
    connection.execute(WATCHED)
    connection.commit()


def _away(context: ExceptionContext) -> None:
    """A connection that was ended for idling is a database that is away, though PostgreSQL's driver has another class for it."""
    found = context.original_exception
    if context.is_disconnect and not isinstance(found, psycopg.OperationalError):
        raise OperationalError(context.statement, context.parameters, found, connection_invalidated=True) from found


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")


class Database:
    """Short transactions on one engine."""

    def __init__(self, url: str, clock: Clock = database_clock) -> None:
        self.engine = open_engine(url)
        if self.engine.dialect.name == "postgresql":
            event.listen(self.engine, "connect", _watch)
            event.listen(self.engine, "handle_error", _away)
        self.clock = clock
        self._readers = sessionmaker(self.engine, expire_on_commit=False)
        self._writers = sessionmaker(self.engine.execution_options(writes=True), expire_on_commit=False)
        # SQLite lets one write at a time, and who waits for it sleeps and tries again: here the next one goes on at once.
        self._turn = threading.Lock() if self.engine.dialect.name == "sqlite" else None

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that changes nothing."""
        with self._readers() as session:
            yield session

    @contextmanager
    def write(self, point: crash.Point | None = None) -> Iterator[Session]:
        """A transaction that is committed when the block ends, and rolled back when it raises.

        After the commit it reaches the crash points of what it did last, and its own.
        """
        with self._turn or nullcontext(), self._writers.begin() as session:
            yield session
            last: Last | None = session.info.get(LAST)
            points = last(session) if last else []
        for reached in (*points, *([point] if point else [])):
            crash.reached(reached)

    def close(self) -> None:
        self.engine.dispose()
