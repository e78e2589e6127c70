"""Contributions that are set apart: kept with their reason, out of every job's reach, and never more than a little."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from coordinator import quarantine
from protocol import errors
from protocol.messages import BlobRef, Job
from protocol.slices import digest
from protocol.states import ClientState, JobState
from protocol.views import Page, QuarantineView
from tests.coordinator.test_races import kinds
from tests.coordinator.test_sweeping import sweep
from tests.federation import Device, Federation, Operator, make_plan, open_federation, refusal, repr_digest

MONTH = 31 * 86_400


async def reject(device: Device, job: Job, data: bytes) -> None:
    """Send a slice that cannot count."""
    with pytest.raises(errors.MalformedSlice):
        await device.put_slice(job, data)


async def listed(operator: Operator, **params: Any) -> list[QuarantineView]:
    return (await operator.get("/v1/quarantine", Page[QuarantineView], **params)).items


async def offend(federation: Federation, device: Device, data: bytes, name: str = "lonely") -> str:
    """A run of the device alone, in which it sends a slice that cannot count."""
    run = await federation.open(make_plan(name=name, cohort={"target": 1, "quorum": 1}, evaluation={"every": 0}))
    await reject(device, await device.take(), data)
    await federation.admin.change_run(run, "stop")
    return run


async def test_a_rejected_slice_is_set_apart_where_no_job_and_no_viewer_reads_it(federation: Federation) -> None:
    run, (device, *_), (job, *_) = await federation.training(make_plan())
    data = b"nonsense, but all of it came"

    await reject(device, job, data)

    (view,) = await listed(federation.viewer)
    assert view == await federation.viewer.get(f"/v1/quarantine/{view.id}", QuarantineView)
    assert (view.run, view.round, view.job, view.client, view.client_name) == (run, 1, job.id, device.id, device.name)
    assert (view.problem, view.reason) == ("malformed-slice", (await federation.admin.job(run, job)).reason)
    assert view.slice == BlobRef(digest=digest(data), bytes=len(data))
    assert not federation.parts.blobs.exists(view.slice.digest)
    path = f"/v1/quarantine/{view.id}/slice"
    assert isinstance(refusal(await federation.viewer.call("GET", path)), errors.Forbidden)
    assert isinstance(refusal(await device.call("GET", path)), errors.Forbidden)
    assert isinstance(refusal(await device.call("GET", f"/v1/blobs/{view.slice.digest}")), errors.NotFound)
    fetched = await federation.admin.call("GET", path)
    assert (fetched.status_code, fetched.content) == (200, data)
    assert fetched.headers["content-length"] == str(len(data))
    assert kinds(federation, "contribution-quarantined") == 1


async def test_a_slice_that_came_in_parts_is_set_apart_whole(federation: Federation) -> None:
    _, (device, *_), (job, *_) = await federation.training(make_plan())
    data = b"nonsense in two parts"
    headers = {"Lease-Epoch": str(job.lease.epoch), "Upload-Length": str(len(data)), "Repr-Digest": repr_digest(data)}

    for start, stop in ((0, 10), (10, len(data))):
        sent = headers | {"Upload-Offset": str(start)}
        answer = await device.call("PATCH", f"/v1/jobs/{job.id}/slice", content=data[start:stop], headers=sent)

    assert isinstance(refusal(answer), errors.MalformedSlice)
    (view,) = await listed(federation.viewer)
    assert (await federation.admin.call("GET", f"/v1/quarantine/{view.id}/slice")).content == data


async def test_what_did_not_come_whole_or_is_sent_again_is_no_case_for_quarantine(small: Federation) -> None:
    _, (device, *_), (job, *_) = await small.training(make_plan())
    with pytest.raises(errors.DigestMismatch):
        await device.put_slice(job, b"damaged", headers={"Repr-Digest": repr_digest(b"sound")})
    with pytest.raises(errors.TooLarge):
        await device.put_slice(job, b"\0" * 10**6)

    assert await listed(small.viewer) == []


async def test_what_was_set_apart_is_paged_and_filtered_by_run_and_client(federation: Federation) -> None:
    run, devices, held = await federation.training(make_plan(cohort={"target": 3, "quorum": 3}))
    for device, job in zip(devices, held, strict=True):
        await reject(device, job, device.name.encode())
        federation.clock.advance(1)
    federation.tick()

    everything = await listed(federation.viewer)
    assert [view.client_name for view in everything] == [device.name for device in reversed(devices)]
    first = await federation.viewer.get("/v1/quarantine", Page[QuarantineView], limit=2)
    second = await federation.viewer.get("/v1/quarantine", Page[QuarantineView], limit=2, cursor=first.next)
    assert (first.items + second.items, second.next) == (everything, None)
    assert await listed(federation.viewer, run=run) == everything
    assert await listed(federation.viewer, run=f"run-{0:016x}") == []
    assert [view.client for view in await listed(federation.viewer, client=devices[0].id)] == [devices[0].id]
    assert await listed(federation.viewer, client=devices[0].id, run=f"run-{0:016x}") == []


async def test_an_operator_deletes_a_contribution_with_its_bytes(federation: Federation) -> None:
    _, (one, two, _), (first, second, _) = await federation.training(make_plan(cohort={"target": 3, "quorum": 3}))
    for device, job in ((one, first), (two, second)):
        await reject(device, job, b"the same nonsense")
    store = federation.parts.quarantine.store
    newer, older = await listed(federation.viewer)

    assert (await federation.admin.call("DELETE", f"/v1/quarantine/{older.id}")).status_code == 204
    assert [view.id for view in await listed(federation.viewer)] == [newer.id]
    assert (await federation.admin.call("GET", f"/v1/quarantine/{newer.id}/slice")).content == b"the same nonsense"
    assert isinstance(refusal(await federation.admin.call("DELETE", f"/v1/quarantine/{older.id}")), errors.NotFound)

    await federation.admin.call("DELETE", f"/v1/quarantine/{newer.id}")
    assert list(store.digests()) == []
    assert isinstance(refusal(await federation.admin.call("GET", f"/v1/quarantine/{newer.id}/slice")), errors.NotFound)


async def test_however_much_is_rejected_a_little_is_kept(database_url: str, tmp_path: Path) -> None:
    """The newest of a client, and the newest bytes of all; what is too large to be kept at all leaves the others alone."""
    async with open_federation(database_url, tmp_path, rejections=1000, quarantine_bytes=2500) as federation:
        device = await federation.enrol("device")
        for number in range(quarantine.MOST + 5):
            await offend(federation, device, bytes([number]) * 1000)
            federation.clock.advance(1)
        federation.parts.housekeeping.run_once()

        views = await listed(federation.viewer)
        assert len(views) == quarantine.MOST
        assert [view.slice is not None for view in views] == [True, True] + [False] * (quarantine.MOST - 2)
        assert {blob.digest for blob in federation.parts.quarantine.store.digests()} == {view.slice.digest for view in views if view.slice}
        gone = await federation.admin.call("GET", f"/v1/quarantine/{views[-1].id}/slice")
        assert isinstance(refusal(gone), errors.NotFound)

        await offend(federation, device, b"\0" * 2501)
        assert [view.slice is not None for view in await listed(federation.viewer)][:4] == [False, True, True, False]


async def test_a_quarantine_without_room_rejects_all_the_same(small: Federation) -> None:
    """As a disk that is full, or a folder that may not be written to."""
    _, (device, *_), (job, *_) = await small.training(make_plan())
    folder = small.parts.settings.data / "blobs" / "quarantine" / "sha256"
    folder.rmdir()
    folder.write_text("no folder")

    await reject(device, job, b"nonsense")

    assert [view.slice for view in await listed(small.viewer)] == [None]


async def test_what_was_set_apart_is_given_up_after_its_time_and_orphans_with_it(federation: Federation) -> None:
    _, (device, *_), (job, *_) = await federation.training(make_plan())
    await reject(device, job, b"nonsense")
    store, folder = federation.parts.quarantine.store, federation.parts.settings.data / "blobs" / "quarantine" / "sha256"
    orphan = store.put(b"kept by a request that died").digest
    for path in folder.iterdir():
        os.utime(path, (0, 0))

    assert federation.parts.housekeeping.run_once()["quarantined"] == 1
    assert not store.exists(orphan)
    assert len(await listed(federation.viewer)) == 1

    federation.clock.advance(MONTH)
    federation.parts.housekeeping.run_once()
    assert await listed(federation.viewer) == []
    assert list(store.digests()) == []


async def test_a_sound_contribution_that_is_suspicious_stays_where_it_lies_for_as_long_as_it_is_set_apart(
    sqlite_url: str, tmp_path: Path
) -> None:
    async with open_federation(sqlite_url, tmp_path, keep_rounds=1, quarantine_bytes=1000, blobs_url="memory://suspicious") as federation:
        run, devices, held = await federation.training(make_plan(suspicious=3.0))
        far = await devices[0].trained(held[0], size=10.0)
        receipt = await devices[0].put_slice(held[0], far)
        await devices[0].put_result(held[0], devices[0].result(held[0], receipt.digest))
        for device, job in zip(devices[1:], held[1:], strict=True):
            await device.complete(job)
        await federation.play([run])
        (view,) = await listed(federation.viewer)
        assert (view.problem, view.client) == ("suspicious-change", devices[0].id)
        assert view.slice == BlobRef(digest=digest(far), bytes=len(far))

        federation.parts.housekeeping.run_once()
        swept = sweep(federation)

        assert len(swept) > 0
        assert digest(far) not in swept
        assert await listed(federation.viewer) == [view]
        assert (await federation.admin.call("GET", f"/v1/quarantine/{view.id}/slice")).content == far
        await federation.admin.call("DELETE", f"/v1/quarantine/{view.id}")
        assert sweep(federation) == {digest(far)}


async def test_a_client_that_was_paused_for_its_slices_gets_work_again_when_it_is_reinstated(federation: Federation) -> None:
    device = await federation.enrol("device")
    for number in range(3):
        await offend(federation, device, bytes([number]))
        federation.clock.advance(1)
    paused = await federation.admin.client(device)
    assert (paused.state, paused.rejections) == (ClientState.paused, 3)
    run = await federation.open(make_plan(cohort={"target": 1, "quorum": 1}, evaluation={"every": 0}))
    assert await device.next_job() is None

    await federation.admin.change_client(device, state="active")
    assert await device.next_job() is None  # seen again, and drawn at the next look
    federation.tick()

    back = await federation.admin.client(device)
    assert (back.state, back.reason, back.rejections) == (ClientState.active, None, 0)
    job = await device.take()
    await device.complete(job)
    assert (await federation.admin.job(run, job)).state is JobState.submitted
    assert len(await listed(federation.viewer, client=device.id)) == 3


async def test_metrics_count_what_was_set_apart_by_problem(federation: Federation) -> None:
    _, (device, *_), (job, *_) = await federation.training(make_plan())
    await reject(device, job, b"nonsense")

    text = (await federation.viewer.call("GET", "/metrics")).text

    assert 'hlora_quarantined{problem="malformed-slice"} 1.0' in text
    assert "hlora_swept_blobs_total 0.0" in text
