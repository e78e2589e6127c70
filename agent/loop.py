"""The agent's loop: ask for a job, do it, answer it. Whatever happens to a job, the coordinator is told why.

ask ──▶ download ──▶ load ──▶ train ──▶ outbox ──▶ upload ──▶ answer ──▶ ask …
         └───────────┴──────────┴──▶ give back, with the reason: refused, failed, or the agent is stopping

What is in the outbox is kept until the coordinator has it, or has said that nobody wants it any more.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import structlog

from agent.client import Client
from agent.delivery import Courier, may_return
from agent.held import Held, Link
from agent.holding import Holder, Step, stopped
from agent.outbox import Entry, Outbox
from agent.policy import Policy
from agent.training import Train
from agent.working import Worker
from protocol import errors
from protocol.messages import Job, Profile

__all__ = ["Loop", "Step"]

T = TypeVar("T")
log = structlog.get_logger("agent")
LONGEST_REST = 300.0  # seconds between questions after jobs that this device could not do
HOPELESS = (errors.Unauthenticated, errors.Forbidden, errors.OutdatedAgent, errors.InvalidRequest)


@dataclass
class Loop:
    """One agent at work. Network, training and time are whatever it is built with."""

    client: Client
    train: Train
    policy: Policy
    folder: Path  # the agent's home, for work in progress and finished work
    wait_seconds: float = 20.0
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    clock: Callable[[], float] = monotonic
    now: Callable[[], datetime] = lambda: datetime.now().astimezone()
    chance: random.Random = field(default_factory=random.Random)
    pause_seconds: float = 0.0  # that the coordinator asked for with its last answer

    def __post_init__(self) -> None:
        self.outbox = Outbox(self.folder / "outbox")
        self.link = Link(self.policy.up_bytes_per_second)
        self._worker = Worker(self.client, self.train, self.folder / "work", self.outbox, self.clock)
        self._courier = Courier(self.client, self.outbox, self.link, self.clock, self.chance)
        self._holder = Holder(self.client, self.stopping, lambda: self.policy.check_hours(self.now().time()))

    async def run(self, profile: Profile) -> None:
        """Tell the profile, deliver what an earlier process left behind, then ask and work until told to stop.

        Raises Unauthenticated, Forbidden, OutdatedAgent, InvalidRequest: what asking again cannot mend.
        """
        told, delivered, failures = False, False, 0
        while not self.stopping.is_set():
            if not self._may_work():
                await self._rest(60.0)
                continue
            try:
                told = told or await self._unless_stopping(self.client.put_profile(profile)) is not None
                delivered = delivered or await self.deliver()
                if not delivered:
                    continue
                came = await self.step()
                # Of a job that is over the answer may be there all the same, or what was done be wanted again.
                delivered = came not in (Step.over, Step.kept)
            except HOPELESS:
                raise
            except errors.HLoRAError as error:
                log.warning("coordinator-unavailable", problem=error.slug(), detail=error.detail)
                came = Step.given_back
            failures = failures + 1 if came is Step.given_back else 0
            await self._rest(max(self.pause_seconds, self.growing(failures)))

    def growing(self, failures: int) -> float:
        """Seconds of rest after so many jobs in a row that this device could not do: doubling, and a little random."""
        return self.chance.uniform(0.5, 1.0) * min(LONGEST_REST, 2.0 ** min(failures, 10)) if failures else 0.0

    def _may_work(self) -> bool:
        return self.policy.may_work(self.now().time())

    async def _rest(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), seconds)

    async def deliver(self) -> bool:
        """Bring what waits in the outbox, under the leases that it was done under; gives true when all was tried.

        What is not wanted under them stays until the job is handed out again; what is not reached before the agent stops or its hours
        end, until it is back.
        """
        for entry in await asyncio.to_thread(self.outbox.entries):
            if self.stopping.is_set() or not self._may_work():
                return False
            held = Held.begin(entry.job, self.clock, self.link)
            log.info("outbox-found", entry=entry.job.id, sent=entry.sent)
            await self._hold(held, self._courier.deliver(held, entry, again=True))
        return self._may_work()

    async def step(self) -> Step:
        """Ask once; if a job comes, do it to its end."""
        self.pause_seconds = 0.0
        answer = await self._unless_stopping(self.client.next_job(self.wait_seconds))
        if not isinstance(answer, Job):
            self.pause_seconds = answer or 0.0
            return Step.idle
        held = Held.begin(answer, self.clock, self.link)
        with structlog.contextvars.bound_contextvars(job=answer.id, run=answer.run, round=answer.round):
            log.info("job-taken", kind=answer.kind, rank=answer.rank, why=answer.rank_reason, model=answer.model.id, data=answer.data)
            return await self._hold(held, self._do(held))

    async def _unless_stopping(self, question: Coroutine[Any, Any, T]) -> T | None:
        """The answer, or nothing if the agent is told to stop before it comes."""
        asked, stop = asyncio.create_task(question), asyncio.create_task(self.stopping.wait())
        try:
            await asyncio.wait({asked, stop}, return_when=asyncio.FIRST_COMPLETED)
            return await asked if asked.done() else None
        finally:
            asked.cancel()
            stop.cancel()

    async def _do(self, held: Held) -> None:
        """From the job to its answer; what was done of it before is not done again."""
        self.policy.check(held.job, self.now().time())
        found = await asyncio.to_thread(self.outbox.find, held.job)
        entry = await self._worker.work(held) if found is None else await self._renewed(found, held.job)
        await self._courier.deliver(held, entry, again=found is not None)

    async def _renewed(self, entry: Entry, job: Job) -> Entry:
        log.info("outbox-found", entry=job.id, sent=entry.sent)
        return await asyncio.to_thread(self.outbox.save, entry.under(job))

    async def _hold(self, held: Held, working: Coroutine[Any, Any, None]) -> Step:
        """See a job to its end, and keep of it what may yet be wanted."""
        step, error = await self._holder.hold(held, working)
        if error is None:
            log.info("job-done")
        if error is None or not (may_return(error) or stopped(error)):
            self._worker.forget(held.job)
            self.outbox.remove(held.job.id, "delivered" if error is None else error.detail)
        return step
