"""A real agent in its own process, over a socket: enrolled, examined, drained in the middle of a job."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvicorn

from modelling.layout import resolve
from protocol.states import JobState
from protocol.views import JobView
from tests.agent.work import catalogue
from tests.federation import Federation, make_plan, open_federation
from tests.modelling.drawn import CLASSES

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PATIENCE = 120.0  # seconds; an outer bound, nothing is measured by it
DATASETS = '[things]\nformat = "jsonl"\npath = "things.jsonl"\n'


@asynccontextmanager
async def served(federation: Federation) -> AsyncIterator[str]:
    """The coordinator on a port of this machine."""
    server = uvicorn.Server(uvicorn.Config(federation.app, port=0, lifespan="off", log_level="error"))
    serving = asyncio.create_task(server.serve())

    async def started() -> bool:
        return server.started

    await until(started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving


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


async def test_sigterm_gives_the_job_back_and_ends_well(sqlite_url: str, tmp_path: Path, encoder: Path) -> None:
    catalogue(tmp_path)
    await asyncio.to_thread((tmp_path / "datasets.toml").write_text, DATASETS)
    await asyncio.to_thread((tmp_path / "policy.toml").write_text, "memory_bytes = 100_000_000\n")
    async with open_federation(sqlite_url, tmp_path / "coordinator") as federation, served(federation) as url:
        token = (await federation.admin.invite()).token
        greeting, _ = await said(await agent(tmp_path, "enrol", url, "--name", "device", HLORA_AGENT_TOKEN=token))
        assert greeting.startswith("enrolled as device (client-")

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
