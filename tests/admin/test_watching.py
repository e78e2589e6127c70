"""Following a run: what changes between two looks, and what is made of it on the screen."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from rich.console import Console

from admin.client import Client
from admin.following import Change, Snapshot, changes, look, settled
from admin.screen import current_jobs, line, screen
from admin.watch import PATIENCE_SECONDS, Lines, follow
from protocol import errors
from protocol.messages import Metric
from protocol.states import JobKind, JobState, RoundState, RunState
from tests.admin.conftest import Desk
from tests.federation import make_plan, make_profile

Seen = list[Snapshot]


def drawn(now: Snapshot, trouble: str | None = None) -> str:
    """The screen as text."""
    file = io.StringIO()
    Console(file=file, width=200, markup=False, highlight=False).print(screen(now, trouble))
    return file.getvalue()


def told(seen: Seen) -> list[Change]:
    """All changes from look to look."""
    pairs = zip([None, *seen[:-1]], seen, strict=True)
    return [change for before, after in pairs for change in changes(before, after)]


async def followed(desk: Desk, run: str, turn: Callable[[], Any], client: Client | None = None) -> tuple[Snapshot, Seen, list[str]]:
    """Follow a run in a thread; whenever it would sleep, `turn` is played here instead."""
    loop = asyncio.get_running_loop()
    seen: Seen = []
    troubles: list[str] = []

    def show(now: Snapshot, trouble: str | None) -> None:
        seen.append(now)
        troubles.extend([trouble] if trouble else [])

    def sleep(_: float) -> None:
        played: Future[None] = asyncio.run_coroutine_threadsafe(turn(), loop)
        played.result()

    with client or desk.client() as connection:
        last = await asyncio.to_thread(follow, connection, run, show, 1.0, sleep)
    return last, seen, troubles


async def test_a_run_is_followed_from_its_first_job_to_its_end(desk: Desk) -> None:
    federation = desk.federation
    await federation.enrol_many(3)
    run = (await federation.admin.create(make_plan())).id

    async def turn() -> None:
        """One device does one job."""
        federation.tick()
        for device in federation.devices:
            job = await device.next_job()
            if job is not None:
                await device.renew(job, step=3, loss=0.5)
                await device.complete(job)
                return

    last, seen, _ = await followed(desk, run, turn)
    assert last.run.state is RunState.finished
    assert {key: summary.state for key, summary in last.rounds.items()} == dict.fromkeys([(0, 1), (1, 1), (2, 1)], RoundState.published)
    assert len(last.jobs) == 3 * 3 + 2 * 3  # three evaluations of three adapters, three contributions to two rounds
    assert all(job.state is JobState.accepted for _, job in last.jobs.values())
    lines = [said for said in map(line, told(seen)) if said is not None]
    assert len(lines) == len(set(lines))
    assert lines[0].startswith("round 0 merging")
    assert "round 1 open; 0 of 3 contributions" in lines
    assert "round 1: device 2 trains at rank 4: queued; the plan gives every client the same rank" in lines
    assert "round 1: device 2 trains at rank 4: submitted; 5 rows; accuracy 0.5" in lines
    assert any(said.startswith("round 1 published; the target of 3 is in; 3 of 3 contributions") for said in lines)
    assert lines[-1] == "run small is finished, 2 of 2 rounds published; accuracy 0.5"


async def test_a_rounds_measures_are_one_line_once_all_are_in(desk: Desk) -> None:
    federation = desk.federation
    devices = await federation.enrol_many(3)
    run = await federation.open(make_plan(rounds=1))
    values = iter([0.25, 0.5, 0.75])

    async def turn() -> None:
        """One device does one job; each measures something else."""
        for device in devices:
            job = await device.next_job()
            if job is not None:
                value = next(values) if job.kind is JobKind.evaluate and job.round == 1 else 0.5
                await device.complete(job, metrics={"accuracy": Metric(value=value, weight=3)})
                break
        federation.tick()

    _, seen, _ = await followed(desk, run, turn)
    every, quiet = ([line(change) or "" for change in told(looks)] for looks in (seen, [settled(look) for look in seen]))
    of_round = [[text for text in said if text.startswith("round 1 published") and "accuracy" in text] for said in (every, quiet)]
    assert [len(said) for said in of_round] == [3, 1]
    assert of_round[0][-1] == of_round[1][0]
    assert quiet[-1] == every[-1]


async def test_an_abandoned_attempt_between_two_looks_is_seen(desk: Desk) -> None:
    federation = desk.federation
    run, devices, _ = await federation.training(make_plan(rounds=1))
    with desk.client() as client:
        before = look(client, run, None)
        federation.advance(make_plan().times.round + 1)
        for device in devices:
            await device.next_job()
        federation.tick()
        after = look(client, run, before)
    assert before.rounds[1, 1].state is RoundState.open
    assert {key[1]: found.state for key, found in after.rounds.items() if key[0] == 1} == {1: RoundState.abandoned, 2: RoundState.open}
    said = [line(change) for change in changes(before, after)]
    assert any(text is not None and text.startswith("round 1 abandoned") for text in said)


async def test_progress_within_a_job_is_told_to_programs_and_no_line(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    run, [device, *_], [job, *_] = await desk.federation.training(make_plan())
    with desk.client() as client:
        before = look(client, run, None)
        await device.renew(job, phase="train", step=4, loss=0.25)
        after = look(client, run, before)
    [change] = changes(before, after)
    assert change.kind == "progress"
    assert change.job is not None
    assert change.job.progress is not None
    assert (change.job.progress.step, change.job.progress.loss) == (4, 0.25)
    show = Lines(line)
    show(before, None)
    capsys.readouterr()
    for _ in range(3):
        show(after, "the coordinator is away")
    assert capsys.readouterr() == ("", "the coordinator is away\n")
    for _ in range(3):
        show(after, None)
    assert capsys.readouterr() == ("", "the coordinator answers again\n")


async def test_the_screen_shows_each_clients_rank_progress_and_loss(desk: Desk) -> None:
    run, [device, *_], [job, *_] = await desk.federation.training(make_plan())
    await device.renew(job, phase="train", step=4, loss=0.25)
    with desk.client() as client:
        now = look(client, run, None)
    text = drawn(now, "the coordinator is away")
    for fact in (
        "small  running",
        "round 0 of 2",
        "device 1",
        "leased",
        "train",
        "0.25",
        "the plan gives every client the same rank",
    ):
        assert fact in text
    assert text.rstrip().endswith("the coordinator is away")
    assert len(current_jobs(now)) == 3


async def test_the_time_left_is_estimated_from_published_rounds(desk: Desk) -> None:
    federation = desk.federation
    devices = await federation.enrol_many(3)
    run = await federation.open(make_plan(rounds=4))
    with desk.client() as client:
        assert look(client, run, None).remaining_seconds() is None
        for _ in range(2):
            federation.clock.advance(60)
            federation.tick()
            for device in devices:
                while job := await device.next_job():
                    await device.complete(job)
            federation.tick()
        now = look(client, run, None)
    assert (now.run.round, now.remaining_seconds()) == (2, 2 * 60.0)
    assert "about 2 min 0 s left" in drawn(now)


class Cut(httpx.BaseTransport):
    """A network that is down for some requests."""

    def __init__(self, good: int, bad: int) -> None:
        self._network = httpx.HTTPTransport()
        self._good, self._bad = good, bad

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self._good -= 1
        if self._good < 0 < self._bad:
            self._bad -= 1
            raise httpx.ConnectError("the cable is out")
        return self._network.handle_request(request)

    def close(self) -> None:
        self._network.close()


async def test_a_coordinator_that_does_not_answer_for_a_while_is_waited_for(desk: Desk) -> None:
    run = (await desk.federation.admin.create(make_plan())).id
    turns = 0

    async def turn() -> None:
        nonlocal turns
        turns += 1
        if turns == 4:
            await desk.federation.admin.change_run(run, "stop")

    client = Client(desk.url, SecretStr(desk.token), transport=Cut(good=6, bad=2))
    last, _, troubles = await followed(desk, run, turn, client)
    assert last.run.state is RunState.stopped
    assert len(troubles) == 2
    assert "the cable is out" in troubles[0]
    assert troubles[0].endswith("; trying again")


async def test_a_coordinator_that_is_gone_is_not_waited_for_for_ever(desk: Desk) -> None:
    run = (await desk.federation.admin.create(make_plan())).id
    turns = 0

    async def turn() -> None:
        nonlocal turns
        turns += 1

    client = Client(desk.url, SecretStr(desk.token), transport=Cut(good=6, bad=10**6))
    with pytest.raises(errors.Unavailable, match="the cable is out"):
        await followed(desk, run, turn, client)
    assert turns >= PATIENCE_SECONDS


OBEYED = "\x1b[2J\x1b]0;mine\x07\x9b8m"


async def test_no_terminal_obeys_what_a_client_wrote(desk: Desk) -> None:
    """Its machine and its data, how far it is, and why it gives its work back: on the screen, as lines, and in tables."""
    profile = make_profile(device=f"cpu{OBEYED}", software={f"torch{OBEYED}": f"2{OBEYED}"})
    odd = profile.model_copy(update={"datasets": profile.datasets | {OBEYED: profile.datasets["texts"]}})
    one, two, *_ = [await desk.federation.enrol(f"device {number}", odd) for number in (1, 2, 3)]
    run = await desk.federation.open(make_plan(evaluation={"every": 0}))
    with desk.client() as client:
        before = look(client, run, None)
        body = {"epoch": 1, "phase": OBEYED, "step": 0, "steps": 0}
        job = await one.take()
        await one.call("POST", f"/v1/jobs/{job.id}/lease", json=body)
        await two.give_back(await two.take(), OBEYED)
        after = look(client, run, before)

    said = [line(change) or "" for change in changes(before, after)]
    shown = [drawn(after, OBEYED), desk.say("rounds", "show", run), desk.say("clients", "show", "device 1"), *said]
    assert [text for text in shown if not text.replace("\n", "").isprintable()] == []
    assert all(r"\x1b[2J\x1b]0;mine\x07\x9b8m" in text for text in shown[:3])
    assert any(r"\x1b[2J" in text for text in said)

    told = desk.say("clients", "show", "device 1", "--json")
    assert told.replace("\n", "").isprintable()
    assert OBEYED in json.loads(told)["profile"]["datasets"]
