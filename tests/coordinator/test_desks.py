"""What is brought to the desk shares a transaction, and each is as if it were alone: done or refused, told after the commit."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator, Sequence
from datetime import datetime

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session

from coordinator import access
from coordinator.database import Database
from coordinator.desk import LARGEST, Desk
from coordinator.tables import Event
from protocol import errors
from protocol.errors import HLoRAError
from tests.federation import Federation, make_plan

SOON = 30  # seconds


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    found = Database(database_url)
    yield found
    found.close()


def write(session: Session, kinds: Sequence[str], now: datetime) -> list[str | HLoRAError]:
    """Work that leaves a row for each, and gives its name; of what is called so it is refused, or breaks."""
    if "broken" in kinds:
        session.add(Event(at=now, kind="broken", facts={}))
        session.execute(text("select nothing from nowhere"))
    refused = {kind: errors.Conflict("not now") for kind in kinds if kind == "refused"}
    session.add_all(Event(at=now, kind=kind, facts={"together": len(kinds)}) for kind in kinds if kind not in refused)
    return [refused.get(kind, kind) for kind in kinds]


def count(session: Session, kinds: Sequence[str], _: datetime) -> list[int]:
    """Other work: how many rows there are, those of the same transaction among them."""
    session.flush()
    return [session.scalar(select(func.count()).select_from(Event)) or 0] * len(kinds)


def rows(database: Database) -> dict[str, int]:
    """The rows that are there, each with how many were written together with it."""
    with database.read() as session:
        return {event.kind: event.facts["together"] for event in session.scalars(select(Event))}


async def all_at_once(database: Database, kinds: Sequence[str]) -> list[object]:
    """What comes of them, each from a client of that name; the first is under way when the others come."""
    desk = Desk(database)
    return list(await asyncio.wait_for(asyncio.gather(*(desk.bring(write, kind, kind) for kind in kinds), return_exceptions=True), SOON))


async def test_a_write_is_committed_when_it_is_told(database: Database) -> None:
    assert await Desk(database).bring(write, "client", "alone") == "alone"
    assert rows(database) == {"alone": 1}


async def test_many_writes_at_once_are_all_done_and_each_hears_of_its_own(database: Database) -> None:
    names = [f"number {number}" for number in range(LARGEST + 70)]
    assert await all_at_once(database, names) == names
    assert sorted(rows(database)) == sorted(names)
    assert sorted(set(rows(database).values())) == [70, LARGEST]


async def test_two_things_of_one_client_are_done_one_after_the_other(database: Database) -> None:
    desk = Desk(database)
    assert await asyncio.gather(*(desk.bring(write, "client", f"number {number}") for number in range(3))) == [
        "number 0",
        "number 1",
        "number 2",
    ]
    assert list(rows(database).values()) == [1, 1, 1]


async def test_different_kinds_of_work_share_a_transaction(database: Database) -> None:
    desk = Desk(database)
    written, seen = await asyncio.gather(desk.bring(write, "a", "row"), desk.bring(count, "b", "rows"))
    assert (written, seen) == ("row", 1)


async def test_a_refusal_is_told_to_the_one_whose_it_is(database: Database) -> None:
    first, refused, last = await all_at_once(database, ["first", "refused", "last"])
    assert (first, last) == ("first", "last")
    assert isinstance(refused, errors.Conflict)
    assert rows(database) == {"first": 3, "last": 3}


async def test_a_defect_is_told_to_the_one_whose_it_is_and_the_others_are_done_once(database: Database) -> None:
    first, broken, last = await all_at_once(database, ["first", "broken", "last"])
    assert (first, last) == ("first", "last")
    assert "nowhere" in str(broken)
    assert rows(database) == {"first": 1, "last": 1}


async def test_where_the_database_is_away_all_hear_of_it_at_once(database: Database) -> None:
    """Nobody tries for one after the other what fails for all; nor, where it answers, for who stopped waiting."""
    attempts: list[str] = []

    def broken(session: Session, kinds: Sequence[str], _: datetime) -> list[str]:
        attempts.extend(kinds)
        database.clock = unanswered
        raise OperationalError("select", None, ConnectionError("nobody answers"))

    def unanswered(_: Session) -> datetime:
        raise OperationalError("select", None, ConnectionError("nobody answers"))

    desk, clock = Desk(database), database.clock
    told = await asyncio.wait_for(asyncio.gather(*(desk.bring(broken, c, c) for c in "abc"), return_exceptions=True), SOON)

    assert [type(outcome) for outcome in told] == [OperationalError] * 3
    assert attempts == ["a", "b", "c"]
    database.clock = clock
    assert await desk.bring(write, "next", "next") == "next"


async def test_where_the_database_goes_away_meanwhile_the_others_hear_of_it_at_once(database: Database) -> None:
    attempts: list[list[str]] = []

    def broken(session: Session, kinds: Sequence[str], _: datetime) -> list[str]:
        attempts.append(list(kinds))
        if len(kinds) > 1:
            raise ValueError("of one of them, perhaps")
        database.clock = unanswered
        raise OperationalError("select", None, ConnectionError("nobody answers"))

    def unanswered(_: Session) -> datetime:
        raise OperationalError("select", None, ConnectionError("nobody answers"))

    desk = Desk(database)
    told = await asyncio.wait_for(asyncio.gather(*(desk.bring(broken, c, c) for c in "abc"), return_exceptions=True), SOON)

    assert [type(outcome) for outcome in told] == [OperationalError] * 3
    assert attempts == [["a", "b", "c"], ["a"]]


async def test_who_stops_waiting_leaves_the_others_unharmed(database: Database) -> None:
    desk = Desk(database)
    gone, stays = (asyncio.ensure_future(desk.bring(write, kind, kind)) for kind in ("gone", "stays"))
    await asyncio.sleep(0)
    gone.cancel()
    assert await asyncio.wait_for(stays, SOON) == "stays"
    assert await desk.bring(write, "next", "next") == "next"


async def test_who_ask_at_once_are_each_told_who_they_are(federation: Federation) -> None:
    first, second, revoked = await federation.enrol_many(3)
    await federation.admin.change_client(revoked, state="revoked")
    await federation.open(make_plan(evaluation={"every": 0}, cohort={"target": 1, "quorum": 1}))
    digests = [access.digest(str(secret)) for secret in (first.secret, second.secret, revoked.secret, "hlc_nobody", first.secret)]

    told = await asyncio.wait_for(asyncio.gather(*(federation.parts.desk.look(digest) for digest in digests)), SOON)

    assert [found and found.client for found in told] == [first.id, second.id, None, None, first.id]
    assert sum(found.work for found in told[:2] if found is not None) == 1


async def test_jobs_are_looked_up_together_with_those_who_ask_about_them(federation: Federation) -> None:
    one, other = await federation.enrol_many(2)
    await federation.open(make_plan(evaluation={"every": 0}, cohort={"target": 2, "quorum": 2}))
    mine, theirs = await one.take(), await other.take()
    digest, asked = access.digest(str(one.secret)), (mine.id, theirs.id, None, "job-0000000000000000")

    told = await asyncio.wait_for(asyncio.gather(*(federation.parts.desk.look(digest, job) for job in asked)), SOON)

    assert [found and found.client for found in told] == [one.id] * 4
    assert [found and found.job and found.job.job.id for found in told] == [mine.id, theirs.id, None, None]


async def test_a_look_that_fails_is_told_to_all_who_asked_and_the_next_one_is_made(federation: Federation) -> None:
    (device,) = await federation.enrol_many(1)
    desk, digest = federation.parts.desk, access.digest(str(device.secret))
    with federation.parts.database.write() as session:
        session.execute(text("alter table clients rename to elsewhere"))

    outcomes = await asyncio.wait_for(asyncio.gather(*(desk.look(d) for d in (digest, "other")), return_exceptions=True), SOON)

    assert all(isinstance(outcome, DBAPIError) for outcome in outcomes)
    with federation.parts.database.write() as session:
        session.execute(text("alter table elsewhere rename to clients"))
    found = await asyncio.wait_for(desk.look(digest), SOON)
    assert found is not None
    assert found.client == device.id


async def test_nobody_is_told_of_a_write_that_could_not_be_committed(sqlite_url: str) -> None:
    """Somebody else holds the file for longer than anybody waits."""
    database = Database(sqlite_url)
    other = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    try:
        with database.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA busy_timeout=100")
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OperationalError, match="locked"):
            await Desk(database).bring(write, "client", "lost")
        other.execute("ROLLBACK")
        assert rows(database) == {}
        assert await Desk(database).bring(write, "client", "kept") == "kept"
    finally:
        other.close()
        database.close()
