"""What only a real connection shows: bytes that are announced and never come, and bodies that are never read."""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from protocol import errors
from protocol.messages import Job
from protocol.states import JobState, Role, RunState
from tests.coordinator.sockets import Address, serving
from tests.federation import Device, Operator, enrol, make_plan, make_profile, make_token, refusal


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
    """A device that holds the only job of a round."""
    device = await enrol(admin, "device", make_profile())
    await admin.create(make_plan(cohort={"target": 1, "quorum": 1}, evaluation={"every": 0}))
    job = await device.next_job(wait=20)
    assert job is not None
    return device, job


def request(job: str, secret: str, length: int, **headers: str) -> bytes:
    """The head of an upload."""
    lines = [
        f"PUT /v1/jobs/{job}/slice HTTP/1.1",
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
