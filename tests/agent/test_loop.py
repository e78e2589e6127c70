"""The loop against the real coordinator: every job ends with an answer, a reason, or a lease that somebody else has."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from agent.loop import Step
from agent.policy import Policy
from agent.training import Outcome, Tell, Trainer
from coordinator.tables import Event
from coordinator.tables import Job as JobRow
from modelling.layout import resolve
from protocol import errors
from protocol.messages import Job
from protocol.slices import Slice
from protocol.states import JobKind, JobState
from tests.agent.looping import (
    ALONE,
    FINISHED,
    PATIENCE,
    QUICK,
    START,
    Block,
    Steps,
    begin,
    done,
    ended,
    instantly,
    last_job,
    looping,
    refusing,
    until,
)
from tests.agent.work import catalogue
from tests.federation import Federation, make_plan, make_profile
from tests.modelling.drawn import CLASSES


async def test_jobs_are_done_until_there_are_no_more(federation: Federation, tmp_path: Path) -> None:
    device = await federation.enrol("device")
    run = await federation.open(make_plan(**ALONE | {"evaluation": {"every": 1}, "rounds": 2}))
    async with looping(federation, device, instantly, tmp_path) as loop:
        steps = []
        while (await federation.admin.run(run)).state == "running":
            steps.append(await loop.step())
            federation.tick()
        assert steps.count(Step.done) == 5  # trained twice; measured before, between and after
        assert await loop.step() is Step.idle
    view = next(view for view in (await federation.admin.round(run, 2)).jobs if view.kind is JobKind.train)
    assert view.usage is not None
    assert view.slice is not None
    assert view.usage.upload_bytes == view.slice.bytes
    assert view.usage.download_bytes > 0


async def test_an_idle_agent_waits_as_long_as_it_is_asked_to(federation: Federation, tmp_path: Path) -> None:
    async with looping(federation, await federation.enrol("device"), instantly, tmp_path) as loop:
        assert await loop.step() is Step.idle
        assert loop.pause_seconds == 1.0


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (errors.DataRefusal("no column"), "data-refusal"),
        (errors.MemoryRefusal("no room"), "memory-refusal"),
        (errors.ModelRefusal("another model"), "model-refusal"),
        (errors.NonFiniteSlice("it diverged"), "non-finite-slice"),
    ],
)
async def test_a_refused_job_is_given_back_with_its_reason(
    federation: Federation, tmp_path: Path, error: errors.HLoRAError, problem: str
) -> None:
    device, run = await begin(federation)
    async with looping(federation, device, refusing(error), tmp_path) as loop:
        assert await loop.step() is Step.given_back
    assert await last_job(federation, run) == (JobState.released, error.detail)
    with federation.parts.database.read() as session:
        (released,) = session.scalars(select(Event).where(Event.kind == "job-released"))
    assert released.facts["refusal"] == problem


async def test_a_job_that_only_the_network_kept_from_being_done_is_taken_up_again(federation: Federation, tmp_path: Path) -> None:
    device, run = await begin(federation)
    async with looping(federation, device, refusing(errors.Unavailable("no route")), tmp_path / "first", left=START) as loop:
        assert await loop.step() is Step.given_back
    async with looping(federation, device, instantly, tmp_path / "second") as loop:
        federation.advance(1)
        assert await loop.step() is Step.idle  # the coordinator sees that the client is back
        federation.advance(1)
        assert await loop.step() is Step.done
    assert await last_job(federation, run) == (JobState.submitted, None)


async def test_a_defect_gives_the_job_back_without_quoting_it(federation: Federation, tmp_path: Path) -> None:
    device, run = await begin(federation)
    async with looping(federation, device, refusing(KeyError("a secret row")), tmp_path) as loop:
        assert await loop.step() is Step.given_back
    assert await last_job(federation, run) == (JobState.released, "the agent failed with KeyError; its log has the trace")


async def test_the_policy_is_asked_before_anything_is_fetched(federation: Federation, tmp_path: Path) -> None:
    device, run = await begin(federation)
    async with looping(federation, device, instantly, tmp_path, policy=Policy(largest_rank=1)) as loop:
        assert await loop.step() is Step.given_back
    state, reason = await last_job(federation, run)
    assert (state, reason) == (JobState.released, "the policy's largest_rank is 1; the job's is 4")


async def test_a_slice_that_the_coordinator_rejects_ends_the_job(federation: Federation, tmp_path: Path) -> None:
    def dishonest(job: Job, start: Slice, tell: Tell) -> Outcome:
        return done(job.model_copy(update={"round": job.round + 1}), start)

    device, run = await begin(federation)
    async with looping(federation, device, dishonest, tmp_path) as loop:
        assert await loop.step() is Step.given_back
    state, reason = await last_job(federation, run)
    assert state is JobState.rejected
    assert "round" in (reason or "")


async def test_the_lease_is_renewed_while_a_long_step_blocks_the_worker(federation: Federation, tmp_path: Path) -> None:
    device, run = await begin(federation, times=QUICK)
    work = Block()
    async with looping(federation, device, work, tmp_path) as loop:
        step = asyncio.create_task(loop.step())
        await work.until_begun()
        for _ in range(3):  # without the renewal between two of them the lease would have run out
            federation.clock.advance(0.15)
            await leased_anew(federation)
            federation.tick()
        progress = (await federation.admin.round(run, 1)).jobs[0].progress
        assert progress is not None
        assert (progress.phase, progress.step, progress.steps, progress.loss) == ("train", 3, 10, 0.5)
        work.enough.set()
        assert await step is Step.done


async def leased_anew(federation: Federation) -> None:
    """Wait until the lease of the one leased job runs for its whole time."""

    async def whole() -> bool:
        with federation.parts.database.read() as session:
            end = session.scalars(select(JobRow.lease_until).where(JobRow.state == JobState.leased)).one()
        return end is not None and end - federation.clock.now == timedelta(seconds=QUICK["lease"])

    await until(whole)


async def test_a_job_whose_run_is_stopped_ends_at_the_next_step(federation: Federation, tmp_path: Path) -> None:
    device, run = await begin(federation, times=QUICK)
    work = Steps()
    async with looping(federation, device, work, tmp_path) as loop:
        step = asyncio.create_task(loop.step())
        await work.until_begun()
        await federation.admin.change_run(run, "stop")
        assert await step is Step.over
    assert [type(error) for error in work.stopped_by] == [errors.JobOver]
    assert (await last_job(federation, run))[0] is JobState.cancelled


async def test_a_job_that_somebody_else_holds_by_now_ends_at_the_next_step(federation: Federation, tmp_path: Path) -> None:
    device, _ = await begin(federation, times=QUICK)
    work = Steps()
    async with looping(federation, device, work, tmp_path, left=START) as loop:
        step = asyncio.create_task(loop.step())
        await work.until_begun()
        assert await device.next_job() is not None  # the same credential on another machine: the epoch rises
        assert await step is Step.over
    assert [type(error) for error in work.stopped_by] == [errors.StaleLease]


async def test_a_verdict_to_cancel_ends_the_job_at_the_next_step(federation: Federation, tmp_path: Path) -> None:
    async def cancelling(scope: Scope, receive: Receive, send: Send) -> None:
        renewal = scope["path"].endswith("/lease") and scope["method"] == "POST"
        verdict = JSONResponse({"verdict": "cancel", "lease_seconds": 60, "remaining_seconds": 60})
        await (verdict if renewal else federation.app)(scope, receive, send)

    device, _ = await begin(federation, times=QUICK)
    work = Steps()
    async with looping(federation, device, work, tmp_path, app=cancelling) as loop:
        assert await loop.step() is Step.over
    assert [type(error) for error in work.stopped_by] == [errors.JobOver]


async def test_a_job_whose_answer_takes_longer_than_its_lease_is_done(federation: Federation, tmp_path: Path) -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        async def later(message: Message) -> None:
            if scope["path"].endswith("/result"):
                await asyncio.sleep(2 * QUICK["lease"])
            await send(message)

        await federation.app(scope, receive, later)

    device, run = await begin(federation, times=QUICK)
    async with looping(federation, device, instantly, tmp_path, app=slow) as loop:
        assert await loop.step() is Step.done
    assert (await last_job(federation, run))[0] is JobState.submitted


async def test_a_defect_of_the_renewal_gives_the_job_back(federation: Federation, tmp_path: Path) -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].endswith("/lease") and scope["method"] == "POST":
            raise KeyError("a secret")
        await federation.app(scope, receive, send)

    device, run = await begin(federation, times=QUICK)
    async with looping(federation, device, Steps(), tmp_path, app=failing) as loop:
        assert await loop.step() is Step.given_back
    assert await last_job(federation, run) == (JobState.released, "the agent failed with KeyError; its log has the trace")


async def test_renewals_that_get_lost_are_tried_again(federation: Federation, tmp_path: Path) -> None:
    lost = iter(range(2 * 2))  # two renewals, each tried twice

    async def losing(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].endswith("/lease") and scope["method"] == "POST" and next(lost, None) is not None:
            raise httpx.ReadTimeout("lost")
        await federation.app(scope, receive, send)

    device, run = await begin(federation, times=QUICK)
    work = Steps()
    async with looping(federation, device, work, tmp_path, app=losing) as loop:
        step = asyncio.create_task(loop.step())
        await work.until_begun()
        federation.clock.advance(0.1)
        await leased_anew(federation)
        work.enough.set()
        assert await step is Step.done
    assert next(lost, None) is None
    assert (await last_job(federation, run))[0] is JobState.submitted


async def test_a_stopping_agent_gives_its_job_back_and_ends(federation: Federation, tmp_path: Path) -> None:
    device, run = await begin(federation)
    work = Steps()
    async with looping(federation, device, work, tmp_path, left=START) as loop:
        running = asyncio.create_task(loop.run(make_profile()))
        await work.until_begun()
        loop.stopping.set()
        await asyncio.wait_for(running, PATIENCE)
    assert await last_job(federation, run) == (JobState.released, "the agent is stopping")
    assert len(work.stopped_by) == 1


async def test_a_stopping_agent_gives_its_job_back_before_a_long_step_ends(federation: Federation, tmp_path: Path) -> None:
    device, run = await begin(federation)
    work = Block()
    async with looping(federation, device, work, tmp_path, left=START + FINISHED) as loop:
        running = asyncio.create_task(loop.run(make_profile()))
        await work.until_begun()
        loop.stopping.set()
        await ended(federation, run, JobState.released)
        assert not running.done()
        work.enough.set()
        await asyncio.wait_for(running, PATIENCE)


async def test_a_stopping_agent_does_not_wait_for_an_answer_to_its_question(federation: Federation, tmp_path: Path) -> None:
    device = await federation.enrol("device")
    async with looping(federation, device, instantly, tmp_path, wait_seconds=20) as loop:
        running = asyncio.create_task(loop.run(make_profile()))
        await asyncio.sleep(0)
        loop.stopping.set()
        await asyncio.wait_for(running, PATIENCE)


async def test_a_revoked_credential_ends_the_agent(federation: Federation, tmp_path: Path) -> None:
    device, _ = await begin(federation)
    await federation.admin.change_client(device, state="revoked")
    async with looping(federation, device, instantly, tmp_path) as loop:
        with pytest.raises(errors.Unauthenticated):
            await loop.run(make_profile())


async def test_a_coordinator_that_is_away_is_waited_for(federation: Federation, tmp_path: Path) -> None:
    away = iter(range(8))  # more than one request is tried

    async def leaving(scope: Scope, receive: Receive, send: Send) -> None:
        if next(away, None) is not None:
            raise httpx.ConnectError("refused")
        await federation.app(scope, receive, send)

    device, run = await begin(federation)
    work = Steps()
    async with looping(federation, device, work, tmp_path, app=leaving) as loop:
        running = asyncio.create_task(loop.run(make_profile()))
        await work.until_begun()
        work.enough.set()
        await ended(federation, run, JobState.submitted)
        loop.stopping.set()
        await running


async def test_what_is_refused_again_and_again_is_asked_for_less_and_less(federation: Federation, tmp_path: Path) -> None:
    device, _ = await begin(federation)
    async with looping(federation, device, instantly, tmp_path) as loop:
        rests = [loop.growing(failures) for failures in (0, 1, 2, 5, 100)]
    assert rests[0] == 0
    assert all(2.0**n / 2 <= rest <= 2.0**n for n, rest in zip((1, 2, 5), rests[1:4], strict=True))
    assert 150 <= rests[4] <= 300


async def test_a_real_model_is_trained_over_the_wire(federation: Federation, encoder: Path, tmp_path: Path) -> None:
    """The whole path once: resolved plan, real training, evaluation on held-out rows, published adapters."""
    data = catalogue(tmp_path)
    device = await federation.enrol("device", make_profile(datasets={"things": data.describe("things")}))
    task = {"task": CLASSES, "data": "things", "model": {"id": str(encoder)}, "layout": None, "rounds": 2}
    training = {"learning_rate": 0.02, "batch_size": 4, "epochs": 20, "precision": "float32"}
    plan = make_plan(cohort={"target": 1, "quorum": 1}, adapter={"modules": ["query", "value"]}, training=training, **task)
    run = await federation.open(resolve(plan))
    async with looping(federation, device, Trainer(data), tmp_path) as loop:
        for _ in range(20):
            await loop.step()
            federation.tick()
    detail = await federation.admin.run(run)
    assert (detail.state, detail.round) == ("finished", 2)
    losses = [(await federation.admin.round(run, n)).metrics["loss"] for n in range(3)]
    assert losses[2] < losses[0]
