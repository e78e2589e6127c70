"""A bell that is rung in one coordinator is heard in all others of the same PostgreSQL."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from sqlalchemy import text

from coordinator.bell import Bell
from coordinator.database import Database
from coordinator.relay import NAME, relaying

pytestmark = pytest.mark.postgres
LATE = 20  # seconds; whoever is woken only then was not woken
OURS = f"application_name = '{NAME}' and datname = current_database()"


@contextmanager
def bells(url: str, count: int) -> Iterator[list[Bell]]:
    """Bells of as many coordinators, all of which listen."""
    database, found = Database(url), [Bell() for _ in range(count)]
    with ExitStack() as open:
        open.callback(database.close)
        for bell in found:
            open.enter_context(relaying(database.engine, bell))
        all_listen(database, count)
        end = time.monotonic() + LATE
        while not all(bell.rings for bell in found):  # whose connection is new wakes all once, those who come just now too
            assert time.monotonic() < end
            time.sleep(0.01)
        yield found


def all_listen(database: Database, count: int) -> None:
    """Return when as many coordinators listen; fail when they never do."""
    end = time.monotonic() + LATE
    while True:
        with database.read() as session:
            if session.scalar(text(f"select count(*) from pg_stat_activity where state = 'idle' and {OURS}")) == count:
                return
        assert time.monotonic() < end
        time.sleep(0.01)


async def test_whoever_waits_anywhere_is_woken_and_nobody_else(postgres_url: str) -> None:
    with bells(postgres_url, 3) as (here, there, elsewhere), there.listen("b") as other:
        with here.listen("a") as near, there.listen("a") as far, elsewhere.listen("a") as farther:
            here.ring(["a"])

            assert all(await asyncio.gather(near.rung(LATE), far.rung(LATE), farther.rung(LATE)))
        assert not await other.rung(0.2)


async def test_a_whole_fleet_is_woken_however_long_its_names_are_together(postgres_url: str) -> None:
    """Far more ids than one notification may hold."""
    fleet = [f"client-{number:016x}" for number in range(2000)]
    with bells(postgres_url, 2) as (here, there), ExitStack() as open:
        ears = [open.enter_context(there.listen(client)) for client in fleet]

        here.ring(fleet)

        assert all(await asyncio.gather(*(ear.rung(LATE) for ear in ears)))


async def test_rings_are_heard_again_when_the_connection_was_lost(postgres_url: str) -> None:
    database = Database(postgres_url)
    with bells(postgres_url, 2) as (here, there):
        with there.listen("a") as ear:
            with database.write() as session:
                session.execute(text(f"select pg_terminate_backend(pid) from pg_stat_activity where {OURS}"))

            assert await ear.rung(LATE), "what was rung meanwhile was not heard, so all shall look"
        await asyncio.to_thread(all_listen, database, 2)
        with there.listen("a") as ear:
            here.ring(["a"])

            assert await ear.rung(LATE)
    database.close()


async def test_the_end_of_one_coordinator_ends_no_other_ones_polls(postgres_url: str) -> None:
    with bells(postgres_url, 2) as (here, there), here.listen("a") as near, there.listen("a") as far:
        here.close()

        assert not await near.rung(LATE)
        assert not await far.rung(0.2)
