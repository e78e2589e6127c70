"""The agent's loop: ask for a job, do it, answer it. Whatever happens to a job, the coordinator is told why.

ask ──▶ download ──▶ load ──▶ train ──▶ upload ──▶ answer ──▶ ask …
         └───────────┴──────────┴─────────┴──▶ give back, with the reason: refused, failed, or the agent is stopping
"""

from __future__ import annotations

import asyncio
import random
import traceback
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import structlog

from agent.client import Client
from agent.policy import Policy
from agent.training import Outcome, Standing, Train
from protocol import errors, slices
from protocol.messages import BlobRef, GiveBack, Job, Profile, Progress, Result, Verdict

T = TypeVar("T")
log = structlog.get_logger("agent")
RENEWALS = 3  # per lease, so that two may be lost
LONGEST_REST = 300.0  # seconds between questions after jobs that this device could not do


HOPELESS = (errors.Unauthenticated, errors.Forbidden, errors.OutdatedAgent, errors.InvalidRequest)


class Step(StrEnum):
    """What came of one question for work."""

    done = "done"
    idle = "idle"
    given_back = "given_back"
    over = "over"


@dataclass
class Held:
    """A job in hand. The worker thread says how far it is; whoever ends the job puts the reason here."""

    job: Job
    standing: Standing = field(default_factory=lambda: Standing("download"))
    ended: errors.HLoRAError | None = None
    answering: bool = False  # the result is on its way: the lease is needed no longer, and may be gone when it is there

    def tell(self, standing: Standing) -> None:
        """Take note of the worker's progress. Raises what ended the job."""
        if self.ended is not None:
            raise self.ended
        self.standing = standing


