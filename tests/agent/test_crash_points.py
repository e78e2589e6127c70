"""An agent that dies right after each thing that lasts, and is started again, sends the bytes of one that was left alone."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from pydantic import SecretStr

from agent import app
from agent.data import load
from agent.outbox import Entry
from agent.settings import Settings
from agent.training import Trainer
from modelling.layout import resolve
from protocol import slices
from protocol.crash import Point
from protocol.states import JobState
from protocol.views import JobView
from tests.agent.links import served
from tests.agent.work import catalogue
from tests.federation import make_plan, open_federation
from tests.modelling.drawn import CLASSES

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PATIENCE = 120.0  # seconds; an outer bound, nothing is measured by it
POINTS = [Point.agent_checkpoint_kept, Point.agent_work_kept, Point.agent_slice_acknowledged, Point.agent_result_acknowledged]


async def agent(home: Path, **settings: str) -> asyncio.subprocess.Process:
    """The agent's command in its own process."""
    told = {"home": str(home), "threads": "1", "checkpoint_seconds": "0.1"} | settings
    environment = {f"HLORA_AGENT_{name.upper()}": value for name, value in told.items()} | {"PYTHONPATH": str(ROOT)}
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "agent", "run", env=os.environ | environment, stderr=asyncio.subprocess.PIPE
    )


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    for _ in range(int(PATIENCE / 0.1)):
        if await true():
            return
        await asyncio.sleep(0.1)
    raise AssertionError("it never came to that")


def found(home: Path, pattern: str) -> list[bytes]:
    """What the files of a home folder hold."""
    return [path.read_bytes() for path in home.glob(pattern)]


def test_every_point_of_the_agent_is_tried() -> None:
    assert [point for point in Point if point.startswith("agent-")] == POINTS


async def test_an_agent_that_dies_at_every_point_of_one_job_does_it_once(sqlite_url: str, tmp_path: Path, encoder: Path) -> None:
    catalogue(tmp_path)
    await asyncio.to_thread((tmp_path / "datasets.toml").write_text, '[things]\nformat = "jsonl"\npath = "things.jsonl"\n')
    plan = make_plan(
        model={"id": str(encoder)},
        task=CLASSES,
        data="things",
        adapter={"modules": ["query"], "dropout": 0.1},
        layout=None,
        training={"learning_rate": 1e-3, "epochs": 60},
        cohort={"target": 1, "quorum": 1},
        evaluation={"every": 0},
    )
    async with open_federation(sqlite_url, tmp_path / "coordinator") as federation, served(federation.app) as url:
        token = (await federation.admin.invite()).token
        await app.enrol(Settings(home=tmp_path), url, "device", SecretStr(token))
        run = await federation.open(resolve(plan))

        async def view() -> JobView:
            return (await federation.admin.round(run, 1)).jobs[0]

        for point in POINTS:
            process = await agent(tmp_path, crash_at=point)
            _, said = await asyncio.wait_for(process.communicate(), PATIENCE)
            assert (point, process.returncode) == (point, -signal.SIGKILL), said.decode()
        assert (await view()).state is JobState.submitted
        (left,) = found(tmp_path, "outbox/*/entry.json")
        entry = Entry.model_validate_json(left)
        process = await agent(tmp_path)

        async def delivered() -> bool:
            return not found(tmp_path, "outbox/*/*")

        await until(delivered)
        process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.communicate(), PATIENCE)
        slice = (await view()).slice
        start = slices.unpack(federation.parts.blobs.read(entry.job.slice.digest))
    undisturbed = (await asyncio.to_thread(Trainer(load(tmp_path)), entry.job, start, lambda _: None)).slice
    assert undisturbed is not None
    assert slice is not None
    assert slices.digest(slices.pack(undisturbed, entry.job.layout, entry.job.wire)) == slice.digest
