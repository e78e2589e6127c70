"""Agents of this process at the real coordinator, and trainings that do what a test wants."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from pydantic import SecretStr
from starlette.types import ASGIApp

from agent.client import Client
from agent.loop import Loop
from agent.policy import Policy
from agent.training import Outcome, Standing, Tell, Train
from protocol import errors
from protocol.messages import Job, Metric, Usage
from protocol.slices import Slice
from protocol.states import JobKind, JobState
from tests.federation import Device, Federation, make_plan, moved

PATIENCE = 30.0  # seconds; an outer bound, nothing is measured by it
FINISHED = ["entry.json", "slice.safetensors"]
START = ["start.safetensors"]  # of a job that may be handed out again
ALONE: dict[str, Any] = {"cohort": {"target": 1, "quorum": 1}, "evaluation": {"every": 0}, "rounds": 1}
QUICK = {"lease": 0.2, "no_progress": 600, "job": 3600, "round": 7200}  # a lease that the agent renews all the time


@dataclass
class Steps:
    """Training whose steps take no time and never end, until it is told to stop or let go."""

    begun: threading.Event = field(default_factory=threading.Event)
    enough: threading.Event = field(default_factory=threading.Event)
    stopped_by: list[Exception] = field(default_factory=list)

    def __call__(self, job: Job, start: Slice, tell: Tell) -> Outcome:
        step = 0
        while not self.enough.wait(0.01):
            step += 1
            try:
                tell(Standing("train", step, step + 1, 0.5))
            except errors.HLoRAError as error:
                self.stopped_by.append(error)
                raise
            self.begun.set()
        return done(job, start)

    async def until_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.wait, PATIENCE)


@dataclass
class Block(Steps):
    """Training that blocks its thread in one long step."""

    def __call__(self, job: Job, start: Slice, tell: Tell) -> Outcome:
        tell(Standing("train", 3, 10, 0.5))
        self.begun.set()
        assert self.enough.wait(PATIENCE)
        return done(job, start)


def done(job: Job, start: Slice) -> Outcome:
    trained = moved(start, job) if job.kind is JobKind.train else None
    return Outcome(examples=5, metrics={"loss": Metric(value=0.5, weight=5)}, usage=Usage(seconds=1), slice=trained)


def instantly(job: Job, start: Slice, tell: Tell) -> Outcome:
    return done(job, start)


def refusing(error: Exception) -> Train:
    def train(job: Job, start: Slice, tell: Tell) -> Outcome:
        raise error

    return train


@asynccontextmanager
async def looping(
    federation: Federation, device: Device, train: Train, folder: Path, *, app: ASGIApp | None = None, left: Sequence[str] = (), **how: Any
) -> AsyncIterator[Loop]:
    """An agent with that device's credential; nothing of its work is left on the disk but these files."""
    assert device.secret is not None
    transport = httpx.ASGITransport(app=app or federation.app)
    async with Client("http://localhost", SecretStr(device.secret), transport=transport, sleep=no_pause) as client:
        settings: dict[str, Any] = {"policy": Policy(), "wait_seconds": 0, "chance": random.Random(0)} | how
        yield Loop(client, train, folder=folder / "home", **settings)
    assert sorted(path.name for path in (folder / "home").rglob("*") if path.is_file()) == sorted(left)


async def no_pause(_: float) -> None:
    """Requests are repeated at once."""
    await asyncio.sleep(0)


async def begin(federation: Federation, **changes: Any) -> tuple[Device, str]:
    """One device, and a run whose first round asks it to train."""
    device = await federation.enrol("device")
    return device, await federation.open(make_plan(**ALONE, **changes))


async def last_job(federation: Federation, run: str) -> tuple[JobState, str | None]:
    job = (await federation.admin.round(run, 1)).jobs[-1]
    return job.state, job.reason


async def until(what: Callable[[], Awaitable[bool]]) -> None:
    for _ in range(int(PATIENCE / 0.01)):
        if await what():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came to that")


async def ended(federation: Federation, run: str, state: JobState) -> None:
    """Wait until the one job has come to that state."""

    async def there() -> bool:
        return (await last_job(federation, run))[0] is state

    await until(there)
