"""A real agent in its own process, over a socket: enrolled, examined, drained in the middle of a job, killed in the middle of others."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import SecretStr
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from agent import app
from agent.data import load
from agent.outbox import Entry
from agent.settings import Settings
from agent.training import Trainer
from modelling.layout import resolve
from protocol import slices
from protocol.states import JobState
from protocol.views import JobView
from tests.agent.links import served
from tests.agent.work import ROWS, catalogue
from tests.federation import make_plan, open_federation
from tests.modelling.drawn import CLASSES

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PATIENCE = 120.0  # seconds; an outer bound, nothing is measured by it
DATASETS = '[things]\nformat = "jsonl"\npath = "things.jsonl"\n'


async def until(what: Callable[[], Awaitable[bool]]) -> None:
    for _ in range(int(PATIENCE / 0.05)):
        if await what():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it never came to that")


async def agent(home: Path, *arguments: str, **environment: str) -> asyncio.subprocess.Process:
    """The agent's command in its own process."""
    own = {"HLORA_AGENT_HOME": str(home), "HLORA_AGENT_THREADS": "1", "HLORA_AGENT_LOG": "json", "PYTHONPATH": str(ROOT)}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "agent",
        *arguments,
        env=os.environ | own | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def said(process: asyncio.subprocess.Process) -> tuple[str, str]:
    """What a process printed until its end, which must be a good one."""
    out, err = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode == 0, (out + err).decode()
    return out.decode(), err.decode()