@dataclass
class Loop:
    """One agent at work. Network, training and time are whatever it is built with."""

    client: Client
    train: Train
    policy: Policy
    folder: Path  # for slices on their way
    wait_seconds: float = 20.0
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    clock: Callable[[], float] = monotonic
    now: Callable[[], datetime] = lambda: datetime.now().astimezone()
    chance: random.Random = field(default_factory=random.Random)
    pause_seconds: float = 0.0  # that the coordinator asked for with its last answer

    async def run(self, profile: Profile) -> None:
        """Tell the profile, then ask and work until told to stop.

        Raises Unauthenticated, Forbidden, OutdatedAgent, InvalidRequest: what asking again cannot mend.
        """
        told, failures = False, 0
        while not self.stopping.is_set():
            if not self.policy.may_work(self.now().time()):
                await self._rest(60.0)
                continue
            try:
                told = told or await self._unless_stopping(self.client.put_profile(profile)) is not None
                came = await self.step()
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

    async def _rest(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), seconds)

    async def step(self) -> Step:
        """Ask once; if a job comes, do it to its end."""
        self.pause_seconds = 0.0
        answer = await self._unless_stopping(self.client.next_job(self.wait_seconds))
        if not isinstance(answer, Job):
            self.pause_seconds = answer or 0.0
            return Step.idle
        held = Held(answer)
        with structlog.contextvars.bound_contextvars(job=answer.id, run=answer.run, round=answer.round):
            log.info("job-taken", kind=answer.kind, rank=answer.rank, why=answer.rank_reason, model=answer.model.id, data=answer.data)
            return await self._hold(held)

    async def _unless_stopping(self, question: Coroutine[Any, Any, T]) -> T | None:
        """The answer, or nothing if the agent is told to stop before it comes."""
        asked, stop = asyncio.create_task(question), asyncio.create_task(self.stopping.wait())
        try:
            await asyncio.wait({asked, stop}, return_when=asyncio.FIRST_COMPLETED)
            return await asked if asked.done() else None
        finally:
            asked.cancel()
            stop.cancel()

    async def _hold(self, held: Held) -> Step:
        """Do a job with its lease renewed beside it; leave it when it is done, lost, refused, or the agent stops."""
        work = asyncio.create_task(self._work(held))
        renewing, stop = asyncio.create_task(self._renew(held)), asyncio.create_task(self.stopping.wait())
        await asyncio.wait({work, renewing, stop}, return_when=asyncio.FIRST_COMPLETED)
        if held.answering:
            await asyncio.wait({work})
        if work.done():
            step = await self._close(held, work.exception())
        else:
            held.ended = held.ended or self._reason(renewing)
            work.cancel()
            step = await self._leave(held, held.ended)
        for task in (renewing, stop):
            task.cancel()
        await asyncio.gather(work, renewing, stop, return_exceptions=True)  # the worker thread ends at its next step
        return step

    def _reason(self, renewing: asyncio.Task[None]) -> errors.HLoRAError:
        """Why a job is left that nobody has ended: the agent is stopping, or the renewal has a defect."""
        if not renewing.done():
            return errors.Refusal("the agent is stopping")
        return self._defect(renewing.exception() or RuntimeError())

    def _defect(self, error: BaseException) -> errors.HLoRAError:
        # The words of a foreign error may quote a row: only its kind is told, and where it was raised.
        log.error("job-failed", error=type(error).__name__, trace=traceback.format_tb(error.__traceback__))
        return errors.HLoRAError(f"the agent failed with {type(error).__name__}; its log has the trace")

    async def _close(self, held: Held, error: BaseException | None) -> Step:
        if error is None:
            log.info("job-done")
            return Step.done
        return await self._leave(held, error if isinstance(error, errors.HLoRAError) else self._defect(error))

    async def _leave(self, held: Held, error: errors.HLoRAError) -> Step:
        """Give the job back with the reason, unless it is lost already."""
        if isinstance(error, (errors.StaleLease, errors.JobOver)):
            log.info("job-over", problem=error.slug(), detail=error.detail)
            return Step.over
        problem = None if type(error) in (errors.HLoRAError, errors.Refusal) else error.slug()
        log.warning("job-given-back", problem=problem, detail=error.detail)
        try:
            await self.client.give_back(held.job.id, GiveBack(epoch=held.job.lease.epoch, reason=error.detail[:2000], problem=problem))
        except errors.HLoRAError as lost:
            log.info("give-back-refused", problem=lost.slug(), detail=lost.detail)
        return Step.given_back

    async def _renew(self, held: Held) -> None:
        """Renew the lease until the job is answered or has ended otherwise, with the reason in `held`."""
        job, seconds = held.job, held.job.lease.seconds
        while held.ended is None:
            await asyncio.sleep(seconds / RENEWALS)
            if held.answering:
                return
            at = held.standing
            progress = Progress(epoch=job.lease.epoch, phase=at.phase, step=at.step, steps=at.steps, loss=at.loss)
            try:
                renewal = await self.client.renew(job.id, progress)
            except errors.Unavailable as error:
                log.warning("renewal-failed", detail=error.detail)
                continue
            except errors.HLoRAError as error:
                held.ended = None if held.answering else error
                return
            seconds = renewal.lease_seconds
            if renewal.verdict is Verdict.cancel:
                held.ended = errors.JobOver("the coordinator cancelled the job")
            elif not self.policy.may_work(self.now().time()):
                held.ended = errors.PolicyRefusal("the hours in which the policy allows work have ended", line="hours")

    async def _work(self, held: Held) -> None:
        job = held.job
        self.policy.check(job, self.now().time())
        self.folder.mkdir(parents=True, exist_ok=True)
        began = self.clock()
        start = self.folder / f"{job.slice.digest.removeprefix('sha256:')}.start"
        await self.client.blob(job.slice, start)
        fetched = {"download_bytes": job.slice.bytes, "download_seconds": self.clock() - began}
        outcome, ref, trained = await self._in_thread(held, start)
        try:
            sent = await self._upload(held, ref, trained) if ref is not None else {}
            usage = outcome.usage.model_copy(update={**fetched, **sent})
            digest = ref.digest if ref is not None else None
            result = Result(epoch=job.lease.epoch, slice=digest, examples=outcome.examples, metrics=outcome.metrics, usage=usage)
            held.answering = True
            await self.client.put_result(job.id, result)
        finally:
            trained.unlink(missing_ok=True)

    async def _upload(self, held: Held, ref: BlobRef, trained: Path) -> dict[str, float]:
        began = self.clock()
        await self.client.put_slice(held.job.id, held.job.lease.epoch, ref, trained)
        return {"upload_bytes": ref.bytes, "upload_seconds": self.clock() - began}

    async def _in_thread(self, held: Held, start: Path) -> tuple[Outcome, BlobRef | None, Path]:
        """Train away from the event loop. If this is cancelled, it still waits until the thread has noticed."""
        thread = asyncio.ensure_future(asyncio.to_thread(self._train, held, start))
        try:
            return await asyncio.shield(thread)
        finally:
            await asyncio.wait({thread})
            thread.exception()  # has been heard of, or is that of a job which is no longer ours

    def _train(self, held: Held, start: Path) -> tuple[Outcome, BlobRef | None, Path]:
        """From the file of the slice that was handed out to the file of the trained one."""
        given = slices.unpack(start.read_bytes())
        start.unlink()
        outcome = self.train(held.job, given, held.tell)
        if outcome.slice is None:
            return outcome, None, start
        held.tell(Standing("upload"))
        ref = BlobRef(digest=slices.digest(outcome.slice), bytes=len(outcome.slice))
        trained = self.folder / f"{ref.digest.removeprefix('sha256:')}.trained"
        trained.write_bytes(outcome.slice)
        return replace(outcome, slice=None), ref, trained
