"""The chores: done by one coordinator at a time, by the live loop, and each whatever becomes of the others."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from coordinator.app import build, create_app
from coordinator.settings import Settings
from coordinator.tables import Event, Upload
from protocol import errors
from tests.federation import Federation, done, make_plan, open_federation, repr_digest

SOON = 20  # seconds


async def orphan(federation: Federation, data: bytes = b"put, and never named") -> Path:
    """The file of an old blob that nothing names."""
    digest = federation.parts.blobs.put(data).digest
    file = federation.parts.settings.data / "blobs" / "sha256" / digest.removeprefix("sha256:")
    os.utime(file, (0, 0))
    return file


async def test_of_several_coordinators_one_keeps_house_each_time(database_url: str, tmp_path: Path) -> None:
    async with (
        open_federation(database_url, tmp_path) as one,
        open_federation(database_url, tmp_path, one.clock) as two,
    ):
        chores = [one.parts.housekeeping, two.parts.housekeeping] * 3
        for _ in range(2):
            assert sorted(await asyncio.gather(*(asyncio.to_thread(each.due) for each in chores))) == [False] * 5 + [True]
            one.clock.advance(599)
            assert not two.parts.housekeeping.due()
            one.clock.advance(1)
        one.clock.advance(-86_400)  # set back
        assert [each.due() for each in chores] == [True] + [False] * 5


async def test_a_chore_that_fails_stops_no_other(small: Federation) -> None:
    file = await orphan(small)
    staging = small.parts.settings.data / "blobs" / "staging"
    staging.rmdir()
    staging.write_text("no folder")

    done = small.parts.housekeeping.run_once()

    assert "files" not in done
    assert done["blobs"] == 1
    assert not file.exists()


async def test_a_blob_of_which_the_store_does_not_let_go_stays_condemned_until_it_does(federation: Federation) -> None:
    _, (device, *_), (job, *_) = await federation.training(make_plan())
    data = await device.trained(job)
    file, other = await orphan(federation, data), await orphan(federation, b"another")
    file.unlink()
    file.mkdir()  # no permission would stop a test that root runs
    os.utime(file, (0, 0))

    assert "blobs" not in federation.parts.housekeeping.run_once()
    assert not other.exists()
    with pytest.raises(errors.Unavailable):
        await device.put_slice(job, data)

    file.rmdir()
    federation.parts.housekeeping.run_once()
    await device.put_slice(job, data)
    assert federation.parts.blobs.exists(f"sha256:{file.name}")


async def test_what_is_old_is_given_up(federation: Federation) -> None:
    """An upload that nobody continued for a day, and the log of changes after a year."""
    _, (device, *_), (job, *_) = await federation.training(
        make_plan(times={"job": 10**6, "lease": 10**6, "no_progress": 10**6, "round": 10**6})
    )
    data = await device.trained(job)
    headers = {"Lease-Epoch": str(job.lease.epoch), "Upload-Offset": "0", "Upload-Length": str(len(data)), "Repr-Digest": repr_digest(data)}
    done(await device.call("PATCH", f"/v1/jobs/{job.id}/slice", content=data[:100], headers=headers))

    assert federation.parts.housekeeping.run_once()["uploads"] == 0
    federation.clock.advance(25 * 3600)
    assert federation.parts.housekeeping.run_once()["uploads"] == 1
    with federation.parts.database.read() as session:
        assert session.scalar(select(func.count()).select_from(Upload)) == 0
        before = session.scalar(select(func.count()).select_from(Event))

    federation.clock.advance(364.5 * 86_400)
    assert federation.parts.housekeeping.run_once()["events"] == before
    with federation.parts.database.read() as session:
        assert session.scalars(select(Event.kind)).all() == ["blobs-swept"]  # the part of that upload, just now


async def test_the_longest_times_keep_everything_and_fail_no_chore(database_url: str, tmp_path: Path) -> None:
    century: dict[str, Any] = {"quarantine_days": 36_500, "event_days": 36_500, "sweep_grace_seconds": 36_500 * 86_400}
    often: dict[str, Any] = {"keep_rounds": 10**6, "housekeeping_seconds": 30 * 86_400}
    async with open_federation(database_url, tmp_path, **century, **often) as federation:
        federation.parts.blobs.put(b"put, and never named")

        assert federation.parts.housekeeping.due()
        chores = ("uploads", "rounds", "quarantined", "events", "blobs", "files", "arrivals")
        assert federation.parts.housekeeping.run_once() == dict.fromkeys(chores, 0)


async def test_a_live_coordinator_keeps_house_by_itself(database_url: str, tmp_path: Path) -> None:
    settings = Settings(data=tmp_path, database_url=database_url, executor="threads://1", housekeeping_seconds=0.2, sweep_grace_seconds=0)
    app = create_app(build(settings))
    async with app.router.lifespan_context(app):
        parts = app.state.context
        digest = parts.blobs.put(b"put, and never named").digest
        assert await asyncio.to_thread(comes_true, lambda: not parts.blobs.exists(digest) and parts.housekeeping.swept == 1)


def comes_true(happened: Callable[[], bool]) -> bool:
    until = time.monotonic() + SOON
    while not happened() and time.monotonic() < until:
        time.sleep(0.02)
    return happened()
