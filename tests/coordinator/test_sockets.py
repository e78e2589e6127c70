"""What only a real connection shows: bytes that are announced and never come, and bodies that are never read."""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from coordinator.routes.slices import AT_ONCE
from protocol import errors
from protocol.messages import Job
from protocol.states import JobState, Role, RunState
from tests.coordinator.sockets import Address, serving
from tests.federation import Device, Operator, enrol, make_plan, make_profile, make_token, refusal, repr_digest


@pytest.fixture
def address(sqlite_url: str, tmp_path: Path) -> Iterator[Address]:
    with serving(sqlite_url, tmp_path) as address:
        yield address


@pytest.fixture
async def http(address: Address) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=address.url, timeout=30, trust_env=False) as http:
        yield http


@pytest.fixture
async def admin(address: Address, http: httpx.AsyncClient) -> Operator:
    return Operator(http, make_token(address.parts, Role.admin))


@pytest.fixture
async def holding(admin: Operator) -> tuple[Device, Job]:
    return await first_job(admin)


async def first_job(admin: Operator) -> tuple[Device, Job]:
    """A device that holds the only job of a round."""
    (held,) = await first_jobs(admin, 1)
    return held


async def first_jobs(admin: Operator, count: int) -> list[tuple[Device, Job]]:
    """So many devices, each of which holds a job of the same round."""
    devices = [await enrol(admin, f"device {number}", make_profile()) for number in range(count)]
    await admin.create(make_plan(cohort={"target": count, "quorum": 1}, evaluation={"every": 0}))
    held = []
    for device in devices:
        job = await device.next_job(wait=20)
        assert job is not None
        held.append((device, job))
    return held


