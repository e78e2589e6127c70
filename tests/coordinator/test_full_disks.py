"""A disk that is full: a clear refusal, nothing broken, nothing left behind; and work goes on when there is room again."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from coordinator.__main__ import app
from protocol import errors
from protocol.messages import Job, SliceReceipt
from protocol.plan import BaseFacts, Layout
from protocol.states import JobState, RunState
from tests.federation import Device, Operator, enrol, make_plan, make_profile

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DISK = 8 << 20  # bytes
LAYOUT = Layout(
    modules={"attention.query": (16, 16)},
    full={f"layer{n}.weight": (512, 128) for n in range(4)},  # a slice of a megabyte
    base=BaseFacts(parameters=10**6, layers=1, hidden=8, vocabulary=10),
)
PLAN = make_plan(
    layout=LAYOUT.model_dump(mode="json"),
    adapter={"modules": ["query"]},
    cohort={"target": 1, "quorum": 1},
    evaluation={"every": 0},
    rounds=1,
)
# A namespace of its own, in which nobody needs to be root to mount a small disk.
ALONE = ["unshare", "--user", "--map-root-user", "--mount"]


@dataclass(frozen=True)
class Disk:
    """A coordinator whose data lie on a disk of its own; `folder` is how others see it."""

    folder: Path
    log: Path
    url: str
    token: str

    def fill(self, room: int = 0) -> None:
        """Leave no more than some bytes."""
        with (self.folder / "filler").open("wb", buffering=0) as file:
            with suppress(OSError):
                while file.write(b"\0" * 4096):
                    pass
            file.truncate(file.tell() - room)

    def free(self) -> None:
        """Make room again."""
        (self.folder / "filler").unlink()

    def spooled(self) -> list[Path]:
        """What lies about of uploads that are not whole."""
        return [*(self.folder / "spool").glob("*"), *(self.folder / "blobs" / "staging").glob("*")]


@pytest.fixture(scope="module")
def mounting() -> None:
    """Skips where no small disk can be mounted."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed, so no small disk can be mounted")
    tried = subprocess.run([*ALONE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no small disk can be mounted here: {tried.stderr.strip()}")


@pytest.fixture
def disk(mounting: None, _migrated_sqlite: Path, tmp_path: Path) -> Iterator[Disk]:
    """A coordinator that runs on a disk of eight megabytes."""
    place, log, first = tmp_path / "disk", tmp_path / "log", tmp_path / "first"
    for folder in (place, first):
        folder.mkdir()
    shutil.copy(_migrated_sqlite, first / "hlora.sqlite")
    made = CliRunner().invoke(app, ["token", "test"], env={"HLORA_COORDINATOR_DATA": str(first)})
    assert made.exit_code == 0, made.output
    mounted = f"mount -t tmpfs -o size={DISK} none {place} && cp {first}/* {place}"
    settings = {"HLORA_COORDINATOR_DATA": str(place), "HLORA_COORDINATOR_EXECUTOR": "threads://1", "HLORA_COORDINATOR_TICK_SECONDS": "0.05"}
    command = [*ALONE, "sh", "-c", f"{mounted} && exec {sys.executable} -m coordinator serve --port 0"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, stderr=out)
    try:
        end = time.monotonic() + 60
        while (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.02)
        yield Disk(Path(f"/proc/{process.pid}/root{place}"), log, found[0], made.stdout.strip())
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


@pytest.fixture
async def admin(disk: Disk) -> AsyncIterator[Operator]:
    async with httpx.AsyncClient(base_url=disk.url, timeout=60, trust_env=False) as http:
        yield Operator(http, disk.token)


async def held(admin: Operator) -> tuple[Device, Job]:
    """A device that holds the only job of a round."""
    device = await enrol(admin, "device", make_profile())
    await admin.create(PLAN)
    job = await device.next_job(wait=20)
    assert job is not None
    return device, job


async def test_an_upload_waits_for_room_and_goes_on_where_it_was(disk: Disk, admin: Operator) -> None:
    device, job = await held(admin)
    data = await device.trained(job)
    third = len(data) // 3
    assert await device.patch(job, data, 0, third) == third

    disk.fill()
    for sending in (device.patch(job, data, third, 2 * third), device.patch(job, data, third, len(data)), device.put_slice(job, data)):
        with pytest.raises(errors.InsufficientStorage, match="disk is full; try again when there is room") as caught:
            await sending
        assert caught.value.retryable
    with pytest.raises(errors.InsufficientStorage, match="the database's disk is full"):
        await admin.invite()
    assert "the coordinator's disk is full" in disk.log.read_text()
    assert (await device.head(job))["Upload-Offset"] == str(third)
    assert (await admin.job(job.run, job)).state is JobState.leased

    disk.free()
    assert disk.spooled() == []
    assert await device.patch(job, data, third, 2 * third) == 2 * third
    receipt = await device.patch(job, data, 2 * third, len(data))
    assert isinstance(receipt, SliceReceipt)
    assert (disk.folder / "blobs" / receipt.digest.replace(":", "/")).read_bytes() == data


async def test_a_round_waits_for_room_and_is_merged(disk: Disk, admin: Operator) -> None:
    device, job = await held(admin)
    receipt = await device.put_slice(job, await device.trained(job))
    result = device.result(job, receipt.digest)

    disk.fill(room=200_000)  # enough for rows, not for what is published
    await device.put_result(job, result)
    await until(lambda: "conductor-waits" in disk.log.read_text(), "nothing was merged, and nobody said why")
    assert "No space left" in disk.log.read_text()
    run = await admin.run(job.run)
    assert run.state is RunState.running
    assert "round 1 waits to be merged" in (run.reason or "")

    disk.free()
    while (await admin.run(job.run)).state is RunState.running:
        assert await device.next_job(wait=1) is None
    assert (await admin.run(job.run)).state is RunState.finished
    assert disk.spooled() == []


async def until(said: Callable[[], bool], why: str) -> None:
    """Wait until something is so."""
    end = time.monotonic() + 60
    while not said():
        assert time.monotonic() < end, why
        await asyncio.sleep(0.05)
