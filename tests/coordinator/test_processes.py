"""The coordinator as a process of its own: stopped, killed and started again in the middle of a round."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from coordinator.__main__ import app
from protocol.messages import Job
from protocol.states import JobState, RunState
from tests.federation import Device, Operator, enrol, make_plan, make_profile, open_federation

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NAMES = ("one", "two", "three")
PLAN = make_plan(rounds=2, evaluation={"every": 0})


@dataclass
class Service:
    """One coordinator, which may be away, at one address."""

    folder: Path
    settings: dict[str, str]
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def said(self) -> str:
        """The log of the last start."""
        return (self.folder / "log").read_text()

    def start(self) -> None:
        """Start, and return when it listens."""
        command = [sys.executable, "-m", "coordinator", "serve", "--port", str(self.port)]
        others = {name: value for name, value in os.environ.items() if not name.startswith("HLORA_")}
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=others | self.settings, stderr=log)
        end = time.monotonic() + 60
        while (found := re.search(r"http://127\.0\.0\.1:(\d+)", self.said())) is None:
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.02)
        self.port = int(found[1])

    def end(self, how: signal.Signals) -> int:
        """Send it a signal; gives the exit code."""
        assert self.process is not None
        self.process.send_signal(how)
        return self.process.wait(timeout=60)

    def token(self) -> str:
        """An operator's token, from the command."""
        result = CliRunner().invoke(app, ["token", "test"], env=self.settings)
        assert result.exit_code == 0, result.output
        return result.stdout.strip()


@pytest.fixture
def service(database_url: str, tmp_path: Path) -> Iterator[Service]:
    """A coordinator that runs."""
    settings = {"DATA": str(tmp_path / "data"), "DATABASE_URL": database_url, "EXECUTOR": "threads://1", "TICK_SECONDS": "0.05"}
    service = Service(tmp_path, {f"HLORA_COORDINATOR_{name}": value for name, value in settings.items()})
    service.start()
    yield service
    if service.process is not None and service.process.poll() is None:
        service.end(signal.SIGKILL)


@asynccontextmanager
async def operating(service: Service) -> AsyncIterator[Operator]:
    async with httpx.AsyncClient(base_url=service.url, timeout=60, trust_env=False) as http:
        yield Operator(http, service.token())


async def taken(device: Device) -> Job:
    """The device's next job, which comes soon."""
    job = await device.next_job(wait=20)
    assert job is not None, f"{device.name} has no job"
    return job


@pytest.fixture
async def undisturbed(_migrated_sqlite: Path, tmp_path: Path) -> list[object]:
    """What the same federation publishes when nothing happens to it."""
    database = shutil.copy(_migrated_sqlite, tmp_path / "undisturbed.sqlite")
    async with open_federation(f"sqlite:///{database}", tmp_path / "undisturbed") as federation:
        for name in NAMES:
            await federation.enrol(name)
        run = await federation.open(PLAN)
        await federation.play([run])
        return await published(federation.admin, run)


async def published(admin: Operator, run: str) -> list[object]:
    """The names of everything that a run published."""
    views = [await admin.round(run, number) for number in range(PLAN.rounds + 1)]
    return [(view.adapter, view.slices, view.contributions) for view in views]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
async def test_a_federation_goes_on_after_its_coordinator_was_away(
    service: Service, how: signal.Signals, undisturbed: list[object]
) -> None:
    """The first client had answered, the second had sent its slice and not its result, the third was still at work."""
    async with operating(service) as admin:
        one, two, three = devices = [await enrol(admin, name, make_profile()) for name in NAMES]
        run = (await admin.create(PLAN)).id
        first, second, third = [await taken(device) for device in devices]
        result = await one.complete(first)
        slice = (await two.put_slice(second, await two.trained(second))).digest

        assert service.end(how) == (0 if how is signal.SIGTERM else -signal.SIGKILL)
        service.start()

        assert (await one.put_result(first, result)).state is JobState.submitted  # its answer might have been lost
        await two.put_result(second, two.result(second, slice))
        await three.renew(third, step=1)
        await three.complete(third)
        for device in devices:
            await device.complete(await taken(device))
        while (await admin.run(run)).state is RunState.running:
            await one.next_job(wait=1)

        assert await published(admin, run) == undisturbed


async def test_being_stopped_it_answers_those_who_wait(service: Service) -> None:
    async with operating(service) as admin:
        device = await enrol(admin, "one", make_profile())
        poll = asyncio.ensure_future(device.next_job(wait=20))
        await asyncio.sleep(0.5)

        assert await asyncio.to_thread(service.end, signal.SIGTERM) == 0

        assert await asyncio.wait_for(poll, 10) is None


@pytest.mark.parametrize("form", ["false", "true"], ids=["text", "json"])
async def test_the_trace_of_a_defect_is_short_and_tells_no_secret(sqlite_url: str, tmp_path: Path, form: str) -> None:
    """The row of the caller's own token cannot be read: the trace leads through the function that holds the secret."""
    settings = {"DATA": str(tmp_path / "data"), "DATABASE_URL": sqlite_url, "LOG_JSON": form}
    service = Service(tmp_path, {f"HLORA_COORDINATOR_{name}": value for name, value in settings.items()})
    service.start()
    async with operating(service) as admin:
        with closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))) as connection:
            connection.execute("update tokens set created_at = 'no time'")
            connection.commit()

        response = await admin.call("GET", "/v1/runs")

        assert response.status_code == 500
        assert "no time" not in response.text
    service.end(signal.SIGTERM)
    said = service.said()
    assert "no time" in said
    assert len(said) < 50_000
    assert str(admin.secret)[:20] not in said
