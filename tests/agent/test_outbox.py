"""Finished work is not lost: whatever happens to the agent, the coordinator or the way between them, it is delivered or told why not."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agent import durable
from agent.loop import Step
from agent.outbox import KEPT, Entry, Outbox
from agent.training import Outcome, Tell
from protocol import errors, slices
from protocol.messages import Job, Result, Usage
from protocol.slices import Slice
from protocol.states import JobState
from tests.agent.looping import ALONE, FINISHED, START, begin, done, last_job, looping, until
from tests.agent.test_checkpoints import files_up_to
from tests.federation import Device, Federation, make_plan, make_profile, moved


@dataclass
class Counted:
    """Training that is done at once, and counted."""

    jobs: list[str] = field(default_factory=list)

    def __call__(self, job: Job, start: Slice, tell: Tell) -> Outcome:
        self.jobs.append(job.id)
        return done(job, start)


@dataclass
class Away:
    """A coordinator that cannot be reached at some paths; what comes there is counted, and may be carried out all the same."""

    app: ASGIApp
    paths: tuple[str, ...]
    deaf: bool = True  # the request is lost; otherwise its answer is
    asked: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not scope["path"].endswith(self.paths):
            await self.app(scope, receive, send)
            return
        self.asked += 1
        if not self.deaf:
            await self.app(scope, receive, nowhere)
        raise httpx.ReadError("the way is cut")


async def nowhere(_: Message) -> None:
    """An answer that nobody hears."""


async def killed_while_it_delivers(
    federation: Federation, device: Device, train: Counted, folder: Path, away: Away, left: Sequence[str] = (*START, *FINISHED)
) -> None:
    """An agent that takes a job, does it, cannot deliver it, and is no more."""
    async with looping(federation, device, train, folder, app=away, left=left) as loop:
        step = asyncio.create_task(loop.step())

        async def tried() -> bool:
            return away.asked > 0

        await until(tried)
        step.cancel()
        await asyncio.gather(step, return_exceptions=True)


@pytest.fixture(params=["/slice", "/result"])
def lost(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return (request.param,)


@pytest.mark.parametrize("deaf", [True, False], ids=["request lost", "answer lost"])
async def test_what_an_agent_left_behind_is_delivered_by_the_next_one(
    federation: Federation, tmp_path: Path, lost: tuple[str, ...], deaf: bool
) -> None:
    device, run = await begin(federation)
    train = Counted()
    await killed_while_it_delivers(federation, device, train, tmp_path, Away(federation.app, lost, deaf))
    async with looping(federation, device, train, tmp_path) as loop:
        [entry] = loop.outbox.entries()
        assert await loop.deliver()
    assert len(train.jobs) == 1
    job = (await federation.admin.round(run, 1)).jobs[0]
    assert (job.state, job.slice) == (JobState.submitted, entry.slice)
    assert len((await federation.admin.round(run, 1)).jobs) == 1


async def test_a_job_that_is_handed_out_again_is_not_done_again(federation: Federation, tmp_path: Path, lost: tuple[str, ...]) -> None:
    """The agent comes back after its lease has run out; nobody took its place, so its job is handed out to it once more."""
    device, run = await begin(federation)
    train = Counted()
    await killed_while_it_delivers(federation, device, train, tmp_path, Away(federation.app, lost))
    federation.advance(100)
    assert (await last_job(federation, run))[0] is JobState.expired
    async with looping(federation, device, train, tmp_path) as loop:
        assert await loop.deliver()
        assert len(loop.outbox.entries()) == 1  # it may yet be wanted
        federation.advance(10)
        assert await loop.step() is Step.idle  # but it is seen again
        federation.tick()
        assert await loop.step() is Step.done
    assert len(train.jobs) == 1
    assert (await last_job(federation, run))[0] is JobState.submitted


async def test_a_lease_that_stands_is_taken_up_by_asking_for_work_too(federation: Federation, tmp_path: Path) -> None:
    device, run = await begin(federation)
    train = Counted()
    await killed_while_it_delivers(federation, device, train, tmp_path, Away(federation.app, ("/slice",)))
    async with looping(federation, device, train, tmp_path) as loop:
        assert await loop.step() is Step.done
    assert len(train.jobs) == 1
    assert (await last_job(federation, run))[0] is JobState.submitted


async def test_a_coordinator_that_is_away_for_long_is_waited_for_with_the_work_in_hand(federation: Federation, tmp_path: Path) -> None:
    away = iter(range(8))  # more than one request is tried

    async def leaving(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].endswith("/slice") and next(away, None) is not None:
            raise httpx.ConnectError("refused")
        await federation.app(scope, receive, send)

    device, run = await begin(federation)
    async with looping(federation, device, Counted(), tmp_path, app=leaving) as loop:
        assert await loop.step() is Step.done
    assert next(away, None) is None
    assert (await last_job(federation, run))[0] is JobState.submitted


async def test_a_job_whose_time_is_over_does_not_keep_the_agent_from_others(federation: Federation, tmp_path: Path) -> None:
    """The result arrived, its answer never does: the agent turns to other work, and hears of it later."""
    device, run = await begin(federation)
    ticks = itertools.count(0, 1000)  # seconds: a look at the clock takes a quarter of the job's hour
    away = Away(federation.app, ("/result",), deaf=False)
    async with looping(federation, device, Counted(), tmp_path, app=away, left=START + FINISHED, clock=lambda: next(ticks)) as loop:
        assert await loop.step() is Step.over
    assert (await last_job(federation, run))[0] is JobState.submitted
    async with looping(federation, device, Counted(), tmp_path) as loop:
        running = asyncio.create_task(loop.run(make_profile()))

        async def heard() -> bool:
            return not list((tmp_path / "home" / "outbox").iterdir())

        await until(heard)
        loop.stopping.set()
        await running


async def test_work_waits_for_a_newer_agent_where_this_one_is_too_old(federation: Federation, tmp_path: Path) -> None:
    async def newer(scope: Scope, receive: Receive, send: Send) -> None:
        strange = JSONResponse({"stored": True})
        await (strange if scope["path"].endswith("/slice") else federation.app)(scope, receive, send)

    device, run = await begin(federation)
    train = Counted()
    async with looping(federation, device, train, tmp_path, app=newer, left=START + FINISHED) as loop:
        assert await loop.step() is Step.kept
    async with looping(federation, device, train, tmp_path) as loop:
        assert await loop.deliver()
    assert len(train.jobs) == 1
    assert (await last_job(federation, run))[0] is JobState.submitted


async def test_what_nobody_wants_any_more_is_removed_with_the_reason(
    federation: Federation, tmp_path: Path, lost: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    device, run = await begin(federation)
    await killed_while_it_delivers(federation, device, Counted(), tmp_path, Away(federation.app, lost))
    await federation.admin.change_run(run, "stop")
    async with looping(federation, device, Counted(), tmp_path) as loop:
        assert await loop.deliver()
    assert (await last_job(federation, run))[0] is JobState.cancelled
    assert "the job is cancelled" in next(line for line in capsys.readouterr().out.splitlines() if "outbox-removed" in line)


async def test_a_revoked_agent_keeps_nothing_and_ends(federation: Federation, tmp_path: Path) -> None:
    device, _ = await begin(federation)
    await killed_while_it_delivers(federation, device, Counted(), tmp_path, Away(federation.app, ("/slice",)))
    await federation.admin.change_client(device, state="revoked")
    async with looping(federation, device, Counted(), tmp_path) as loop:
        assert await loop.deliver()
        with pytest.raises(errors.Unauthenticated):
            await loop.run(make_profile())


async def test_work_for_somebody_else_is_removed(federation: Federation, tmp_path: Path) -> None:
    device, run = await begin(federation)
    await killed_while_it_delivers(federation, device, Counted(), tmp_path, Away(federation.app, ("/slice",)))
    other = await federation.enrol("enrolled anew")
    async with looping(federation, other, Counted(), tmp_path) as loop:
        assert await loop.deliver()
    assert (await last_job(federation, run))[0] is JobState.leased


async def test_several_jobs_are_delivered_oldest_first(federation: Federation, tmp_path: Path) -> None:
    device, first = await begin(federation)
    federation.advance(1)
    second = await federation.open(make_plan(**ALONE, name="second"))
    train = Counted()
    await killed_while_it_delivers(federation, device, train, tmp_path, Away(federation.app, ("/slice",)))
    federation.advance(100)  # the lease of the first job is lost
    away = Away(federation.app, ("/slice",))
    await killed_while_it_delivers(federation, device, train, tmp_path, away, 2 * START + 2 * FINISHED)
    async with looping(federation, device, train, tmp_path) as loop:
        assert [entry.job.id for entry in loop.outbox.entries()] == train.jobs
        assert await loop.deliver()
        assert (await last_job(federation, second))[0] is JobState.submitted
        federation.advance(10)
        assert await loop.step() is Step.idle
        federation.tick()  # the first job is handed out again
        assert await loop.step() is Step.done
    assert len(train.jobs) == 2
    assert (await last_job(federation, first))[0] is JobState.submitted


@pytest.mark.parametrize("file", FINISHED)
async def test_work_that_was_damaged_is_removed_and_done_anew(federation: Federation, tmp_path: Path, file: str) -> None:
    device, run = await begin(federation)
    train = Counted()
    await killed_while_it_delivers(federation, device, train, tmp_path, Away(federation.app, ("/slice",)))
    [damaged] = (tmp_path / "home" / "outbox").glob(f"*/{file}")
    data = damaged.read_bytes()
    damaged.write_bytes(data[: len(data) // 2])
    async with looping(federation, device, train, tmp_path) as loop:
        assert await loop.deliver()
        assert list((tmp_path / "home" / "outbox").iterdir()) == []
        assert await loop.step() is Step.done
    assert len(train.jobs) == 2
    assert (await last_job(federation, run))[0] is JobState.submitted


async def test_a_slice_that_is_damaged_while_it_waits_is_noticed(federation: Federation, tmp_path: Path) -> None:
    device, run = await begin(federation)
    async with looping(federation, device, Counted(), tmp_path, app=Away(federation.app, ("/slice",))) as loop:
        step = asyncio.create_task(loop.step())

        async def there() -> bool:
            return bool(list((tmp_path / "home" / "outbox").glob("*/entry.json")))

        await until(there)
        [file] = (tmp_path / "home" / "outbox").glob("*/slice.safetensors")
        file.write_bytes(file.read_bytes()[::-1])
        assert await step is Step.given_back
    assert await last_job(federation, run) == (
        JobState.released,
        "the slice in the agent's outbox was damaged; the job has to be done anew",
    )


async def test_a_stopping_agent_delivers_what_is_on_its_way(federation: Federation, tmp_path: Path) -> None:
    device, run = await begin(federation)
    begun = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].endswith("/slice"):
            begun.set()
            await asyncio.sleep(0.3)
        await federation.app(scope, receive, send)

    async with looping(federation, device, Counted(), tmp_path, app=slow) as loop:
        step = asyncio.create_task(loop.step())
        await begun.wait()
        loop.stopping.set()
        assert await step is Step.done
    assert (await last_job(federation, run))[0] is JobState.submitted


async def test_a_stopping_agent_that_cannot_deliver_keeps_the_work_and_the_lease(federation: Federation, tmp_path: Path) -> None:
    device, run = await begin(federation)
    away = Away(federation.app, ("/result",))
    async with looping(federation, device, Counted(), tmp_path, app=away, left=START + FINISHED) as loop:
        step = asyncio.create_task(loop.step())

        async def tried() -> bool:
            return away.asked > 0

        await until(tried)
        loop.stopping.set()
        assert await step is Step.kept
    assert (await last_job(federation, run))[0] is JobState.leased
    async with looping(federation, device, Counted(), tmp_path) as loop:
        assert await loop.deliver()
    assert (await last_job(federation, run))[0] is JobState.submitted


def stored(outbox: Outbox, job: Job, start: Slice) -> Entry:
    return outbox.store(job, start, Outcome(examples=5, metrics={}, usage=Usage(), slice=moved(start, job)), Usage())


@pytest.fixture
async def task(federation: Federation) -> tuple[Job, Slice]:
    """A job, and the slice to start from."""
    device, _ = await begin(federation)
    job = await device.take()
    return job, slices.unpack(await device.blob(job.slice.digest))


def test_an_entry_is_for_its_owner_alone_and_says_no_more_than_the_result(tmp_path: Path, task: tuple[Job, Slice]) -> None:
    outbox = Outbox(tmp_path / "outbox")
    entry = stored(outbox, *task)
    files = sorted(path for path in outbox.folder.rglob("*") if path.is_file())
    assert [path.name for path in files] == FINISHED
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert outbox.entries() == [entry]
    assert set(Entry.model_fields) == {"job", "result", "bytes", "sent"}
    assert isinstance(entry.result, Result)


def test_a_job_that_starts_from_another_slice_is_done_anew(tmp_path: Path, task: tuple[Job, Slice]) -> None:
    outbox, (job, start) = Outbox(tmp_path / "outbox"), task
    stored(outbox, job, start)
    other = job.model_copy(update={"slice": job.slice.model_copy(update={"digest": f"sha256:{1:064}"})})
    assert outbox.find(other) is None
    assert outbox.entries() == []


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, task: tuple[Job, Slice]) -> None:
    outbox = Outbox(tmp_path / "outbox")
    with files_up_to(700), pytest.raises(errors.InsufficientStorage, match="make room on this disk, or move the agent's home folder"):
        stored(outbox, *task)
    assert list((tmp_path / "outbox").iterdir()) == []


def test_only_the_newest_entries_are_kept(tmp_path: Path, task: tuple[Job, Slice]) -> None:
    outbox, (job, start) = Outbox(tmp_path / "outbox"), task
    for number in range(KEPT + 2):
        stored(outbox, job.model_copy(update={"id": f"job-{number}"}), start)
    assert [entry.job.id for entry in outbox.entries()] == [f"job-{number}" for number in range(2, KEPT + 2)]


NAMES = ["..", "../../etc", "/etc", "a/b", "", ".", "a" * 200, "naïve", "line\nbreak", "\ud800"]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_no_name_of_a_job_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    assert durable.folder(tmp_path, name).parent == tmp_path
    assert durable.PLAIN.fullmatch(durable.folder(tmp_path, name).name)
