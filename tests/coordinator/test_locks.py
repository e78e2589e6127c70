"""Many writers on PostgreSQL: none waits for another in a circle, and events are numbered in the order of their commits."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from coordinator import access, clients, errands, events, handout, tables
from coordinator.database import LAST, Database
from coordinator.errands import Renewing
from coordinator.jobs import Holder
from protocol.messages import Progress
from protocol.states import JobKind, JobState, RoundState, RunState
from tests.federation import make_plan

pytestmark = pytest.mark.postgres
NOW = datetime(2026, 1, 1, tzinfo=UTC)
FLEET, TIMES, LATE = 300, 80, 60
Work = Callable[[Session], object]


class Undone(Exception):
    """Raised to roll a transaction back."""


@pytest.fixture
def database(postgres_url: str) -> Iterator[Database]:
    found = Database(postgres_url)
    yield found
    found.close()


@pytest.fixture
def jobs(database: Database) -> list[Holder]:
    """Leased jobs of one round, one for each client, in no order; few of them the planner finds by an index, and many page by page."""
    same = {"labels": {}, "profile": {"long": 1500 * "x"}, "profiled_at": NOW, "last_seen": NOW, "enrolled_at": NOW}
    plan = make_plan().model_dump(mode="json")
    with database.write() as session:
        session.add(tables.Run(id="run-1", name="run", state=RunState.running, plan=plan, plan_digest="", created_at=NOW))
        session.flush()
        session.add(tables.Round(id=1, run_id="run-1", number=1, attempt=1, state=RoundState.open, opened_at=NOW, closes_at=NOW))
        ids = [access.new_id("client") for _ in range(FLEET)]
        session.add_all(tables.Client(id=id, name=id, digest=id, **same) for id in ids)
        session.flush()
        kept = {"round_id": 1, "kind": JobKind.train, "state": JobState.leased, "rank": 1, "rank_view": {}, "base": "", "base_bytes": 1}
        times = {"epoch": 1, "created_at": NOW, "deadline": NOW + timedelta(days=1)}
        found = [tables.Job(id=access.new_id("job"), client_id=id, **kept, **times) for id in ids]
        session.add_all(found)
    with database.engine.begin() as connection:
        connection.execute(text("analyze"))
    return [Holder(job.client_id, job.id, 1) for job in found]


def all_at_once(database: Database, *works: Work) -> None:
    """Each of them again and again, in transactions of its own; fails if one of them does."""
    failed: list[Exception] = []

    def repeat(work: Work) -> None:
        try:
            for _ in range(TIMES):
                with suppress(Undone), database.write() as session:
                    work(session)
        except Exception as error:  # noqa: BLE001  # of a thread nobody else would hear of it
            failed.append(error)

    threads = [threading.Thread(target=repeat, args=[work]) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_who_is_there_is_written_by_many_at_once(database: Database, jobs: list[Holder]) -> None:
    def seen(count: int) -> Work:
        chance = random.Random(count)
        return lambda session: clients.all_seen(session, [job.client for job in chance.sample(jobs, count)], NOW)

    all_at_once(database, *map(seen, (200, 150, 40, 5)))


def test_a_round_ends_while_its_jobs_are_renewed(database: Database, jobs: list[Holder]) -> None:
    chance = random.Random(1)

    def renewed(session: Session) -> None:
        errands.renew(session, [Renewing(job, Progress(epoch=1, phase="train", step=1, steps=2)) for job in chance.sample(jobs, 100)], NOW)
        raise Undone

    def ended(session: Session) -> None:
        mine = (tables.Job.round_id == 1, tables.Job.kind == JobKind.train)
        assert handout.end(session, *mine, state=JobState.cancelled, reason="the test says so", now=NOW) == FLEET
        raise Undone

    all_at_once(database, renewed, ended)


def test_the_server_lets_go_of_what_a_coordinator_that_hangs_holds(database: Database) -> None:
    for _ in range(2):  # a connection that comes back from the pool was rolled back
        with database.write() as session:
            assert session.scalar(text("show idle_in_transaction_session_timeout")) == "1min"


def test_who_was_told_the_newest_event_was_told_all_before_it(database: Database) -> None:
    """Of two transactions the one that noted first commits last; and one that is about to commit is waited for."""

    def told(after: int) -> list[tuple[int, str]]:
        with database.read() as session:
            return [(event.id, event.kind) for event in events.after(session, after, None)]

    def note(kind: str) -> None:
        with database.write() as session:
            events.record(session, NOW, kind)

    with database.write() as session:
        events.record(session, NOW, "first")
        note("second")
        ((newest, kind),) = told(0)
        assert kind == "second"
        numbered = session.info[LAST](session)
        assert numbered == ["first"]
        third = threading.Thread(target=note, args=["third"])
        third.start()
        until, waits = time.monotonic() + LATE, False
        while not waits and third.is_alive():
            assert time.monotonic() < until
            time.sleep(0.01)
            with database.read() as other:
                waits = bool(other.scalar(text("select count(*) from pg_locks where locktype = 'advisory' and not granted")))
        assert told(newest) == []
        session.info.pop(LAST)  # it is done
    third.join()
    assert [kind for _, kind in told(newest)] == ["first", "third"]
