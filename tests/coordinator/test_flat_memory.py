"""A slice of hundreds of megabytes passes through a coordinator whose memory does not grow with it, nor with many who send at once.

What is measured is the process's largest resident set while the slice travels, above what it was before: all of it, anonymous
memory and files mapped into memory alike. What the system keeps of files in its cache does not count, and nothing of a slice
is mapped. `HLORA_TEST_SLICE_MB` makes the slice larger.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from coordinator import parts
from coordinator.uploads import written_digest
from protocol import contents, errors
from protocol.contents import Label
from protocol.messages import BlobRef, Job, SliceReceipt
from protocol.plan import BaseFacts, Layout
from tests.coordinator.test_processes import Service
from tests.federation import Device, Operator, enrol, make_plan, make_profile, read, refusal

pytestmark = pytest.mark.slow

MEGABYTES = int(os.environ.get("HLORA_TEST_SLICE_MB", "300"))
LIMIT = 100 << 20  # bytes that the process may grow by
PIECE = 32 << 20  # bytes of a range or part
BLOCK = 1 << 20
LAYOUT = Layout(
    modules={"attention.query": (64, 64)},
    full={f"layer{n:03}.weight": (1024, 1024) for n in range(MEGABYTES // 4)},  # four megabytes each
    base=BaseFacts(parameters=10**9, layers=1, hidden=8, vocabulary=10),
)
PLAN = make_plan(
    layout=LAYOUT.model_dump(mode="json"),
    adapter={"modules": ["query"]},
    ranks={"name": "fixed", "ladder": [2], "options": {"rank": 2}},
    cohort={"target": 1, "quorum": 1},
    evaluation={"every": 0},
    times={"lease": 3600, "no_progress": 3600, "job": 3600, "round": 7200},
)

FEW, MANY = 4, 24  # that move a slice at once
OF_EACH = 1 << 20  # bytes that each of them may cost, however long its slice is
CROWD = make_plan(
    layout=LAYOUT.model_copy(update={"full": {f"layer{n}.weight": (1024, 1024) for n in range(2)}}).model_dump(mode="json"),  # 8 MB
    adapter={"modules": ["query"]},
    ranks={"name": "fixed", "ladder": [2], "options": {"rank": 2}},
    cohort={"target": 1 + FEW + MANY, "quorum": 1 + FEW + MANY},
    evaluation={"every": 0},
    times={"lease": 3600, "no_progress": 3600, "job": 3600, "round": 7200},
)


@pytest.fixture
def service(sqlite_url: str, tmp_path: Path) -> Iterator[Service]:
    """A coordinator that runs."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not say how much memory a process held at most")
    names = {"DATA": str(tmp_path / "data"), "DATABASE_URL": sqlite_url, "EXECUTOR": "threads://1"}
    service = Service(tmp_path, {f"HLORA_COORDINATOR_{name}": value for name, value in names.items()})
    service.start()
    yield service
    service.end(signal.SIGTERM)


