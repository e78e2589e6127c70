"""The owner's hours end while something is going on: it is put off, not refused, and goes on where it was when they begin again."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from starlette.types import Receive, Scope, Send

from agent.loop import Loop, Step
from agent.policy import Policy
from protocol.states import JobState
from tests.agent.looping import FINISHED, PATIENCE, QUICK, START, Steps, begin, last_job, looping, until
from tests.agent.test_outbox import Away, Counted, killed_while_it_delivers
from tests.federation import Federation, make_profile

EVENING, MORNING = (datetime(2026, 1, day, hour, tzinfo=UTC) for day, hour in ((1, 23), (2, 6)))
PUT_OFF = (JobState.released, "the policy's hours are 22:00-06:00; it is 06:00")


@dataclass
class Night:
    """The device's clock, and its owner's policy."""

    now: datetime = EVENING
    policy: Policy = field(default_factory=lambda: Policy(hours=["22:00-06:00"]))

    def how(self) -> dict[str, Any]:
        """What an agent of this device is built with."""
        return {"policy": self.policy, "now": lambda: self.now}


def files(folder: Path) -> list[str]:
    """What the agent keeps of its work."""
    return sorted(path.name for path in (folder / "home").rglob("*") if path.is_file())


async def done_when_it_is_back(federation: Federation, loop: Loop) -> None:
    """The same agent, which has not told its profile anew, is asked again and does the job."""
    federation.advance(1)
    assert await loop.step() is Step.idle  # the coordinator sees that the client is back
    federation.advance(1)
    assert await loop.step() is Step.done


async def test_what_the_hours_interrupt_is_given_back_and_goes_on_in_the_next_night(federation: Federation, tmp_path: Path) -> None:
    device, run = await begin(federation, times=QUICK)
    night, work = Night(), Steps()
    async with looping(federation, device, work, tmp_path, **night.how()) as loop:
        step = asyncio.create_task(loop.step())
        await work.until_begun()
        night.now = MORNING
        assert await step is Step.given_back
        assert await last_job(federation, run) == PUT_OFF
        assert files(tmp_path) == START
        night.now = EVENING
        work.enough.set()
        await done_when_it_is_back(federation, loop)
    assert (await last_job(federation, run))[0] is JobState.submitted


async def test_hours_that_end_while_nobody_can_be_reached_are_kept_too(federation: Federation, tmp_path: Path) -> None:
    async def away(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].endswith("/lease"):
            raise httpx.ConnectError("refused")
        await federation.app(scope, receive, send)

    device, _ = await begin(federation, times=QUICK)
    night, work = Night(), Steps()
    async with looping(federation, device, work, tmp_path, app=away, left=START, **night.how()) as loop:
        step = asyncio.create_task(loop.step())
        await work.until_begun()
        night.now = MORNING
        await asyncio.wait({step}, timeout=PATIENCE)
        work.enough.set()
        assert await step is Step.given_back
    assert len(work.stopped_by) == 1


async def test_a_job_that_comes_when_the_hours_are_over_is_not_refused(federation: Federation, tmp_path: Path) -> None:
    """The question was asked in the hours, and stayed open until after them."""
    device, run = await begin(federation)
    night, train = Night(MORNING), Counted()
    async with looping(federation, device, train, tmp_path, **night.how()) as loop:
        assert await loop.step() is Step.given_back
        assert await last_job(federation, run) == PUT_OFF
        night.now = EVENING
        await done_when_it_is_back(federation, loop)
    assert len(train.jobs) == 1


async def test_finished_work_that_the_hours_keep_from_being_delivered_is_delivered_in_the_next(
    federation: Federation, tmp_path: Path
) -> None:
    night, train = Night(), Counted()

    async def morning(scope: Scope, receive: Receive, send: Send) -> None:
        """The night ends while the first slice is on its way, and the next begins once the agent has let go of it."""
        if scope["path"].endswith("/slice") and night.now is EVENING and not let_go:
            night.now = MORNING
            try:
                await asyncio.Event().wait()
            finally:
                let_go.append(files(tmp_path))
                night.now = EVENING
        await federation.app(scope, receive, send)

    let_go: list[list[str]] = []
    device, run = await begin(federation, times=QUICK)
    async with looping(federation, device, train, tmp_path, app=morning, **night.how()) as loop:
        running = asyncio.create_task(loop.run(make_profile()))

        async def delivered() -> bool:
            return (await last_job(federation, run))[0] is JobState.submitted and not files(tmp_path)

        await until(delivered)
        loop.stopping.set()
        await running
    assert let_go == [[*FINISHED, *START]]
    assert len(train.jobs) == 1


async def test_outside_the_hours_nothing_is_delivered_and_nothing_asked_for(federation: Federation, tmp_path: Path) -> None:
    device, run = await begin(federation)
    train, night = Counted(), Night(MORNING)
    await killed_while_it_delivers(federation, device, train, tmp_path, Away(federation.app, ("/slice",)))
    async with looping(federation, device, train, tmp_path, **night.how()) as loop:
        assert not await loop.deliver()
        running = asyncio.create_task(loop.run(make_profile(train=77)))
        await asyncio.sleep(0.05)
        assert (await federation.admin.client(device)).profile.datasets["texts"].train == 10  # it has not even told its profile
        loop.stopping.set()
        await running
        night.now = EVENING
        loop.stopping.clear()
        assert await loop.deliver()
    assert (await last_job(federation, run))[0] is JobState.submitted
