"""Slices over links that are cut: what came counts, and in the end the bytes are the right ones."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from agent.client import Client
from agent.connection import Retry
from agent.loop import Loop, Step
from agent.policy import Policy
from agent.transfers import LARGEST_PART, PART, part_bytes
from coordinator import parts
from protocol import errors, slices
from protocol.messages import BlobRef, Job
from tests.agent.links import Link, linked, served
from tests.agent.looping import ALONE, begin, instantly
from tests.federation import LAYOUT, Device, Federation, make_plan

LARGE = LAYOUT.model_copy(update={"full": {"head.bias": (2,), "head.weight": (2300, 1000)}})  # 9.2 MB: two parts
HEADERS = 2000  # bytes of a request beside its body, and of an answer
UNHEARD = (64 + 256) << 10  # bytes that the server may have read and not handed on: when a connection is cut it forgets them


@dataclass(frozen=True)
class Way:
    """A job in hand, its trained slice in a file, and a bad link between the two machines."""

    device: Device
    job: Job
    ref: BlobRef
    file: Path
    link: Link
    address: str

    def client(self, attempts: int = 2) -> Client:
        """So many attempts in a row may bring nothing."""
        assert self.device.secret is not None
        return Client(self.address, SecretStr(self.device.secret), retry=Retry(attempts=attempts), sleep=self.link.settle)

    async def send(self, attempts: int = 2, **how: Any) -> None:
        """Send the slice; it must be received as it is."""
        async with self.client(attempts) as client:
            receipt = await client.put_slice(self.job.id, self.job.lease.epoch, self.ref, self.file, **how)
        assert (receipt.digest, receipt.bytes) == (self.ref.digest, self.ref.bytes)


@pytest.fixture(params=["small", "large"])
def layout(request: pytest.FixtureRequest) -> Any:
    return LAYOUT if request.param == "small" else LARGE


@pytest.fixture
async def way(federation: Federation, tmp_path: Path, layout: Any) -> AsyncIterator[Way]:
    device = await federation.enrol("device")
    await federation.open(make_plan(**ALONE, layout=layout.model_dump(mode="json")))
    job = await device.take()
    data = await device.trained(job)
    (tmp_path / "slice").write_bytes(data)
    assert (len(data) > PART) is (layout is LARGE)
    async with linked(federation.app) as (link, address):
        yield Way(device, job, BlobRef(digest=slices.digest(data), bytes=len(data)), tmp_path / "slice", link, address)


def somewhere(size: int, seed: int, count: int = 12) -> list[int]:
    """Numbers of bytes after which connections are cut, from within the first line to beyond the end of most bodies."""
    chance = random.Random(seed)
    return [chance.choice([chance.randrange(1, HEADERS), chance.randrange(1, size), size // count]) for _ in range(count)]


@pytest.mark.parametrize("seed", range(2))
async def test_an_upload_that_is_cut_anywhere_goes_on_where_it_was(way: Way, federation: Federation, seed: int) -> None:
    cuts = somewhere(way.ref.bytes, seed)
    way.link.up.cuts = iter(cuts)
    await way.send(attempts=20)
    assert federation.parts.blobs.read(way.ref.digest) == way.file.read_bytes()
    again = way.link.up.carried - way.ref.bytes - 4 * HEADERS * way.link.connections
    assert again <= UNHEARD * (way.link.connections - 1)  # what was heard was not sent twice


@pytest.mark.parametrize("seed", range(2))
async def test_answers_to_an_upload_that_are_lost_are_asked_for_again(way: Way, federation: Federation, seed: int) -> None:
    chance = random.Random(seed)
    way.link.down.cuts = iter([chance.randrange(1, 300) for _ in range(12)])
    await way.send(attempts=20)
    assert federation.parts.blobs.read(way.ref.digest) == way.file.read_bytes()


@pytest.mark.parametrize("layout", [LARGE], indirect=False)
async def test_as_long_as_something_moves_the_attempts_are_not_counted(way: Way) -> None:
    way.link.up.cuts = iter([way.ref.bytes // 40] * 50)
    await way.send(attempts=2)
    assert way.link.connections > 20


@pytest.mark.parametrize("layout", [LARGE], indirect=False)
async def test_an_upload_of_which_nothing_arrives_is_given_up_for_now(way: Way) -> None:
    way.link.up.cuts = itertools.repeat(100)
    with pytest.raises(errors.Unavailable, match="does not answer"):
        await way.send(attempts=3)
    assert way.link.connections == 3


@pytest.mark.parametrize("layout", [LAYOUT], indirect=False)
async def test_a_small_slice_goes_in_one_request(way: Way) -> None:
    await way.send(attempts=1)
    assert way.link.up.carried <= way.ref.bytes + HEADERS


@dataclass
class Proxy:
    """A proxy that lets bodies of so many bytes pass, and what it was sent."""

    app: ASGIApp
    most: int
    sent: list[int]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "PATCH":
            self.sent.append(int(dict(scope["headers"])[b"content-length"]))
            if self.sent[-1] > self.most:
                return await PlainTextResponse("too large", 413)(scope, receive, send)
        return await self.app(scope, receive, send)


@pytest.mark.parametrize("layout", [LARGE], indirect=False)
@pytest.mark.parametrize(("speed", "most"), [(None, 10**9), (10**6, 10**9), (10**6, PART)])
async def test_parts_are_as_large_as_the_link_is_known_to_carry(way: Way, federation: Federation, speed: int | None, most: int) -> None:
    proxy = Proxy(federation.app, most, [])
    async with served(proxy) as url:
        await replace(way, address=url).send(part=part_bytes(speed))
    whole, ordinary = [way.ref.bytes], [PART, way.ref.bytes - PART]
    assert proxy.sent == (ordinary if speed is None else whole if most > PART else whole + ordinary)


def test_no_part_is_larger_than_the_coordinator_takes() -> None:
    assert part_bytes(None) == part_bytes(1.0) == PART
    assert part_bytes(1e6) == 30_000_000
    assert part_bytes(1e12) == LARGEST_PART == parts.LONGEST


async def test_what_the_coordinator_has_is_not_sent_again(way: Way) -> None:
    await way.send()
    before = way.link.up.carried
    await way.send(again=True)
    assert way.link.up.carried - before <= HEADERS


async def test_a_slice_gives_way_to_another_one(way: Way) -> None:
    other = way.file.read_bytes()[::-1]
    assert await way.device.patch(way.job, other, 0, 1000) == 1000
    await way.send(again=True)


async def test_an_upload_is_told_how_far_it_is(way: Way) -> None:
    told: list[int] = []
    await way.send(moved=told.append)
    assert told == sorted(told)
    assert told[-1] == way.ref.bytes


async def test_an_upload_of_somebody_elses_job_is_refused_whatever_the_request(way: Way) -> None:
    await way.device.take()  # the epoch rises
    for again in (False, True):
        with pytest.raises(errors.StaleLease):
            await way.send(again=again)


@pytest.mark.parametrize("seed", range(2))
async def test_a_download_that_is_cut_anywhere_goes_on_where_it_was(way: Way, tmp_path: Path, seed: int) -> None:
    way.link.down.cuts = iter(somewhere(way.job.slice.bytes, seed))
    async with way.client(attempts=20) as client:
        fetched = await client.blob(way.job.slice, tmp_path / "start")
    assert slices.digest((tmp_path / "start").read_bytes()) == way.job.slice.digest
    assert fetched == way.job.slice.bytes  # nothing came twice


async def test_a_download_goes_on_after_the_agent_has_ended(way: Way, tmp_path: Path) -> None:
    half = way.job.slice.bytes // 2
    way.link.down.cuts = iter([half])
    async with way.client(attempts=1) as client:
        with pytest.raises(errors.Unavailable):
            await client.blob(way.job.slice, tmp_path / "start")
    assert not (tmp_path / "start").exists()
    came = (tmp_path / "start.part").stat().st_size
    assert half - HEADERS <= came <= half
    async with way.client(attempts=1) as client:
        assert await client.blob(way.job.slice, tmp_path / "start") == way.job.slice.bytes - came
        assert await client.blob(way.job.slice, tmp_path / "start") == 0  # it is there
    assert slices.digest((tmp_path / "start").read_bytes()) == way.job.slice.digest
    assert not (tmp_path / "start.part").exists()


async def test_a_download_that_goes_on_from_wrong_bytes_begins_anew(way: Way, tmp_path: Path) -> None:
    (tmp_path / "start.part").write_bytes(bytes(100))
    async with way.client() as client:
        await client.blob(way.job.slice, tmp_path / "start")
    assert slices.digest((tmp_path / "start").read_bytes()) == way.job.slice.digest


async def test_a_file_that_was_damaged_is_fetched_again(way: Way, tmp_path: Path) -> None:
    async with way.client() as client:
        await client.blob(way.job.slice, tmp_path / "start")
        whole = (tmp_path / "start").read_bytes()
        (tmp_path / "start").write_bytes(b"!" + whole[1:])
        await client.blob(way.job.slice, tmp_path / "start")
    assert (tmp_path / "start").read_bytes() == whole


async def test_files_are_for_their_owner_alone(way: Way, tmp_path: Path) -> None:
    async with way.client() as client:
        await client.blob(way.job.slice, tmp_path / "new" / "start")
    assert (tmp_path / "new" / "start").stat().st_mode & 0o777 == 0o600


async def test_what_came_of_a_slice_before_the_network_went_away_is_not_fetched_again(federation: Federation, tmp_path: Path) -> None:
    device, run = await begin(federation, layout=LARGE.model_dump(mode="json"))
    assert device.secret is not None
    half = LARGE.numbers(4) * 4 // 2
    async with linked(federation.app) as (link, address):
        link.down.cuts = iter([half, *[0] * 3])  # another attempt, and two to give the job back, bring nothing
        async with Client(address, SecretStr(device.secret), retry=Retry(attempts=2), sleep=link.settle) as client:
            loop = Loop(client, instantly, Policy(), tmp_path / "home", wait_seconds=0)
            assert await loop.step() is Step.given_back
            federation.advance(100)  # the lease is lost, and the job waits for its client
            assert await loop.step() is Step.idle
            federation.tick()
            assert await loop.step() is Step.done
    usage = (await federation.admin.round(run, 1)).jobs[-1].usage
    assert usage is not None
    assert usage.download_bytes <= half + 2 * HEADERS
