"""A job under its lease: the work, the renewals beside it, and the reason that the coordinator hears if it is given back."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import structlog

from agent.client import Client
from agent.connection import may_pass
from agent.held import Held
from protocol import errors
from protocol.messages import GiveBack, Progress, Verdict
from protocol.texts import ODD

log = structlog.get_logger("agent")
Waited = asyncio.Task[Any]
RENEWALS = 3  # per lease, so that two may be lost
GRACE_SECONDS = 5.0  # that a stopping agent gives to finished work on its way


class Step(StrEnum):
    """What came of one question for work."""

    done = "done"
    idle = "idle"
    given_back = "given_back"
    over = "over"  # somebody else ended the job
    kept = "kept"  # it cannot be delivered by this process, or in these hours; the finished work stays in the outbox


def stopped(error: errors.HLoRAError | None) -> bool:
    """Whether a job was left for no other reason than that the agent stops, or that its hours have ended."""
    return error is not None and bool(error.facts.get("stopping"))


@dataclass(frozen=True)
class Holder:
    """Holds one job after the other."""

    client: Client
    stopping: asyncio.Event
    check_hours: Callable[[], None]  # raises Refusal where the owner's policy allows no work at this moment

    async def hold(self, held: Held, working: Coroutine[Any, Any, None]) -> tuple[Step, errors.HLoRAError | None]:
        """See a job to its end with its lease renewed beside it; leave it when it is done, lost, refused, or the agent stops.

        Gives what came of it, and why it was not done.
        """
        work = asyncio.create_task(working)
        renewing, stop = asyncio.create_task(self._renew(held)), asyncio.create_task(self.stopping.wait())
        try:
            await self._until_over(held, work, renewing, stop)
            if not work.done():
                held.ended = held.ended or self._reason(renewing)
                work.cancel()
            error = self._error(held, work)
            return Step.done if error is None else await self._leave(held, error), error
        finally:
            for task in (work, renewing, stop):
                if not task.cancelling():  # a second time would cut short the wait for the worker thread
                    task.cancel()
            await asyncio.gather(work, renewing, stop, return_exceptions=True)  # the worker thread ends at its next step

    async def _until_over(self, held: Held, work: Waited, renewing: Waited, stop: Waited) -> None:
        """Wait until the work is done, or is to be left."""
        await asyncio.wait({work, renewing, stop}, return_when=asyncio.FIRST_COMPLETED)
        if held.answering:
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
        if stop.done() and held.finished and held.ended is None:
            await asyncio.wait({work}, timeout=GRACE_SECONDS)

    def _error(self, held: Held, work: asyncio.Task[None]) -> errors.HLoRAError | None:
        """Why the work is not done, if it is not."""
        error = work.exception() if work.done() else held.ended
        return error if error is None or isinstance(error, errors.HLoRAError) else self._defect(error)

    def _reason(self, renewing: asyncio.Task[None]) -> errors.HLoRAError:
        """Why a job is left that nobody has ended: the agent is stopping, or the renewal has a defect."""
        defect = renewing.exception() if renewing.done() else None
        return errors.Refusal("the agent is stopping", stopping=True) if defect is None else self._defect(defect)

    def _defect(self, error: BaseException) -> errors.HLoRAError:
        # The words of a foreign error may quote a row: only its kind is told, and where it was raised.
        log.error("job-failed", error=type(error).__name__, trace=traceback.format_tb(error.__traceback__))
        return errors.HLoRAError(f"the agent failed with {type(error).__name__}; its log has the trace")

    async def _leave(self, held: Held, error: errors.HLoRAError) -> Step:
        """Give the job back with the reason, unless it is lost already, or done and to be delivered later."""
        if isinstance(error, (errors.Conflict, errors.Over)):
            log.info("job-over", problem=error.slug(), detail=error.detail)
            return Step.over
        if held.finished and (stopped(error) or isinstance(error, errors.OutdatedAgent)):
            log.warning("job-kept", detail=f"{error.detail}; the finished work stays in the outbox")
            return Step.kept
        # What may pass is no refusal: the job may be this client's again as soon as it is back.
        problem = None if type(error) in (errors.HLoRAError, errors.Refusal) or may_pass(error) else error.slug()
        log.warning("job-given-back", problem=problem, detail=error.detail)
        try:
            reason = ODD.sub("?", error.detail)[:2000]  # it may quote what no coordinator takes
            await self.client.give_back(held.job.id, GiveBack(epoch=held.job.lease.epoch, reason=reason, problem=problem))
        except errors.HLoRAError as lost:
            log.info("give-back-refused", problem=lost.slug(), detail=lost.detail)
        return Step.given_back

    async def _renew(self, held: Held) -> None:
        """Renew the lease until the job is answered or has ended otherwise, with the reason in `held`."""
        job, seconds = held.job, held.job.lease.seconds
        await asyncio.sleep(seconds / RENEWALS)
        while held.ended is None and not held.answering:
            at = held.standing
            progress = Progress(epoch=job.lease.epoch, phase=at.phase, step=at.step, steps=at.steps, loss=at.loss)
            try:
                renewal = await self.client.renew(job.id, progress)
            except errors.HLoRAError as error:
                if not may_pass(error):
                    held.ended = None if held.answering else error
                    return
                log.warning("renewal-failed", problem=error.slug(), detail=error.detail)
            else:
                seconds = renewal.lease_seconds
                held.remains(renewal.remaining_seconds)
                if renewal.verdict is Verdict.cancel:
                    held.ended = errors.JobOver("the coordinator cancelled the job", state="cancelled")
                    return
            try:
                self.check_hours()
            except errors.Refusal as rest:
                held.ended = rest
                return
            await asyncio.sleep(seconds / RENEWALS)
