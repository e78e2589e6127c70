"""Where small writes come together: one transaction for all that are brought while another one is under way.

A round that opens wakes a whole fleet at once, and every agent's question is a sign that it is there; then their slices come, and
their results. One transaction for each would keep the database busy with being durable. Who is told that something is done is told
after the commit, as if it had been alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import structlog
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session

from coordinator import clients, jobs, leasing, tables
from coordinator.database import Database
from coordinator.leasing import Asking, Glance
from protocol import crash
from protocol.crash import Point
from protocol.errors import HLoRAError
from protocol.messages import Job

log = structlog.get_logger()
LARGEST = 200  # errands in one transaction
NOTED_EVERY = 1.0  # seconds: that a client waits without work is written so often, for all of them
T = TypeVar("T")
R = TypeVar("R")
# What is done for some clients, in the order of their ids, each with something of its own: what came of it, or why it is refused.
# It may be done again before it is committed, so it touches nothing but the session, and a refusal has written nothing.
Work = Callable[[Session, Sequence[T], datetime], Sequence[R | HLoRAError]]


@dataclass(frozen=True, eq=False)
class _Errand:
    work: Work[Any, Any]
    client: str
    thing: Any
    point: Point | None
    outcome: asyncio.Future[Any]

    def tell(self, outcome: object) -> None:
        if self.outcome.done():  # its request was cancelled
            return
        if isinstance(outcome, Exception):
            self.outcome.set_exception(outcome)
        else:
            self.outcome.set_result(outcome)


class Desk:
    """Does what clients bring, and writes down who was there. Used from one event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._standing: list[_Errand] = []
        self._serving: asyncio.Task[None] | None = None
        self._noted: set[str] = set()
        self._noting: asyncio.Task[None] | None = None
        self._asking: dict[Asking, asyncio.Future[Glance | None]] = {}
        self._looking: asyncio.Task[None] | None = None

    async def look(self, digest: str, job: str | None = None) -> Glance | None:
        """Whose the credential of that digest is, whether there may be work, and a job; nothing if it is no client's, or was revoked.

        All who ask while one look is under way are looked up in the next one: nobody is told what was true before they asked.
        """
        question = Asking(digest, job)
        asking = self._asking.get(question)
        if asking is None:
            asking = self._asking[question] = asyncio.get_running_loop().create_future()
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        return await asyncio.shield(asking)

    async def bring(self, work: Work[T, R], client: str, thing: T, point: Point | None = None) -> R:
        """What came of it, once that is committed and the crash point behind it is passed. Raises the refusal, if it was one."""
        errand = _Errand(work, client, thing, point, asyncio.get_running_loop().create_future())
        self._standing.append(errand)
        if self._serving is None or self._serving.done():
            self._serving = asyncio.create_task(self._serve())
        found: R = await errand.outcome
        return found

    async def come(self, client: str) -> Job | None:
        """The client's next job under a fresh lease, if there is one; that it was here is written when this returns."""
        return await self.bring(_hand_out, client, client, Point.job_leased)

    def note(self, client: str) -> None:
        """Write down soon that the client is here. Should this process die before, it asks again anyway."""
        self._noted.add(client)
        if self._noting is None or self._noting.done():
            self._noting = asyncio.create_task(self._write_down())

    async def _look(self) -> None:
        while self._asking:
            asking, self._asking = self._asking, {}
            try:
                found = await run_in_threadpool(self._glances, list(asking))
            except Exception as error:  # noqa: BLE001  # it is theirs who asked
                for outcome in asking.values():
                    outcome.set_exception(error)
            else:
                for question, outcome in asking.items():
                    outcome.set_result(found.get(question))

    def _glances(self, asked: Sequence[Asking]) -> dict[Asking, Glance]:
        with self._database.read() as session:
            return leasing.glances(session, asked)

    async def _serve(self) -> None:
        while self._standing:
            batch = self._next_batch()
            error = await self._carry_out(batch)
            if error is not None:
                await self._apart(batch, error)

    def _next_batch(self) -> list[_Errand]:
        """The first of each client: who asks twice at once gets two leases, one after the other."""
        batch: dict[str, _Errand] = {}
        rest: list[_Errand] = []
        for errand in self._standing:
            if errand.client in batch or len(batch) == LARGEST:
                rest.append(errand)
            else:
                batch[errand.client] = errand
        self._standing = rest
        return [batch[client] for client in sorted(batch)]

    async def _carry_out(self, batch: Sequence[_Errand]) -> Exception | None:
        """Do a batch, all of it or nothing; gives why nothing was done."""
        try:
            outcomes = await run_in_threadpool(self._commit, batch)
        except Exception as error:  # noqa: BLE001  # each hears of its own
            return error
        for errand in batch:
            errand.tell(outcomes[errand])
        return None

    async def _apart(self, batch: Sequence[_Errand], error: Exception | None) -> None:
        """What fails for one client shall not fail for the others; where the database is away it fails for all, at once."""
        for n, errand in enumerate(batch):
            if len(batch) == 1 or (isinstance(error, OperationalError) and not await run_in_threadpool(self._answers)):
                for waiting in batch[n:]:
                    waiting.tell(error)
                return
            if not errand.outcome.done():
                error = await self._carry_out([errand])
                if error is not None:
                    errand.tell(error)

    def _answers(self) -> bool:
        with suppress(SQLAlchemyError), self._database.write() as session:
            self._database.clock(session)
            return True
        return False

    def _commit(self, batch: Sequence[_Errand]) -> dict[_Errand, object]:
        outcomes: dict[_Errand, object] = {}
        with self._database.write() as session:
            now = self._database.clock(session)
            works = list(dict.fromkeys(errand.work for errand in batch))
            if len(works) > 1:  # each takes its clients' jobs in order; one after the other they would not
                jobs.lock(session, tables.Job.client_id.in_([errand.client for errand in batch]), jobs.UNSETTLED)
            for work in works:
                group = [errand for errand in batch if errand.work == work]
                outcomes |= zip(group, work(session, [errand.thing for errand in group], now), strict=True)
        for errand, outcome in outcomes.items():
            if errand.point is not None and outcome is not None and not isinstance(outcome, HLoRAError):
                crash.reached(errand.point)
        return outcomes

    async def _write_down(self) -> None:
        while self._noted:
            noted, self._noted = sorted(self._noted), set()
            await run_in_threadpool(self._see, noted)
            await asyncio.sleep(NOTED_EVERY)

    def _see(self, noted: Sequence[str]) -> None:
        try:
            with self._database.write() as session:
                clients.all_seen(session, noted, self._database.clock(session))
        except SQLAlchemyError as error:
            log.warning("presence-not-written", clients=len(noted), reason=str(error.__cause__ or error))


def _hand_out(session: Session, ids: Sequence[str], now: datetime) -> list[Job | HLoRAError | None]:
    given = leasing.hand_out(session, ids, now)
    clients.all_seen(session, ids, now)  # after the jobs, as everywhere: two requests that wait for each other would never end
    return [given.get(client) for client in ids]
