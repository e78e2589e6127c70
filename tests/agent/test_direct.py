"""Slices that go straight from and to the object store: over real sockets, without the credential, and as sure as any other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from agent.client import Client
from agent.connection import Retry
from coordinator.app import build
from coordinator.settings import Settings
from protocol import errors, slices
from protocol.messages import BlobRef, Job, SliceReceipt, UploadAddress
from tests.agent.links import served
from tests.agent.looping import ALONE
from tests.federation import LAYOUT, Device, Federation, make_plan, open_federation, read, refusal, repr_digest
from tests.merging import buckets
from tests.merging.buckets import Bucket


@dataclass(frozen=True)
class Way:
    """A job in hand, and where its slice may be fetched."""

    address: str
    bucket: Bucket
    device: Device
    job: Job
    file: Path
    federation: Federation

    async def fetch(self) -> int:
        """The bytes that travelled; the slice must be the right one in the end."""
        assert self.device.secret is not None
        retry = Retry(attempts=2, base_seconds=0.001)
        async with Client(self.address, SecretStr(self.device.secret), retry=retry) as client:
            travelled = await client.blob(self.job.slice, self.file)
        assert slices.digest(self.file.read_bytes()) == self.job.slice.digest
        return travelled

    async def send(self, data: bytes) -> None:
        """Send a trained slice; it must be received, and lie under its digest as it was sent."""
        self.file.write_bytes(data)
        ref = BlobRef(digest=slices.digest(data), bytes=len(data))
        async with Client(self.address, SecretStr(self.secret), retry=Retry(attempts=2, base_seconds=0.001)) as client:
            receipt = await client.put_slice(self.job.id, self.job.lease.epoch, ref, self.file)
        assert (receipt.digest, receipt.bytes) == (ref.digest, ref.bytes)
        assert self.federation.parts.blobs.read(ref.digest) == data

    async def post(self, tail: str, data: bytes, **headers: str) -> httpx.Response:
        """One of the requests about a slice that the store takes."""
        told = {"Lease-Epoch": "1", "Upload-Length": str(len(data)), "Repr-Digest": repr_digest(data), **headers}
        async with httpx.AsyncClient(base_url=self.address, headers={"Authorization": f"Bearer {self.secret}"}) as http:
            return await http.post(f"/v1/jobs/{self.job.id}/slice{tail}", headers=told)

    @property
    def incoming(self) -> list[str]:
        """What was put directly, and lies there still."""
        return [key for key in self.bucket.objects if "/incoming/" in key]

    @property
    def secret(self) -> str:
        return str(self.device.secret)


LARGE = LAYOUT.model_copy(update={"full": {"head.bias": (2,), "head.weight": (2300, 1000)}})  # 9.2 MB: more than one part


@pytest.fixture(params=[60.0])
async def way(request: pytest.FixtureRequest, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Way]:
    async with AsyncExitStack() as open:
        bucket = open.enter_context(buckets.bucket())
        for name, value in buckets.settings(bucket).items():
            monkeypatch.setenv(name, value)
        url = f"s3://bucket/{bucket.url[-5:]}"
        told = {"blobs_url": url, "direct_seconds": request.param}
        federation = await open.enter_async_context(open_federation(sqlite_url, tmp_path / "coordinator", **told))
        device = await federation.enrol("device")
        await federation.open(make_plan(**ALONE, layout=LARGE.model_dump(mode="json")))
        job = await device.take()
        address = await open.enter_async_context(served(federation.app))
        yield Way(address, bucket, device, job, tmp_path / "slice", federation)


async def test_a_slice_comes_from_the_store_and_the_credential_does_not_go_there(way: Way) -> None:
    assert await way.fetch() == way.job.slice.bytes
    (headers,) = way.bucket.signed
    assert "authorization" not in headers
    assert not any(way.secret in value for value in headers.values())


async def test_a_slice_that_breaks_off_is_fetched_from_there_on(way: Way) -> None:
    way.bucket.cuts = iter([100, 200])
    assert await way.fetch() == way.job.slice.bytes
    assert [headers.get("range") for headers in way.bucket.signed] == [None, "bytes=100-", "bytes=300-"]


async def test_what_the_store_refuses_comes_from_the_coordinator(way: Way) -> None:
    way.bucket.closed = True
    assert await way.fetch() == way.job.slice.bytes
    assert len(way.bucket.signed) == 1


async def test_a_store_that_breaks_off_at_once_is_not_asked_again(way: Way) -> None:
    way.bucket.cuts = iter([0, 0, 0, 0])
    assert await way.fetch() == way.job.slice.bytes
    assert len(way.bucket.signed) == 1


async def test_other_bytes_than_the_named_ones_are_not_kept(way: Way) -> None:
    (key,) = (key for key in way.bucket.objects if key.endswith(way.job.slice.digest[7:]))
    right = way.bucket.objects[key]
    way.bucket.objects[key] = bytes(len(right))
    with pytest.raises(errors.DigestMismatch):
        await way.fetch()
    assert list(way.file.parent.glob("slice*")) == []


@pytest.mark.parametrize("way", [None], indirect=True)
async def test_where_it_is_not_switched_on_everything_comes_from_the_coordinator(way: Way) -> None:
    assert await way.fetch() == way.job.slice.bytes
    assert way.bucket.signed == []


async def test_who_does_not_wish_it_is_not_sent_elsewhere_and_a_signed_address_is_told_to_holders_only(way: Way) -> None:
    path, mine = f"/v1/blobs/{way.job.slice.digest}", {"Authorization": f"Bearer {way.secret}"}
    async with httpx.AsyncClient(base_url=way.address) as http:
        plain = await http.get(path, headers=mine)
        told = await http.get(path, headers=mine | {"Prefer": "wait=1, direct"})
        nobody = await http.get(path, headers={"Prefer": "direct"})
        other = await http.get(f"/v1/blobs/sha256:{0:064}", headers=mine | {"Prefer": "direct"})

    assert (plain.status_code, told.status_code, nobody.status_code, other.status_code) == (200, 307, 401, 404)
    assert told.headers["Location"].startswith(way.bucket.url)
    assert "X-Amz-Expires=60" in told.headers["Location"]
    assert told.headers["Cache-Control"] == "no-store"
    assert "Location" not in nobody.headers


async def test_a_large_slice_goes_to_the_store_without_the_credential_and_nothing_is_left_there(way: Way) -> None:
    await way.send(await way.device.trained(way.job))

    (headers,) = (headers for headers in way.bucket.signed if "content-length" in headers)
    assert "authorization" not in headers
    assert not any(way.secret in value for value in headers.values())
    assert way.incoming == []


async def test_what_the_store_does_not_take_goes_through_the_coordinator(way: Way) -> None:
    way.bucket.closed = True
    await way.send(await way.device.trained(way.job))
    assert way.incoming == []


@pytest.mark.parametrize("way", [None], indirect=True)
async def test_where_it_is_not_switched_on_everything_goes_through_the_coordinator(way: Way) -> None:
    await way.send(await way.device.trained(way.job))
    assert way.bucket.signed == []


async def test_what_is_put_after_it_was_looked_at_changes_nothing_and_is_swept(way: Way) -> None:
    data = await way.device.trained(way.job)
    address = read(await way.post("/address", data), UploadAddress).url
    async with httpx.AsyncClient() as store:
        await store.put(address, content=data)
        receipt = read(await way.post("", data), SliceReceipt)
        await store.put(address, content=bytes(len(data)))

    assert way.federation.parts.blobs.read(receipt.digest) == data
    assert len(way.incoming) == 1
    house, clock = way.federation.parts.housekeeping, way.federation.clock
    clock.now = datetime.now(UTC) + timedelta(hours=1, seconds=30)  # the address is good for a minute: more may be put yet
    assert house.run_once()["arrivals"] == 0
    clock.advance(60)
    assert house.run_once()["arrivals"] == 1
    assert way.incoming == []
    assert way.federation.parts.blobs.exists(receipt.digest)


async def test_what_was_put_must_be_what_was_announced(way: Way) -> None:
    data = await way.device.trained(way.job)
    address = read(await way.post("/address", data), UploadAddress).url
    async with httpx.AsyncClient() as store:
        await store.put(address, content=data[:-1])
        assert isinstance(refusal(await way.post("", data)), errors.TruncatedBody)
        await store.put(address, content=data[:-1] + b"?")
        assert isinstance(refusal(await way.post("", data)), errors.DigestMismatch)
        assert isinstance(refusal(await way.post("", data)), errors.TruncatedBody), "it is deleted once it was looked at"

    await way.send(data)


async def test_a_slice_that_cannot_count_ends_the_job_whichever_way_it_came(way: Way) -> None:
    data = (await way.device.trained(way.job)).replace(b'"F32"', b'"F16"')
    address = read(await way.post("/address", data), UploadAddress).url
    async with httpx.AsyncClient() as store:
        await store.put(address, content=data)
    assert isinstance(refusal(await way.post("", data)), errors.InvalidSlice)
    assert isinstance(refusal(await way.post("", data)), errors.JobOver)
    assert way.incoming == []


async def test_no_address_is_told_for_more_than_the_job_may_send_nor_to_a_stale_holder(way: Way) -> None:
    assert isinstance(refusal(await way.post("/address", b"", **{"Upload-Length": str(10**9)})), errors.TooLarge)
    assert isinstance(refusal(await way.post("/address", b"x", **{"Lease-Epoch": "2"})), errors.StaleLease)
    assert isinstance(refusal(await way.post("", b"x", **{"Lease-Epoch": "2"})), errors.StaleLease)


def test_direct_transfer_is_refused_where_no_store_can_sign(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidRequest, match="s3://BUCKET"):
        build(Settings(data=tmp_path, direct_seconds=60))
