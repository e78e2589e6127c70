"""From a job to an entry in the outbox: fetch the slice to start from, train or measure, keep what came of it.

work/<job>/start.safetensors   the slice that was handed out, and `.part` of it while it comes
work/<job>/checkpoint          where the training stands

What lies there stays when the agent ends, and is taken up when the job is handed out again.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agent import durable
from agent.client import Client
from agent.held import Held
from agent.outbox import Entry, Outbox, keep_newest
from agent.training import Standing, Train
from protocol import slices
from protocol.messages import Job

START = "start.safetensors"


@dataclass(frozen=True)
class Worker:
    """Does one job after the other."""

    client: Client
    train: Train
    folder: Path
    outbox: Outbox
    clock: Callable[[], float]

    async def work(self, held: Held) -> Entry:
        """Do a job. Raises what the device refuses, what ended the job, and what the coordinator refuses."""
        job, began = held.job, self.clock()
        start = durable.folder(self.folder, job.id) / START

        def moved(count: int) -> None:
            held.standing = Standing("download", count, job.slice.bytes)

        with durable.room_for(start):
            start.parent.touch()  # what was kept of this job is the newest again
            keep_newest(self.folder)
        fetched = await self.client.blob(job.slice, start, moved)
        return await self._in_thread(held, start, {"download_bytes": fetched, "download_seconds": self.clock() - began if fetched else 0.0})

    async def _in_thread(self, held: Held, start: Path, fetched: dict[str, float]) -> Entry:
        """Train away from the event loop. If this is cancelled, it still waits until the thread has noticed."""
        thread = asyncio.ensure_future(asyncio.to_thread(self._train, held, start, fetched))
        try:
            return await asyncio.shield(thread)
        finally:
            await asyncio.wait({thread})
            thread.exception()  # has been heard of, or is that of a job which is no longer ours

    def _train(self, held: Held, start: Path, fetched: dict[str, float]) -> Entry:
        given = slices.read_file(start)
        outcome = self.train(held.job, given, held.tell)
        return self.outbox.store(held.job, given, outcome, outcome.usage.model_copy(update=fetched))

    def forget(self, job: Job) -> None:
        """Remove what was kept for the case that the job is handed out again."""
        shutil.rmtree(durable.folder(self.folder, job.id), ignore_errors=True)
