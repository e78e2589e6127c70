"""A coordinator that dies right after any write, and is started again, publishes the same bytes and counts nothing twice."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from protocol import crash, errors
from protocol.crash import Point
from tests.coordinator.services import Persistent, Service
from tests.coordinator.whole_run import Outcome, Prepared, carried_out, prepare
from tests.postgres import Server

POINTS = [point for point in Point if not point.startswith("agent-")]
AT_A_TIME = 4  # a round whose merging was cut off waits some seconds for the claim to end; other federations use them


async def survived(prepared: Prepared, folder: Path, postgres: Server | None, point: Point | None) -> tuple[Outcome, int]:
    """What comes of a run whose coordinator dies at that point and is started again, and how often it died."""
    with prepared.copy(folder, postgres) as url:
        settings = {"DATA": str(folder / "data"), "DATABASE_URL": url, "EXECUTOR": "threads://1", "TICK_SECONDS": "0.2"}
        service = Service("coordinator", folder, settings)
        await asyncio.to_thread(service.start, **({} if point is None else {"crash_at": point}))
        try:
            return await carried_out(prepared, url, Persistent(lambda: service, Service.revive)), service.deaths
        finally:
            await asyncio.to_thread(service.end)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
async def test_whichever_write_is_the_last_before_a_crash_the_run_ends_as_if_nothing_had_happened(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    prepared = await prepare(request.getfixturevalue(f"{kind}_url"), tmp_path / "prepared")
    postgres = request.getfixturevalue("postgres") if kind == "postgres" else None
    turn = asyncio.Semaphore(AT_A_TIME)

    async def one(point: Point | None) -> tuple[Outcome, int]:
        async with turn:
            return await survived(prepared, tmp_path / str(point), postgres, point)

    async with asyncio.TaskGroup() as group:
        tasks = {point: group.create_task(one(point)) for point in (None, *POINTS)}

    undisturbed, _ = tasks.pop(None).result()
    deaths = {point: task.result()[1] for point, task in tasks.items()}
    assert deaths == dict.fromkeys(POINTS, 1), "a point with 0 is never reached"
    for point, task in tasks.items():
        outcome, _ = task.result()
        assert (point, outcome.happened, outcome.rejections) == (point, undisturbed.happened, undisturbed.rejections)
        assert (point, outcome.published) == (point, undisturbed.published)


def test_a_point_that_does_not_exist_is_refused() -> None:
    for nonsense in ("nowhere", "", "job-leased:0", "job-leased:x", "job-leased:-1"):
        with pytest.raises(errors.InvalidRequest, match="job-leased"):
            crash.arm(nonsense)