async def test_a_second_agent_in_the_same_home_is_refused(sqlite_url: str, tmp_path: Path) -> None:
    catalogue(tmp_path)
    await asyncio.to_thread((tmp_path / "datasets.toml").write_text, DATASETS)
    async with open_federation(sqlite_url, tmp_path / "coordinator") as federation, served(federation.app) as url:
        token = (await federation.admin.invite()).token
        await app.enrol(Settings(home=tmp_path), url, "device", SecretStr(token))
        agents = [await agent(tmp_path, "run") for _ in range(2)]
        told = {asyncio.create_task(process.communicate()): process for process in agents}
        (ended,), (waiting,) = await asyncio.wait(told, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
        assert told[ended].returncode == 78
        assert f"another agent is at work in {tmp_path}" in ended.result()[1].decode()
        told[waiting].kill()
        await waiting


async def test_sigterm_gives_the_job_back_and_ends_well(sqlite_url: str, tmp_path: Path, encoder: Path) -> None:
    catalogue(tmp_path)
    await asyncio.to_thread((tmp_path / "datasets.toml").write_text, DATASETS)
    await asyncio.to_thread((tmp_path / "policy.toml").write_text, "memory_bytes = 100_000_000\n")
    async with open_federation(sqlite_url, tmp_path / "coordinator") as federation, served(federation.app) as url:
        token = (await federation.admin.invite()).token
        enrolment = ("enrol", url, "--name", "device", "--home", str(tmp_path))
        greeting, _ = await said(await agent(tmp_path, *enrolment, HLORA_AGENT_TOKEN=token))
        assert greeting.startswith("enrolled as device (client-")
        assert greeting.endswith(f"python -m agent run --home {tmp_path}\n")

        examined, _ = await said(await agent(tmp_path, "doctor", "--model", str(encoder), "--json"))
        assert {line["point"] for line in json.loads(examined)} == {
            "policy",
            "device",
            "memory",
            "data",
            "model",
            "identity",
            "coordinator",
        }

        plan = make_plan(
            model={"id": str(encoder)},
            task=CLASSES,
            data="things",
            adapter={"modules": ["query"]},
            layout=None,
            training={"learning_rate": 1e-3, "epochs": 1000},
            times={"lease": 1, "no_progress": 600, "job": 3600, "round": 7200},
            cohort={"target": 1, "quorum": 1},
            evaluation={"every": 0},
        )
        run = await federation.open(resolve(plan))
        process = await agent(tmp_path, "run")

        async def job() -> JobView:
            return (await federation.admin.round(run, 1)).jobs[0]

        async def at_work() -> bool:
            progress = (await job()).progress
            return progress is not None and progress.step > 0

        await until(at_work)
        process.send_signal(signal.SIGTERM)
        _, log = await said(process)
        view = await job()
    assert (view.state, view.reason) == (JobState.released, "the agent is stopping")
    events = [json.loads(line)["event"] for line in log.splitlines() if line.startswith("{")]
    assert events == ["agent-started", "job-taken", "job-given-back", "agent-stopped"]
    assert token not in log


@dataclass
class Gate:
    """An application that answers no question about slices until it is opened."""

    app: ASGIApp
    closed: bool = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        away = self.closed and scope["path"].endswith("/slice")
        await (Response(status_code=503) if away else self.app)(scope, receive, send)


async def test_an_agent_that_is_killed_again_and_again_sends_the_bytes_of_one_that_is_not(
    sqlite_url: str, tmp_path: Path, encoder: Path
) -> None:
    """Killed in the middle of the training, and with the result in the outbox."""
    catalogue(tmp_path)
    await asyncio.to_thread((tmp_path / "datasets.toml").write_text, DATASETS)
    async with open_federation(sqlite_url, tmp_path / "coordinator") as federation, served(gate := Gate(federation.app)) as url:
        token = (await federation.admin.invite()).token
        await app.enrol(Settings(home=tmp_path), url, "device", SecretStr(token))
        run = await federation.open(resolve(make_plan(**LONG, model={"id": str(encoder)})))

        async def view() -> JobView:
            return (await federation.admin.round(run, 1)).jobs[0]

        async def at_work() -> bool:
            progress = (await view()).progress
            return progress is not None and progress.step > 0 and bool(found(tmp_path, "work/*/checkpoint"))

        async def finished() -> bool:
            return bool(found(tmp_path, "outbox/*/entry.json"))

        async def answered() -> bool:
            return (await view()).state is JobState.submitted

        logs = []
        for reached in (at_work, finished):
            process = await agent(tmp_path, "run", HLORA_AGENT_CHECKPOINT_SECONDS="0.1")
            await until(reached)
            logs.append(await killed(process))
        [left] = found(tmp_path, "outbox/*/entry.json")
        entry = Entry.model_validate_json(left)
        for content in found(tmp_path, "outbox/*/*"):
            assert not any(str(row["text"]).encode() in content for row in ROWS)
        gate.closed = False
        process = await agent(tmp_path, "run")
        await until(answered)
        process.send_signal(signal.SIGTERM)
        await said(process)
        slice = (await view()).slice
        start = slices.unpack(federation.parts.blobs.read(entry.job.slice.digest))
    assert ["training-resumed" in log for log in logs] == [False, True]
    undisturbed = await asyncio.to_thread(Trainer(load(tmp_path)), entry.job, start, lambda _: None)
    assert undisturbed.slice is not None
    assert slice is not None
    assert slices.digest(slices.pack(undisturbed.slice, entry.job.layout, entry.job.wire)) == slice.digest
    assert found(tmp_path, "outbox/*/*") + found(tmp_path, "work/*/*") == []


LONG: dict[str, object] = {
    "task": CLASSES,
    "data": "things",
    "adapter": {"modules": ["query"], "dropout": 0.1},
    "layout": None,
    "training": {"learning_rate": 1e-3, "epochs": 150},
    "times": {"lease": 1, "no_progress": 600, "job": 3600, "round": 7200},
    "cohort": {"target": 1, "quorum": 1},
    "evaluation": {"every": 0},
}


async def killed(process: asyncio.subprocess.Process) -> str:
    """What a process said until it was killed."""
    process.kill()
    _, err = await asyncio.wait_for(process.communicate(), PATIENCE)
    return err.decode()


def found(home: Path, pattern: str) -> list[bytes]:
    """What the files of a home folder hold."""
    return [path.read_bytes() for path in home.glob(pattern)]
