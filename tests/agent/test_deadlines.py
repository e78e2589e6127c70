"""A deadline is met by fewer steps: what was learned until then is sent, and counts for the rows that it was learned from."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from agent.held import TELLING_BYTES, Link
from agent.learning import Enough
from agent.loop import Step
from agent.policy import Policy
from agent.training import Outcome, Standing, Tell, Trainer
from protocol.messages import Job
from protocol.slices import Slice
from protocol.states import JobState
from tests.agent.looping import PATIENCE, begin, done, last_job, looping
from tests.agent.work import catalogue, make_job, make_start
from tests.federation import Federation

MINUTE = 60.0
HOUR: dict[str, float] = {"lease": 60, "no_progress": 600, "job": 3600, "round": 7200}


def nothing(_: int) -> None:
    """Nothing happens between two steps."""


@dataclass
class Minutes:
    """A training of three hours, by a clock that goes on by a minute with every step."""

    between: Callable[[int], None] = nothing
    now: float = 0.0
    taken: int = 0
    jobs: list[Job] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def train(self, job: Job, start: Slice, tell: Tell) -> Outcome:
        self.jobs.append(job)
        tell(Standing("train", 0, 180))
        for step in range(1, 181):
            self.now, self.taken = self.now + MINUTE, step
            self.between(step)
            try:
                tell(Standing("train", step, 180, 0.5))
            except Enough:
                break
        return done(job, start)


async def trained(federation: Federation, folder: Path, minutes: Minutes, times: dict[str, float] = HOUR, **how: Any) -> None:
    """The result of a training is in time."""
    device, run = await begin(federation, times=times)
    async with looping(federation, device, minutes.train, folder, clock=minutes, **how) as loop:
        assert await loop.step() is Step.done
    assert (await last_job(federation, run))[0] is JobState.submitted


async def test_a_training_ends_before_the_step_that_would_come_too_late(federation: Federation, tmp_path: Path) -> None:
    """After 58 minutes another one and the margin of ten seconds fit into the hour; after 59 they do not."""
    minutes = Minutes()
    await trained(federation, tmp_path, minutes)
    assert minutes.taken == 59


async def test_the_time_that_the_slice_needs_is_kept_free(federation: Federation, tmp_path: Path) -> None:
    minutes = Minutes()
    await trained(federation, tmp_path, minutes, policy=Policy(up_bytes_per_second=10))
    sending = minutes.jobs[0].max_upload_bytes / 10
    assert minutes.taken * MINUTE + sending + 10 <= 3600
    assert (minutes.taken + 1) * MINUTE + sending + 10 > 3600


async def test_a_device_that_cannot_be_in_time_takes_one_step(federation: Federation, tmp_path: Path) -> None:
    minutes = Minutes()
    await trained(federation, tmp_path, minutes, policy=Policy(up_bytes_per_second=0.01))
    assert minutes.taken == 1


async def test_a_training_with_time_enough_is_not_cut(federation: Federation, tmp_path: Path) -> None:
    minutes = Minutes()
    await trained(federation, tmp_path, minutes, HOUR | {"job": 180 * 60 + 11, "round": 20_000})
    assert minutes.taken == 180


async def test_renewals_say_how_much_time_is_left(federation: Federation, tmp_path: Path) -> None:
    """By the coordinator's clock the ten minutes of the first ten steps were forty: half an hour is lost."""
    renewed = threading.Semaphore(0)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await federation.app(scope, receive, send)
        if scope["path"].endswith("/lease"):
            renewed.release()

    def between(step: int) -> None:
        if step == 10:
            federation.clock.advance(40 * MINUTE)
            for _ in range(3):  # one may be on its way already, and one is heard of when the next one is sent
                assert renewed.acquire(timeout=PATIENCE)

    minutes = Minutes(between)
    await trained(federation, tmp_path, minutes, HOUR | {"lease": 0.2}, app=app)
    assert 29 <= minutes.taken < 59


@pytest.mark.parametrize("taken", [1, 3])
def test_a_training_that_is_cut_counts_the_rows_that_it_learned_from(
    tmp_path: Path, encoder: Path, taken: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def tell(standing: Standing) -> None:
        if standing.step == taken:
            raise Enough

    job = make_job(encoder)
    outcome = Trainer(catalogue(tmp_path))(job, make_start(encoder), tell)
    assert outcome.slice is not None
    assert (outcome.usage.steps, outcome.examples, outcome.slice.label.examples) == (taken, 4 * taken, 4 * taken)
    assert f"planned=5 steps={taken}" in next(line for line in capsys.readouterr().out.splitlines() if "training-cut-short" in line)


def test_the_link_is_known_from_what_it_has_carried() -> None:
    link = Link()
    assert link.seconds(10**9) == 0.0
    link.measured(TELLING_BYTES - 1, 10.0)  # says more of the way to and fro
    assert link.seconds(10**9) == 0.0
    link.measured(2 * TELLING_BYTES, 4.0)
    assert link.seconds(TELLING_BYTES) == 2.0
    link.measured(2 * TELLING_BYTES, 0.0)  # of a clock that stands still
    assert link.seconds(TELLING_BYTES) == 2.0
