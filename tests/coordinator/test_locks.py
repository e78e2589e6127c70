"""Many writers on PostgreSQL: none waits for another in a circle, and events are numbered in the order of their commits."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import event, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from coordinator import access, clients, errands, events, handout, publishing, tables
from coordinator.database import LAST, Database
from coordinator.desk import Desk
from coordinator.errands import Renewing
from coordinator.jobs import Holder
from protocol import errors
from protocol.messages import Progress, Renewal
from protocol.states import JobKind, JobState, RoundState, RunState
from tests.federation import make_plan

pytestmark = pytest.mark.postgres
NOW = datetime(2026, 1, 1, tzinfo=UTC)
FLEET, TIMES, LATE = 300, 80, 60
PROGRESS = Progress(epoch=1, phase="train", step=1, steps=2)
TRAINING = (tables.Job.round_id == 1, tables.Job.kind == JobKind.train)
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
        errands.renew(session, [Renewing(job, PROGRESS) for job in chance.sample(jobs, 100)], NOW)
        raise Undone

    def ended(session: Session) -> None:
        assert handout.end(session, *TRAINING, state=JobState.cancelled, reason="the test says so", now=NOW) == FLEET
        raise Undone

    all_at_once(database, renewed, ended)


async def test_a_batch_of_several_kinds_is_committed_while_a_round_ends(database: Database, jobs: list[Holder]) -> None:
    """Each kind takes its jobs in order; kind after kind, a batch would take a later client's job before an earlier one's."""
    chance, other, desk = random.Random(2), random.Random(4), Desk(database)
    failed: list[BaseException] = []
    event.listen(database.engine, "handle_error", lambda context: failed.append(context.original_exception))

    def again(session: Session, brought: Sequence[Renewing], now: datetime) -> Sequence[Renewal | errors.HLoRAError]:
        return errands.renew(session, brought, now)

    def ended(session: Session) -> None:
        some = tables.Job.client_id.in_([job.client for job in other.sample(jobs, 100)])  # of all, one would begin where a batch begins
        handout.end(session, *TRAINING, some, state=JobState.cancelled, reason="the test says so", now=NOW)
        raise Undone

    ending = asyncio.create_task(asyncio.to_thread(all_at_once, database, ended))
    while not ending.done():
        works = [(job, chance.choice((errands.renew, again))) for job in chance.sample(jobs, 100)]
        await asyncio.gather(*(desk.bring(work, job.client, Renewing(job, PROGRESS)) for job, work in works))
    await ending
    assert not failed


def test_a_round_that_ends_what_is_overdue_takes_its_other_jobs_with_them(database: Database, jobs: list[Holder]) -> None:
    """Those that are overdue first and the others later would be in no order."""
    chance = random.Random(3)
    with database.write() as session:
        last = max(job.client for job in jobs)
        session.execute(update(tables.Job).where(tables.Job.client_id == last).values(lease_until=NOW - timedelta(seconds=1)))

    def renewed(session: Session) -> None:
        errands.renew(session, [Renewing(job, PROGRESS) for job in chance.sample(jobs, 100)], NOW)
        raise Undone

    def ended(session: Session) -> None:
        handout.expire(session, session.get_one(tables.Run, "run-1"), NOW)
        assert handout.end(session, *TRAINING, state=JobState.cancelled, reason="the test says so", now=NOW) == FLEET - 1
        raise Undone

    all_at_once(database, renewed, ended)


def test_a_round_is_given_back_while_its_run_is_stopped(database: Database, jobs: list[Holder]) -> None:
    with database.write() as session:
        session.execute(update(tables.Round).values(state=RoundState.merging, merge_epoch=1))

    def given_back(session: Session) -> None:
        publishing.give_back(session, publishing.Claim(1, 1), NOW, "the store is away")
        raise Undone

    def stopped(session: Session) -> None:
        session.get_one(tables.Run, "run-1", with_for_update={"key_share": True})
        session.execute(update(tables.Round).values(reason="the test says so"))
        raise Undone

    all_at_once(database, given_back, stopped)


def test_the_server_lets_go_of_what_a_coordinator_that_hangs_holds(database: Database) -> None:
    for _ in range(2):  # a connection that comes back from the pool was rolled back
        with database.write() as session:
            assert session.scalar(text("show idle_in_transaction_session_timeout")) == "1min"


def test_a_connection_that_the_server_ended_is_a_database_that_is_away(database: Database) -> None:
    """So that what was under way is done again, and no run fails for it."""
    with database.write() as session:
        session.execute(text("set local idle_in_transaction_session_timeout = '50ms'"))
        time.sleep(1)
        with pytest.raises(OperationalError, match="idle-in-transaction"):
            session.execute(text("select 1"))
        session.rollback()
    with database.write() as session:
        assert session.scalar(text("select 1")) == 1


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
