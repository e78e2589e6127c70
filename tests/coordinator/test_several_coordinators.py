"""Several coordinators on one PostgreSQL and one blob store are one service; on one SQLite file there is only one."""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from coordinator.__main__ import app
from protocol.crash import Point
from tests.coordinator.services import Persistent, Service
from tests.coordinator.whole_run import Outcome, Prepared, carried_out, prepare
from tests.postgres import Server

pytestmark = pytest.mark.slow


@asynccontextmanager
async def started(url: str, folder: Path, *crash_at: Point | None) -> AsyncIterator[list[Service]]:
    """As many coordinators as points, each of which dies at its own; ended when the block ends."""
    settings = {"DATA": str(folder / "data"), "DATABASE_URL": url, "EXECUTOR": "threads://1", "TICK_SECONDS": "2"}
    services = [Service(f"coordinator {number}", folder, settings) for number, _ in enumerate(crash_at, 1)]
    try:
        for service, point in zip(services, crash_at, strict=True):
            await asyncio.to_thread(service.start, **({} if point is None else {"crash_at": point}))
        yield services
    finally:
        for service in services:
            await asyncio.to_thread(service.end)


@pytest.fixture
async def prepared(postgres_url: str, tmp_path: Path) -> Prepared:
    return await prepare(postgres_url, tmp_path / "prepared")


@pytest.fixture
async def alone(prepared: Prepared, postgres: Server, tmp_path: Path) -> Outcome:
    """What comes of the run when one coordinator does it all."""
    with prepared.copy(tmp_path / "alone", postgres) as url:
        async with started(url, tmp_path / "alone", None) as (service,):
            return await carried_out(prepared, url, Persistent(lambda: service, Service.revive))


@pytest.mark.postgres
async def test_each_request_may_go_to_another_coordinator(prepared: Prepared, postgres: Server, alone: Outcome, tmp_path: Path) -> None:
    with prepared.copy(tmp_path / "shared", postgres) as url:
        async with started(url, tmp_path / "shared", None, None, None) as services:
            turns = itertools.cycle(services)

            outcome = await carried_out(prepared, url, Persistent(lambda: next(turns), Service.revive))

            assert all(service.alive and service.deaths == 0 for service in services)
    assert outcome == alone


@pytest.mark.postgres
async def test_a_coordinator_killed_in_mid_round_and_one_in_mid_merge_delay_and_nothing_more(
    prepared: Prepared, postgres: Server, alone: Outcome, tmp_path: Path
) -> None:
    """The first dies with half an upload, the second while it merges what the first one had; nobody starts them again."""
    with prepared.copy(tmp_path / "killed", postgres) as url:
        async with started(url, tmp_path / "killed", Point.part_committed, Point.first_blob_kept, None) as services:

            def first_that_lives() -> Service:
                return next(service for service in services if service.alive)

            outcome = await carried_out(prepared, url, Persistent(first_that_lives, Service.end))

            assert [service.alive for service in services] == [False, False, True]
    assert outcome == alone


def test_on_one_sqlite_file_a_second_coordinator_is_refused_and_other_commands_work(sqlite_url: str, tmp_path: Path) -> None:
    settings = {"DATA": str(tmp_path / "data"), "DATABASE_URL": sqlite_url}
    first, second = Service("first", tmp_path, settings), Service("second", tmp_path, settings)
    first.start()
    second.start()

    assert second.end() == 1
    assert "another coordinator is at work on" in second.said()
    assert "HLORA_COORDINATOR_DATABASE_URL" in second.said()
    assert "Traceback" not in second.said()
    environment = {f"HLORA_COORDINATOR_{name}": value for name, value in settings.items()}
    for command in (["token", "me"], ["migrate"]):
        assert CliRunner().invoke(app, command, env=environment).exit_code == 0

    assert first.end(signal.SIGTERM) == 0
    second.start()
    assert second.alive
    assert second.end(signal.SIGTERM) == 0
