"""A trained slice in parts: whatever cuts, repeats and changes of hands there are, it goes on where it was and ends as one blob."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from sqlalchemy import insert, select

from coordinator import parts
from coordinator.tables import Part, Upload
from protocol import errors, slices
from protocol.messages import Job, SliceReceipt
from protocol.states import JobKind, JobState
from tests.federation import Device, Federation, make_plan, open_federation, refusal, repr_digest
from tests.merging import buckets


async def refused_at(device: Device, job: Job, data: bytes, start: int, stop: int) -> int:
    """The offset that the upload is said to stand at instead."""
    with pytest.raises(errors.OffsetMismatch) as caught:
        await device.patch(job, data, start, stop)
    assert caught.value.facts["length"] == len(data)
    offset = caught.value.facts["offset"]
    assert isinstance(offset, int)
    return offset


async def told(device: Device, job: Job) -> dict[str, str]:
    """What is said of the upload."""
    headers = await device.head(job)
    return {name: value for name, value in headers.items() if name.startswith(("upload-", "repr-"))}


def rows(federation: Federation) -> tuple[int, int]:
    """How many uploads and parts are noted."""
    with federation.parts.database.read() as session:
        return len(session.scalars(select(Upload.job_id)).all()), len(session.scalars(select(Part.start)).all())


async def test_a_slice_in_parts_is_the_same_as_a_slice_whole(federation: Federation) -> None:
    run, (device, *_), (job, *_) = await federation.training(make_plan())
    data = await device.trained(job)
    assert await told(device, job) == {"upload-offset": "0"}

    assert await device.patch(job, data, 0, 1000) == 1000
    assert await told(device, job) == {"upload-offset": "1000", "upload-length": str(len(data)), "repr-digest": repr_digest(data)}
    assert await device.patch(job, data, 1000, 1001) == 1001
    receipt = await device.patch(job, data, 1001, len(data))

    assert isinstance(receipt, SliceReceipt)
    assert receipt == await device.put_slice(job, data)
    assert await told(device, job) == {
        "upload-complete": "?1",
        "upload-offset": str(len(data)),
        "upload-length": str(len(data)),
        "repr-digest": repr_digest(data),
    }
    assert federation.parts.blobs.read(receipt.digest) == data
    view = await federation.admin.job(run, job)
    assert view.slice is not None
    assert (view.state, view.slice.digest) == (JobState.leased, slices.digest(data))
    assert rows(federation) == (0, 0)
    await device.put_result(job, device.result(job, receipt.digest))


async def test_the_last_part_again_is_answered_the_same(small: Federation) -> None:
    _, (device, *_), (job, *_) = await small.training(make_plan())
    data = await device.trained(job)
    await device.patch(job, data, 0, 500)

    first = await device.patch(job, data, 500, len(data))

    assert first == await device.patch(job, data, 500, len(data)) == await device.patch(job, data, len(data), len(data))


@pytest.mark.parametrize("start", [0, 99, 101, 10**9])
async def test_bytes_from_elsewhere_are_refused_with_the_offset_and_count_nothing(small: Federation, start: int) -> None:
    _, (device, *_), (job, *_) = await small.training(make_plan())
    data = await device.trained(job)
    await device.patch(job, data, 0, 100)

    assert await refused_at(device, job, data, start, start + 50) == 100
    assert (await told(device, job))["upload-offset"] == "100"


async def test_no_bytes_change_nothing(small: Federation) -> None:
    _, (device, *_), (job, *_) = await small.training(make_plan())
    data = await device.trained(job)

    assert await device.patch(job, data, 0, 0) == 0
    assert await told(device, job) == {"upload-offset": "0"}
    await device.patch(job, data, 0, 7)
    assert await device.patch(job, data, 7, 7) == 7


async def test_another_slice_begins_anew(federation: Federation) -> None:
    _, (device, *_), (job, *_) = await federation.training(make_plan())
    first, second = await device.trained(job), await device.trained(job, salt=1)
    await device.patch(job, first, 0, 2000)

    assert await refused_at(device, job, second, 2000, 3000) == 0
    assert (await told(device, job))["repr-digest"] == repr_digest(first)
    assert await device.patch(job, second, 0, 10) == 10

    assert (await told(device, job))["repr-digest"] == repr_digest(second)
    assert await refused_at(device, job, first, 2000, 3000) == 0
    receipt = await device.patch(job, second, 10, len(second))
    assert isinstance(receipt, SliceReceipt)
    assert federation.parts.blobs.read(receipt.digest) == second


async def test_a_slice_after_another_one_that_came_whole_begins_anew(small: Federation) -> None:
    run, (device, *_), (job, *_) = await small.training(make_plan())
    first, second = await device.trained(job), await device.trained(job, salt=1)
    await device.put_slice(job, first)
    assert (await told(device, job))["upload-complete"] == "?1"

    await device.patch(job, second, 0, 10)
    assert (await told(device, job)).get("upload-complete") is None
    await device.patch(job, second, 10, len(second))

    view = await small.admin.job(run, job)
    assert view.slice is not None
    assert view.slice.digest == slices.digest(second)


async def test_a_slice_that_comes_whole_ends_the_upload_of_another(small: Federation) -> None:
    _, (device, *_), (job, *_) = await small.training(make_plan())
    await device.patch(job, await device.trained(job, salt=1), 0, 10)

    await device.put_slice(job, data := await device.trained(job))

    assert (await told(device, job))["repr-digest"] == repr_digest(data)
    assert rows(small) == (0, 0)


async def test_whoever_takes_the_job_up_again_goes_on_with_the_upload(federation: Federation) -> None:
    _, (device, *_), (job, *_) = await federation.training(make_plan())
    data = await device.trained(job)
    await device.patch(job, data, 0, 1000)
    again = await device.take()
    assert (again.id, again.lease.epoch) == (job.id, job.lease.epoch + 1)

    with pytest.raises(errors.StaleLease):
        await device.head(job)
    with pytest.raises(errors.StaleLease):
        await device.patch(job, data, 1000, 2000)

    assert (await told(device, again))["upload-offset"] == "1000"
    assert isinstance(await device.patch(again, data, 1000, len(data)), SliceReceipt)


async def test_a_part_that_is_still_coming_when_the_job_changes_hands_is_not_noted(federation: Federation) -> None:
    _, (device, *_), (job, *_) = await federation.training(make_plan())
    data = await device.trained(job)
    await device.patch(job, data, 0, 1000)

    async def slowly() -> AsyncIterator[bytes]:
        yield data[1000:1500]
        await device.take()
        yield data[1500:2000]

    headers = {"Lease-Epoch": "1", "Upload-Offset": "1000", "Upload-Length": str(len(data)), "Repr-Digest": repr_digest(data)}
    response = await device.call("PATCH", f"/v1/jobs/{job.id}/slice", content=slowly(), headers=headers)

    assert isinstance(refusal(response), errors.StaleLease)
    assert (await device.head(job, epoch=2))["Upload-Offset"] == "1000"


@pytest.mark.parametrize("lacking", [0, 1])
async def test_a_part_that_is_still_coming_when_the_slice_is_whole_is_answered_so(federation: Federation, lacking: int) -> None:
    _, (device, *_), (job, *_) = await federation.training(make_plan())
    data = await device.trained(job)
    await device.patch(job, data, 0, 1000)

    async def slowly() -> AsyncIterator[bytes]:
        yield data[1000:1500]
        await device.patch(job, data, 1000, len(data))
        yield data[1500 : len(data) - lacking]

    headers = {"Lease-Epoch": "1", "Upload-Offset": "1000", "Upload-Length": str(len(data)), "Repr-Digest": repr_digest(data)}
    response = await device.call("PATCH", f"/v1/jobs/{job.id}/slice", content=slowly(), headers=headers)

    assert response.status_code == (204 if lacking else 200)
    assert response.headers["Upload-Offset"] == str(len(data))
    assert rows(federation) == (0, 0)


async def test_of_several_parts_at_once_one_counts(federation: Federation) -> None:
    _, (device, *_), (job, *_) = await federation.training(make_plan())
    data, offset = await device.trained(job), 0
    for _ in range(3):
        found = await asyncio.gather(*(device.patch(job, data, offset, offset + 500 + n) for n in range(4)), return_exceptions=True)

        (offset,) = [answer for answer in found if isinstance(answer, int)]
        assert all(isinstance(answer, errors.OffsetMismatch) for answer in found if answer != offset)
        assert (await told(device, job))["upload-offset"] == str(offset)

    assert isinstance(await device.patch(job, data, offset, len(data)), SliceReceipt)


async def test_two_ends_at_once_are_answered_the_same(federation: Federation) -> None:
    _, (device, *_), (job, *_) = await federation.training(make_plan())
    data = await device.trained(job)
    await device.patch(job, data, 0, 1000)

    found = await asyncio.gather(*(device.patch(job, data, 1000, len(data)) for _ in range(4)), return_exceptions=True)

    receipts = [answer for answer in found if not isinstance(answer, errors.OffsetMismatch)]
    assert receipts
    assert receipts == [SliceReceipt(digest=slices.digest(data), bytes=len(data))] * len(receipts)


async def test_another_coordinator_goes_on_with_an_upload_in_a_bucket(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with AsyncExitStack() as open:
        bucket = open.enter_context(buckets.bucket())
        for name, value in buckets.settings(bucket).items():
            monkeypatch.setenv(name, value)
        url = f"s3://bucket/{bucket.url[-5:]}"
        one = await open.enter_async_context(open_federation(postgres_url, tmp_path / "one", blobs_url=url))
        two = await open.enter_async_context(open_federation(postgres_url, tmp_path / "two", one.clock, blobs_url=url))
        _, (device, *_), (job, *_) = await one.training(make_plan())
        data = await device.trained(job)
        await device.patch(job, data, 0, 1000)

        there = Device(two.http, device.secret, id=device.id, name=device.name)
        receipt = await there.patch(job, data, 1000, len(data))

        assert isinstance(receipt, SliceReceipt)
        assert bucket.objects[f"{bucket.url[-5:]}/{receipt.digest.replace(':', '/')}"] == data


async def test_another_coordinator_goes_on_with_an_upload(database_url: str, tmp_path: Path) -> None:
    async with open_federation(database_url, tmp_path) as one, open_federation(database_url, tmp_path, one.clock) as two:
        _, (device, *_), (job, *_) = await one.training(make_plan())
        there = Device(two.http, device.secret, id=device.id, name=device.name)
        data = await device.trained(job)
        middle = len(data) // 2

        await device.patch(job, data, 0, middle - 1)
        assert (await there.head(job))["Upload-Offset"] == str(middle - 1)
        await there.patch(job, data, middle - 1, middle)

        assert isinstance(await device.patch(job, data, middle, len(data)), SliceReceipt)
        assert (await there.head(job))["Upload-Complete"] == "?1"


async def test_what_was_damaged_on_the_way_drops_the_upload_and_may_be_sent_again(federation: Federation) -> None:
    run, (device, *_), (job, *_) = await federation.training(make_plan())
    data = await device.trained(job)
    headers = {"Upload-Length": str(len(data)), "Repr-Digest": repr_digest(data)}
    await device.patch(job, b"\0" * 1000, 0, 1000, headers=headers)

    with pytest.raises(errors.DigestMismatch):
        await device.patch(job, data, 1000, len(data))

    assert await told(device, job) == {"upload-offset": "0"}
    assert (await federation.admin.job(run, job)).state is JobState.leased
    await device.patch(job, data, 0, 1000)
    assert isinstance(await device.patch(job, data, 1000, len(data)), SliceReceipt)


async def test_a_part_that_the_store_lost_drops_the_upload(small: Federation) -> None:
    _, (device, *_), (job, *_) = await small.training(make_plan())
    data = await device.trained(job)
    await device.patch(job, data, 0, 1000)
    small.parts.blobs.delete(slices.digest(data[:1000]))

    with pytest.raises(errors.DigestMismatch, match="a part of the slice was lost"):
        await device.patch(job, data, 1000, len(data))

    assert await told(device, job) == {"upload-offset": "0"}


async def test_a_slice_that_cannot_count_ends_the_job_also_in_parts(federation: Federation) -> None:
    run, (device, *_), (job, *_) = await federation.training(make_plan())
    await device.patch(job, b"nonsense" * 100, 0, 200)

    with pytest.raises(errors.MalformedSlice):
        await device.patch(job, b"nonsense" * 100, 200, 800)

    assert (await federation.admin.job(run, job)).state is JobState.rejected
    assert rows(federation) == (0, 0)


@pytest.mark.parametrize("length", [5585, 2**53])
async def test_a_slice_that_is_announced_too_long_is_refused(small: Federation, length: int) -> None:
    _, (device, *_), (job, *_) = await small.training(make_plan())

    with pytest.raises(errors.TooLarge) as caught:
        await device.patch(job, b"\0", 0, 1, headers={"Upload-Length": str(length)})

    assert caught.value.facts["largest"] == job.max_upload_bytes
    assert await told(device, job) == {"upload-offset": "0"}


async def test_more_bytes_than_are_lacking_are_refused(small: Federation) -> None:
    _, (device, *_), (job, *_) = await small.training(make_plan())
    data = await device.trained(job)
    await device.patch(job, data, 0, 1000)

    for headers in ({}, {"Content-Length": str(len(data))}):
        with pytest.raises(errors.TooLarge) as caught:
            await device.patch(
                job,
                data + b"\0",
                1000,
                len(data) + 1,
                headers={"Repr-Digest": repr_digest(data), "Upload-Length": str(len(data)), **headers},
            )
        assert caught.value.facts["largest"] == len(data) - 1000

    assert (await told(device, job))["upload-offset"] == "1000"


@pytest.mark.parametrize("digest", ["", "nothing", "md5=:AAAA:", "sha-256=:===:", "sha-256=:AAAA:"])
async def test_parts_name_the_digest_of_the_whole(small: Federation, digest: str) -> None:
    _, (device, *_), (job, *_) = await small.training(make_plan())

    with pytest.raises(errors.InvalidRequest):
        await device.patch(job, b"x" * 9, 0, 9, headers={"Repr-Digest": digest})

    assert await told(device, job) == {"upload-offset": "0"}


async def test_an_evaluation_takes_no_parts(small: Federation) -> None:
    device, *_ = await small.enrol_many(3)
    await small.open(make_plan())
    job = await device.take(JobKind.evaluate)

    with pytest.raises(errors.Conflict):
        await device.head(job)
    with pytest.raises(errors.Conflict, match="takes no slice"):
        await device.patch(job, b"x" * 9, 0, 5)


async def test_parts_beyond_counting_begin_anew_with_a_reason(small: Federation) -> None:
    _, (device, *_), (job, *_) = await small.training(make_plan())
    data = await device.trained(job)
    await device.patch(job, data, 0, 100)
    with small.parts.database.write() as session:  # as if the hundred bytes had come in as many parts as there may be
        found = [{"job_id": job.id, "start": 10**6 + n, "bytes": 1, "digest": slices.digest(b"")} for n in range(parts.MOST - 1)]
        session.execute(insert(Part), found)

    with pytest.raises(errors.OffsetMismatch, match="more than 10000 parts; begin anew, with larger ones") as caught:
        await device.patch(job, data, 100, 200)

    assert caught.value.facts["offset"] == 0
    assert rows(small) == (0, 0)
    assert isinstance(await device.patch(job, data, 0, len(data)), SliceReceipt)


async def test_nothing_but_blobs_is_left_of_an_upload(small: Federation) -> None:
    _, (device, *_), (job, *_) = await small.training(make_plan())
    data = await device.trained(job)
    for start in range(0, len(data), 1000):
        await device.patch(job, data, start, start + 1000)

    assert list(small.parts.settings.spool_folder.iterdir()) == []
    assert list((small.parts.settings.data / "blobs" / "staging").iterdir()) == []


# --- abandoned ----------------------------------------------------------------------------------------------------------


def swept(federation: Federation) -> int:
    """How many uploads are given up now."""
    with federation.parts.database.write() as session:
        return parts.sweep(session, federation.parts.database.clock(session))


async def test_an_upload_that_goes_on_is_not_swept(federation: Federation) -> None:
    _, (device, *_), (job, *_) = await federation.training(make_plan(times={"lease": 1e6, "no_progress": 1e6, "job": 1e6, "round": 1e6}))
    data = await device.trained(job)
    for start in (0, 500, 1000):
        await device.patch(job, data, start, start + 500)
        federation.clock.advance(parts.IDLE.total_seconds())
        assert swept(federation) == 0

    federation.clock.advance(1)
    assert swept(federation) == 1
    assert rows(federation) == (0, 0)
    assert await told(device, job) == {"upload-offset": "0"}


async def test_the_uploads_of_jobs_that_ended_are_swept_at_once(federation: Federation) -> None:
    run, devices, jobs = await federation.training(make_plan())
    for device, job in zip(devices, jobs, strict=True):
        await device.patch(job, await device.trained(job), 0, 100)
    await federation.admin.change_run(run, "stop")

    assert swept(federation) == len(jobs)


async def test_the_upload_of_a_job_that_was_lost_goes_on_when_it_is_taken_up_again(federation: Federation) -> None:
    _, (lost, *others), (job, *held) = await federation.training(make_plan())
    data = await lost.trained(job)
    await lost.patch(job, data, 0, 100)
    federation.clock.advance(60)
    for device, other in zip(others, held, strict=True):
        await device.renew(other, step=1)
    federation.tick()
    with pytest.raises(errors.JobOver, match="the job is expired"):
        await lost.patch(job, data, 100, 200)

    assert swept(federation) == 0
    federation.clock.advance(1)
    await lost.next_job()
    federation.tick()
    again = await lost.take()
    assert (await told(lost, again))["upload-offset"] == "100"
    assert isinstance(await lost.patch(again, data, 100, len(data)), SliceReceipt)
