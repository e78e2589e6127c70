"""Writes that share a transaction are each as if they were alone: done or refused, told after the commit, in nobody's way."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from coordinator.database import Database
from coordinator.tables import Event
from protocol import errors

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SOON = 10  # seconds


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    found = Database(database_url)
    yield found
    found.close()


def writes(kind: str) -> Callable[[Session], str]:
    """Work that leaves one row, and gives its name."""

    def work(session: Session) -> str:
        session.add(Event(at=NOW, kind=kind, facts={}))
        session.flush()
        return kind

    return work


def refuses(session: Session) -> str:
    writes("refused")(session)
    raise errors.Conflict("not now")


def breaks(session: Session) -> str:
    writes("broken")(session)
    session.execute(text("select nothing from nowhere"))
    return "never"


def kinds(database: Database) -> set[str]:
    with database.read() as session:
        return set(session.scalars(select(Event.kind)))


def all_at_once(database: Database, works: list[Callable[[Session], str]]) -> list[Future[str]]:
    """All of them begun while somebody else has the turn, so that on SQLite they wait for it together."""
    with ThreadPoolExecutor(len(works)) as pool:
        with database.write():
            begun = [pool.submit(database.together, work) for work in works]
            threading.Event().wait(0.2)
        wait(begun, SOON)
    return begun


def test_a_write_is_committed_when_it_is_told(database: Database) -> None:
    assert database.together(writes("alone")) == "alone"
    assert kinds(database) == {"alone"}


def test_many_writes_at_once_are_all_done_and_each_hears_of_its_own(database: Database) -> None:
    names = [f"number {number}" for number in range(120)]
    begun = all_at_once(database, [writes(name) for name in names])
    assert [future.result() for future in begun] == names
    assert kinds(database) == set(names)


def test_a_refusal_undoes_its_own_write_and_no_other(database: Database) -> None:
    first, refused, last = all_at_once(database, [writes("first"), refuses, writes("last")])
    assert (first.result(), last.result()) == ("first", "last")
    with pytest.raises(errors.Conflict, match="not now"):
        refused.result()
    assert kinds(database) == {"first", "last"}


def test_a_defect_is_told_to_the_one_whose_it_is_and_the_others_are_done_once(database: Database) -> None:
    first, broken, last = all_at_once(database, [writes("first"), breaks, writes("last")])
    assert (first.result(), last.result()) == ("first", "last")
    with pytest.raises(Exception, match="nowhere"):
        broken.result()
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Event)) == 2


def test_nobody_is_told_of_a_write_that_could_not_be_committed(sqlite_url: str) -> None:
    """Somebody else holds the file for longer than anybody waits."""
    database = Database(sqlite_url)
    other = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    try:
        with database.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA busy_timeout=100")
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OperationalError, match="locked"):
            database.together(writes("lost"))
        other.execute("ROLLBACK")
        assert kinds(database) == set()
        assert database.together(writes("kept")) == "kept"
    finally:
        other.close()
        database.close()