def request(job: str, secret: str, length: int, *, method: str = "PUT", **headers: str) -> bytes:
    """The head of an upload."""
    lines = [
        f"{method} /v1/jobs/{job}/slice HTTP/1.1",
        "Host: x",
        f"Authorization: Bearer {secret}",
        "Lease-Epoch: 1",
        *([] if length < 0 else [f"Content-Length: {length}"]),
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def answered(connection: socket.socket) -> httpx.Response:
    """The answer that comes without a byte of the body having been sent."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    while len(body) < int(headers["content-length"]):
        body += connection.recv(65536)
    return httpx.Response(int(status.split()[1]), headers=headers, content=body)


def part(job: Job, device: Device, data: bytes, start: int) -> bytes:
    """The head of an upload's part, which waits until the coordinator reads."""
    about = {"Upload_Offset": str(start), "Upload_Length": str(len(data)), "Repr_Digest": repr_digest(data), "Expect": "100-continue"}
    return request(job.id, str(device.secret), len(data) - start, method="PATCH", **about)


def begun(connection: socket.socket, head: bytes) -> None:
    """Send the head of an upload that is read from now on."""
    connection.sendall(head)
    said = b""
    while not said.endswith(b"\r\n\r\n"):
        said += connection.recv(1)
    assert said.startswith(b"HTTP/1.1 100 "), said


async def reached(device: Device, job: Job, offset: int) -> None:
    """Wait until the upload stands there."""
    end = time.monotonic() + 20
    while (found := (await device.head(job))["Upload-Offset"]) != str(offset):
        assert time.monotonic() < end, f"the upload stands at {found}, not at {offset}"


async def test_an_unknown_caller_is_refused_before_a_byte_of_its_body(address: Address) -> None:
    with address.connect() as connection:
        connection.sendall(request("job-0000000000000000", "hlc_nobody", 10**11))

        assert isinstance(refusal(answered(connection)), errors.Unauthenticated)


async def test_a_slice_for_anothers_job_is_refused_before_a_byte_of_it(
    address: Address, admin: Operator, holding: tuple[Device, Job]
) -> None:
    stranger = await enrol(admin, "stranger", make_profile())
    with address.connect() as connection:
        connection.sendall(request(holding[1].id, str(stranger.secret), 1500))

        assert isinstance(refusal(answered(connection)), errors.NotFound)


async def test_a_slice_that_is_announced_too_long_is_refused_before_a_byte_of_it(address: Address, holding: tuple[Device, Job]) -> None:
    device, job = holding
    with address.connect() as connection:
        connection.sendall(request(job.id, str(device.secret), job.max_upload_bytes + 1))

        assert isinstance(refusal(answered(connection)), errors.TooLarge)


async def test_a_slice_of_unknown_length_is_read_as_far_as_an_honest_one_goes(address: Address, holding: tuple[Device, Job]) -> None:
    device, job = holding
    chunk = b"%x\r\n%s\r\n" % (1000, b"\0" * 1000)
    with address.connect() as connection:
        connection.sendall(
            request(job.id, str(device.secret), -1, Transfer_Encoding="chunked") + chunk * (job.max_upload_bytes // 1000 + 1)
        )

        assert isinstance(refusal(answered(connection)), errors.TooLarge)


async def test_a_cut_connection_costs_nothing_but_time(address: Address, admin: Operator, holding: tuple[Device, Job]) -> None:
    device, job = holding
    data = await device.trained(job)
    for sent in (0, 1, 700, len(data) - 1):
        with address.connect() as connection:
            connection.sendall(request(job.id, str(device.secret), len(data)) + data[:sent])

    assert (await device.put_slice(job, data)).bytes == len(data)
    view = await admin.job(job.run, job)
    assert (view.state, view.epoch) == (JobState.leased, 1)
    assert (await admin.client(device)).rejections == 0
    spool, end = address.parts.settings.spool_folder, time.monotonic() + 20
    while list(spool.iterdir()):
        assert time.monotonic() < end, "what was cut is still there"


async def test_a_part_that_is_cut_at_any_byte_counts_as_far_as_it_came(address: Address, holding: tuple[Device, Job]) -> None:
    device, job = holding
    data, offset = await device.trained(job), 0
    for came in (1, 0, 700, len(data) - 702):
        with address.connect() as connection:
            begun(connection, part(job, device, data, offset))
            connection.sendall(data[offset : offset + came])
        offset += came
        await reached(device, job, offset)

    receipt = await device.patch(job, data, offset, len(data))

    assert not isinstance(receipt, int)
    assert address.parts.blobs.read(receipt.digest) == data
    assert list(address.parts.settings.spool_folder.iterdir()) == []


async def test_a_part_of_unknown_length_counts_as_far_as_it_came(address: Address, holding: tuple[Device, Job]) -> None:
    device, job = holding
    data = await device.trained(job)
    head = part(job, device, data, 0).replace(f"Content-Length: {len(data)}".encode(), b"Transfer-Encoding: chunked")
    with address.connect() as connection:
        begun(connection, head)
        connection.sendall(b"%x\r\n%s\r\n" % (1000, data[:1000]))

    await reached(device, job, 1000)


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
async def test_a_body_that_stalls_is_waited_for_no_longer(sqlite_url: str, tmp_path: Path, method: str) -> None:
    with serving(sqlite_url, tmp_path, stall_seconds=0.2) as address:
        async with httpx.AsyncClient(base_url=address.url, timeout=30, trust_env=False) as http:
            device, job = await first_job(Operator(http, make_token(address.parts, Role.admin)))
            data = await device.trained(job)
            with address.connect() as connection:
                begun(connection, part(job, device, data, 0).replace(b"PATCH", method.encode(), 1))
                connection.sendall(data[:300])

                error = refusal(answered(connection))
                assert connection.recv(1) == b"", "the connection is still open"

            assert isinstance(error, errors.StalledBody)
            kept = 300 if method == "PATCH" else 0
            assert error.facts == ({"offset": kept, "length": len(data)} if kept else {})
            assert (await device.head(job))["Upload-Offset"] == str(kept)


async def test_a_json_body_that_stalls_is_waited_for_no_longer(sqlite_url: str, tmp_path: Path) -> None:
    with serving(sqlite_url, tmp_path, stall_seconds=0.2) as address:
        async with httpx.AsyncClient(base_url=address.url, timeout=30, trust_env=False) as http:
            device, job = await first_job(Operator(http, make_token(address.parts, Role.admin)))
            head = f"PUT /v1/jobs/{job.id}/result HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {device.secret}\r\n"
            with address.connect() as connection:
                connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 500\r\n\r\n{{".encode())

                error = refusal(answered(connection))
                assert connection.recv(1) == b"", "the connection is still open"

            assert isinstance(error, errors.StalledBody)
            assert "after 1;" in error.detail
            assert (await device.renew(job)).verdict == "continue"


async def test_a_short_json_body_that_comes_byte_by_byte_is_not_waited_for_forever(sqlite_url: str, tmp_path: Path) -> None:
    """Whose it is nobody has asked yet, so that anybody could hold a connection."""
    with serving(sqlite_url, tmp_path, stall_seconds=0.5) as address, address.connect() as connection:
        connection.sendall(b"POST /v1/enrolments HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n\r\n{")
        connection.settimeout(0.1)
        received = b""
        for _ in range(300):
            with suppress(TimeoutError):
                received = connection.recv(65536)
                break
            connection.sendall(b" ")

        assert b"problems/stalled-body" in received


async def test_uploads_that_wait_for_their_senders_hold_nobody_up(address: Address, admin: Operator) -> None:
    *slow, (device, job) = await first_jobs(admin, 16)
    data = await device.trained(job)
    with ExitStack() as open:
        for other, theirs in AT_ONCE * slow:  # more than the server has threads
            connection = open.enter_context(address.connect())
            begun(connection, part(theirs, other, data, 0))
            connection.sendall(data[:10])

        assert (await device.renew(job)).verdict == "continue"
        assert await device.patch(job, data, 0, 500) == 500


async def test_a_client_sends_a_few_slices_at_once_and_no_more(address: Address, holding: tuple[Device, Job]) -> None:
    device, job = holding
    data = await device.trained(job)
    with ExitStack() as open:
        for _ in range(AT_ONCE):
            connection = open.enter_context(address.connect())
            begun(connection, part(job, device, data, 0))
            connection.sendall(data[:10])
        with pytest.raises(errors.Unavailable, match="of this client are on their way"):
            await device.put_slice(job, data)
    await reached(device, job, 10)

    assert (await device.put_slice(job, data)).bytes == len(data)


async def test_a_cut_body_of_json_does_nothing(address: Address, admin: Operator, holding: tuple[Device, Job]) -> None:
    device, job = holding
    head = f"PUT /v1/jobs/{job.id}/result HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {device.secret}\r\n"
    with address.connect() as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 500\r\n\r\n{{".encode())

    assert (await device.renew(job)).verdict == "continue"


async def test_a_whole_run_over_sockets_goes_on_by_itself(admin: Operator, holding: tuple[Device, Job]) -> None:
    device, job = holding
    await device.complete(job)
    while (await admin.run(job.run)).state is RunState.running:
        if (work := await device.next_job(wait=1)) is not None:
            await device.complete(work)

    assert (await admin.run(job.run)).state is RunState.finished
