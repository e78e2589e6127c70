"""Where polls that have to write come together: one transaction for all that stand here at the same moment.

A round that opens wakes a whole fleet at once, and every agent's question is a sign that it is there. One transaction for each
would keep the database busy with being durable. Whoever comes while one transaction is under way goes into the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.exc import SQLAlchemyError

from coordinator import clients, leasing
from coordinator.database import Database
from protocol import crash
from protocol.crash import Point
from protocol.messages import Job

log = structlog.get_logger()
LARGEST = 200  # clients served in one transaction
NOTED_EVERY = 1.0  # seconds: that a client waits without work is written so often, for all of them
Waiting = asyncio.Future[Job | None]


class Desk:
    """Hands jobs out to those who come, and writes down who was there. Used from one event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._standing: list[tuple[str, Waiting]] = []
        self._serving: asyncio.Task[None] | None = None
        self._noted: set[str] = set()
        self._noting: asyncio.Task[None] | None = None

    async def come(self, client: str) -> Job | None:
        """The client's next job under a fresh lease, if there is one; that it was here is written when this returns."""
        waiting: Waiting = asyncio.get_running_loop().create_future()
        self._standing.append((client, waiting))
        if self._serving is None or self._serving.done():
            self._serving = asyncio.create_task(self._serve())
        return await waiting

    def note(self, client: str) -> None:
        """Write down soon that the client is here. Should this process die before, it asks again anyway."""
        self._noted.add(client)
        if self._noting is None or self._noting.done():
            self._noting = asyncio.create_task(self._write_down())

    async def _serve(self) -> None:
        while self._standing:
            await self._hand(self._next_batch())

    async def _hand(self, batch: dict[str, Waiting]) -> None:
        try:
            jobs = await run_in_threadpool(self._hand_out, list(batch))
        except Exception as error:  # noqa: BLE001  # each hears of its own
            await self._apart(batch, error)
        else:
            for client, waiting in batch.items():
                if not waiting.done():  # its request may have been cancelled
                    waiting.set_result(jobs.get(client))

    async def _apart(self, batch: dict[str, Waiting], error: Exception) -> None:
        """What fails for one client shall not fail for the others."""
        if len(batch) > 1:
            for client, waiting in batch.items():
                await self._hand({client: waiting})
            return
        for waiting in batch.values():
            if not waiting.done():
                waiting.set_exception(error)

    def _next_batch(self) -> dict[str, Waiting]:
        """The first of each client: who asks twice at once gets two leases, one after the other."""
        batch: dict[str, Waiting] = {}
        rest: list[tuple[str, Waiting]] = []
        for client, waiting in self._standing:
            if client in batch or len(batch) == LARGEST:
                rest.append((client, waiting))
            else:
                batch[client] = waiting
        self._standing = rest
        return batch

    def _hand_out(self, batch: Sequence[str]) -> dict[str, Job]:
        with self._database.write() as session:
            now = self._database.clock(session)
            jobs = leasing.hand_out(session, batch, now)
            clients.all_seen(session, batch, now)  # after the jobs, as everywhere: two requests that wait for each other would never end
        for _ in jobs:
            crash.reached(Point.job_leased)
        return jobs

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
