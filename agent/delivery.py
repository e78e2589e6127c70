"""An entry of the outbox on its way to the coordinator, which may be away for an hour."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from agent.client import Client
from agent.connection import may_pass
from agent.held import Held, Link
from agent.outbox import Entry, Outbox
from agent.training import Standing
from agent.transfers import part_bytes
from protocol import crash, errors
from protocol.crash import Point
from protocol.messages import Progress

log = structlog.get_logger("agent")
LONGEST_PAUSE = 60.0  # seconds between attempts
WANTED = {"expired", "released"}  # states of a job that the coordinator may yet hand out again


def may_return(error: errors.HLoRAError) -> bool:
    """Whether what was done of a job that ended so may yet be wanted: it may be handed out again, or a newer agent may deliver it.

    An answer that names no state does not say. After what may pass, such as a network that was away, the job is asked for again.
    """
    if isinstance(error, errors.Over):
        return error.facts.get("state", "expired") in WANTED
    return may_pass(error) or isinstance(error, (errors.StaleLease, errors.OutdatedAgent))


@dataclass(frozen=True)
class Courier:
    """Brings entries to the coordinator: first the slice, then the result."""

    client: Client
    outbox: Outbox
    link: Link
    clock: Callable[[], float]
    chance: random.Random

    async def deliver(self, held: Held, entry: Entry, *, again: bool) -> None:
        """Bring an entry; `again` if some of its slice may be there already. Tries until it is answered, or the job's time is over.

        Raises what no later attempt could mend: StaleLease, JobOver, NotFound, an InvalidSlice, DifferentResult, …
        """
        held.finished, failures = True, 0
        while True:
            try:
                entry = await self._send_slice(held, entry, again or failures > 0)
                held.answering = True
                await self.client.put_result(entry.job.id, entry.result)
                crash.reached(Point.agent_result_acknowledged)
                return
            except errors.HLoRAError as error:
                if not may_pass(error):
                    raise
                if self.clock() > held.until:
                    raise errors.JobOver(f"the job's deadline passed before it was answered: {error.detail}", state="expired") from None
                log.warning("delivery-delayed", problem=error.slug(), detail=error.detail)
            if not await asyncio.to_thread(self.outbox.sound, entry):
                raise errors.HLoRAError("the slice in the agent's outbox was damaged; the job has to be done anew")
            failures += 1
            await asyncio.sleep(self.chance.uniform(0.5, 1.0) * min(LONGEST_PAUSE, 2.0 ** min(failures - 1, 10)))

    async def _send_slice(self, held: Held, entry: Entry, again: bool) -> Entry:
        if entry.sent or (ref := entry.slice) is None:
            return entry
        job = held.job
        if again:  # nobody may want it any more: only an answer to this says why
            await self.client.renew(job.id, Progress(epoch=entry.result.epoch, phase="upload"))
        began = self.clock()

        def moved(count: int) -> None:
            held.standing = Standing("upload", count, ref.bytes)

        moved(0)
        part = part_bytes(self.link.bytes_per_second)
        await self.client.put_slice(job.id, entry.result.epoch, ref, self.outbox.file(entry), moved, again=again, part=part)
        crash.reached(Point.agent_slice_acknowledged)
        seconds = self.clock() - began
        if not again:
            self.link.measured(ref.bytes, seconds)
        return await asyncio.to_thread(self.outbox.save, entry.after_upload(seconds))