def resident(service: Service, what: str) -> int:
    """Bytes that the process holds in memory now (`VmRSS`), or held at most (`VmHWM`)."""
    assert service.process is not None
    lines = Path(f"/proc/{service.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(what))


@contextmanager
def flat(service: Service, what: str, limit: int = LIMIT) -> Iterator[None]:
    """Holds the growth inside the block against the limit."""
    assert service.process is not None
    Path(f"/proc/{service.process.pid}/clear_refs").write_text("5")  # the largest so far is now
    before = resident(service, "VmRSS")
    yield
    grown = resident(service, "VmHWM") - before
    print(f"{what}: {grown >> 20} MB above {before >> 20} MB")
    assert grown < limit, f"{what} took {grown >> 20} MB"


async def sending(file: Path, start: int, stop: int) -> AsyncIterator[bytes]:
    """Some of a file's bytes, a megabyte in memory at a time."""
    with file.open("rb") as opened:
        opened.seek(start)
        for here in range(start, stop, BLOCK):
            yield opened.read(min(BLOCK, stop - here))


async def fetched(device: Device, ref: BlobRef, file: Path) -> None:
    """A blob, range by range."""
    with file.open("wb") as opened:
        for start in range(0, ref.bytes, PIECE):
            response = await device.call("GET", f"/v1/blobs/{ref.digest}", headers={"Range": f"bytes={start}-{start + PIECE - 1}"})
            assert response.status_code == 206
            opened.write(response.content)
    with file.open("rb") as opened:
        assert hashlib.file_digest(opened, "sha256").hexdigest() == ref.digest.removeprefix("sha256:")


def trained(job: Job, start: Path, file: Path) -> BlobRef:
    """The slice that was handed out, under the label of one that was trained."""
    with start.open("rb") as opened, file.open("w+b") as written:
        length = 8 + int.from_bytes(opened.read(8), "little")
        opened.seek(length)
        label = Label(rank=job.rank, scale=job.scale, round=job.round, base=job.slice.digest, examples=5)
        written.write(contents.head(job.layout, label, job.wire))
        while block := opened.read(BLOCK):
            written.write(block)
        written.seek(0)
        return BlobRef(digest="sha256:" + hashlib.file_digest(written, "sha256").hexdigest(), bytes=written.tell())


def about(job: Job, ref: BlobRef, start: int) -> dict[str, str]:
    """What is told of a slice with its bytes."""
    told = {"Lease-Epoch": str(job.lease.epoch), "Repr-Digest": written_digest(ref.digest)}
    return told | {"Upload-Offset": str(start), "Upload-Length": str(ref.bytes)}


async def taken(admin: Operator) -> tuple[Device, Job]:
    """A device that holds the only job of a round."""
    device = await enrol(admin, "device", make_profile(memory_bytes=10**12))
    await admin.create(PLAN)
    while (job := await device.next_job(wait=20)) is None:
        pass
    return device, job


async def test_a_large_slice_moves_through_little_memory(service: Service, tmp_path: Path) -> None:
    start, file = tmp_path / "start", tmp_path / "trained"
    async with httpx.AsyncClient(base_url=service.url, timeout=600, trust_env=False) as http:
        device, job = await taken(Operator(http, service.token()))
        path = f"/v1/jobs/{job.id}/slice"

        with flat(service, "fetching in ranges"):
            await fetched(device, job.slice, start)
        ref = trained(job, start, file)
        too_long = await device.call("PATCH", path, headers=about(job, ref, 0), content=bytes(parts.LONGEST + 1))
        error = refusal(too_long)
        assert isinstance(error, errors.TooLarge)
        assert error.facts["largest"] == parts.LONGEST
        with flat(service, "sending in parts"):
            for here in range(0, ref.bytes, PIECE):
                body = sending(file, here, min(ref.bytes, here + PIECE))
                answer = await device.call("PATCH", path, headers=about(job, ref, here), content=body)
        assert read(answer, SliceReceipt) == SliceReceipt(digest=ref.digest, bytes=ref.bytes)
        with flat(service, "sending whole"):
            answer = await device.call("PUT", path, headers=about(job, ref, 0), content=sending(file, 0, ref.bytes))
        assert read(answer, SliceReceipt).digest == ref.digest
        with flat(service, "fetching whole"):
            own = {"Authorization": f"Bearer {device.secret}"}
            async with device.http.stream("GET", f"/v1/blobs/{job.slice.digest}", headers=own) as coming:
                assert sum([len(block) async for block in coming.aiter_raw()]) == job.slice.bytes


async def held(device: Device) -> Job:
    """The device's job of a round that opens soon."""
    while (job := await device.next_job(wait=20)) is None:
        pass
    return job


async def moved(device: Device, number: int) -> None:
    """The device's job from the slice to start from to the one that is sent, which is no other device's."""
    job = await held(device)
    start = await device.blob(job.slice.digest)
    label = Label(rank=job.rank, scale=job.scale, round=job.round, base=job.slice.digest, examples=number)
    await device.put_slice(job, contents.head(job.layout, label, job.wire) + start[8 + int.from_bytes(start[:8], "little") :])


async def test_many_who_move_slices_at_once_cost_little_each(service: Service) -> None:
    limits = httpx.Limits(max_connections=MANY, max_keepalive_connections=MANY)
    async with httpx.AsyncClient(base_url=service.url, timeout=600, trust_env=False, limits=limits) as http:
        admin = Operator(http, service.token())
        devices = [await enrol(admin, f"device-{n}", make_profile(memory_bytes=10**12)) for n in range(1 + FEW + MANY)]
        await admin.create(CROWD)
        await moved(devices.pop(), 1)  # from now on all is imported, connected and prepared
        few, many = devices[:FEW], devices[FEW:]
        for crowd in (few, many):
            with flat(service, f"{len(crowd)} at once", len(crowd) * OF_EACH):
                await asyncio.gather(*(moved(device, 2 + number) for number, device in enumerate(crowd)))
