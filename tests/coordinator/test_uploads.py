"""A trained slice on its way in: whole or not at all, once, and nothing of it believed that was not looked at."""

from __future__ import annotations

from typing import Any

import pytest

from protocol import errors, slices
from protocol.messages import Job, Result
from protocol.states import JobKind, JobState
from tests.federation import Device, Federation, make_plan, refusal, repr_digest


async def upload(device: Device, job: Job, data: bytes, **headers: str) -> Any:
    """A slice with no header but those that are named; `_` stands for `-`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await device.call("PUT", f"/v1/jobs/{job.id}/slice", content=data, headers={"Lease-Epoch": str(job.lease.epoch)} | named)


async def test_a_slice_is_stored_under_its_digest(federation: Federation) -> None:
    run, (device, *_), (job, *_) = await federation.training(make_plan())
    data = await device.trained(job)

    receipt = await device.put_slice(job, data)

    assert (receipt.digest, receipt.bytes) == (slices.digest(data), len(data))
    view = await federation.admin.job(run, job)
    assert view.slice is not None
    assert (view.state, view.slice.digest, view.slice.bytes) == (JobState.leased, receipt.digest, len(data))
    assert federation.parts.blobs.read(receipt.digest) == data


async def test_the_same_slice_again_is_answered_the_same(federation: Federation) -> None:
    _, (device, *_), (job, *_) = await federation.training(make_plan())
    data = await device.trained(job)

    assert await device.put_slice(job, data) == await device.put_slice(job, data)


async def test_until_the_result_is_told_the_last_slice_counts(federation: Federation) -> None:
    run, (device, *_), (job, *_) = await federation.training(make_plan())
    first = await device.put_slice(job, await device.trained(job))
    second = await device.put_slice(job, await device.trained(job, salt=1))
    assert first.digest != second.digest

    with pytest.raises(errors.InvalidResult) as caught:
        await device.put_result(job, device.result(job, first.digest))
    assert caught.value.facts["uploaded"] == second.digest
    await device.put_result(job, device.result(job, second.digest))

    stored = (await federation.admin.job(run, job)).slice
    assert stored is not None
    assert stored.digest == second.digest


@pytest.mark.parametrize("wire", ["float32", "bfloat16", "float16"])
async def test_slices_travel_in_the_plans_dtype(small: Federation, wire: str) -> None:
    await small.enrol_many(3)
    run = await small.open(make_plan(wire=wire, rounds=1))

    (view,) = await small.play([run])

    assert view.state == "finished"
    assert {blob.bytes for blob in (await small.admin.round(run, 1)).slices.values()}


@pytest.mark.parametrize("length", [5585, 10**6])
async def test_more_than_an_honest_slice_has_is_too_large_and_the_job_goes_on(small: Federation, length: int) -> None:
    run, (device, *_), (job, *_) = await small.training(make_plan())
    assert job.max_upload_bytes < length

    with pytest.raises(errors.TooLarge) as caught:
        await device.put_slice(job, b"\0" * length)

    assert caught.value.facts["largest"] == job.max_upload_bytes
    assert (await small.admin.job(run, job)).state is JobState.leased
    await device.complete(job)


async def test_bytes_that_are_not_those_announced_are_sent_again(federation: Federation) -> None:
    run, (device, *_), (job, *_) = await federation.training(make_plan())
    data = await device.trained(job)
    damaged = data[:-1] + bytes([data[-1] ^ 1])

    with pytest.raises(errors.DigestMismatch) as caught:
        await device.put_slice(job, damaged, headers={"Repr-Digest": repr_digest(data)})

    assert caught.value.retryable
    assert (await federation.admin.job(run, job)).state is JobState.leased
    assert (await federation.admin.client(device)).rejections == 0
    assert (await device.put_slice(job, data)).digest == slices.digest(data)


@pytest.mark.parametrize("announced", ["", "md5=:AAAA:", "sha-512=:AAAA:", "sha-256=AAAA", "sha-256"])
async def test_a_digest_of_another_kind_is_passed_over(small: Federation, announced: str) -> None:
    _, (device, *_), (job, *_) = await small.training(make_plan())

    response = await upload(device, job, await device.trained(job), Repr_Digest=announced)

    assert response.status_code == 200


@pytest.mark.parametrize("announced", ["sha-256=:A:", "sha-256=:====:", "sha-256=:AAAA:", "md5=:AAAA:, sha-256=:AAAA:", "x" * 301])
async def test_a_digest_that_cannot_be_the_slices_is_refused(small: Federation, announced: str) -> None:
    run, (device, *_), (job, *_) = await small.training(make_plan())

    error = refusal(await upload(device, job, await device.trained(job), Repr_Digest=announced))

    assert isinstance(error, (errors.DigestMismatch, errors.InvalidRequest))
    assert (await small.admin.job(run, job)).state is JobState.leased


async def test_of_several_digests_the_known_one_counts(small: Federation) -> None:
    _, (device, *_), (job, *_) = await small.training(make_plan())
    data = await device.trained(job)

    assert (await upload(device, job, data, Repr_Digest=f"md5=:AAAA:, {repr_digest(data)}")).status_code == 200


async def test_an_upload_names_its_lease(small: Federation) -> None:
    _, (device, *_), (job, *_) = await small.training(make_plan())

    response = await device.call("PUT", f"/v1/jobs/{job.id}/slice", content=b"")

    assert isinstance(refusal(response), errors.InvalidRequest)


async def test_nothing_is_left_of_an_upload_but_its_blob(small: Federation) -> None:
    _, (device, *_), (job, *_) = await small.training(make_plan())
    before = set(small.parts.blobs.digests())
    for data in (b"nonsense", b"\0" * 10**6):
        with pytest.raises((errors.InvalidSlice, errors.TooLarge, errors.JobOver)):
            await device.put_slice(job, data)

    assert list(small.parts.settings.spool_folder.iterdir()) == []
    assert set(small.parts.blobs.digests()) == before


# --- results ------------------------------------------------------------------------------------------------------------


async def test_the_same_result_again_is_answered_the_same_also_after_the_round(federation: Federation) -> None:
    _, devices, jobs = await federation.training(make_plan())
    device, job = devices[0], jobs[0]
    body = (await device.complete(job)).model_dump(mode="json")
    path = f"/v1/jobs/{job.id}/result"

    again = await device.call("PUT", path, json=body)
    assert (again.status_code, again.json()) == (200, {"job": job.id, "state": "submitted"})
    for other, work in zip(devices[1:], jobs[1:], strict=True):
        await other.complete(work)
    federation.tick()

    after = await device.call("PUT", path, json=body)
    assert (after.status_code, after.json()) == (200, {"job": job.id, "state": "accepted"})


async def test_another_result_does_not_replace_the_first(federation: Federation) -> None:
    run, (device, *_), (job, *_) = await federation.training(make_plan())
    result = await device.complete(job)

    with pytest.raises(errors.DifferentResult):
        await device.put_result(job, result.model_copy(update={"examples": 6}))

    assert (await federation.admin.job(run, job)).examples == result.examples


async def test_a_slice_after_the_result_is_over(federation: Federation) -> None:
    _, (device, *_), (job, *_) = await federation.training(make_plan())
    data = await device.trained(job)
    await device.complete(job)

    with pytest.raises(errors.JobOver, match="the job is submitted"):
        await device.put_slice(job, data)


async def test_a_training_result_without_an_uploaded_slice_is_refused(federation: Federation) -> None:
    _, (device, *_), (job, *_) = await federation.training(make_plan())

    for slice in (None, job.slice.digest):
        with pytest.raises(errors.InvalidResult, match="upload it, then send the result"):
            await device.put_result(job, device.result(job, slice))


async def test_an_evaluation_takes_no_slice(federation: Federation) -> None:
    device, *_ = await federation.enrol_many(3)
    await federation.open(make_plan())
    job = await device.take(JobKind.evaluate)

    with pytest.raises(errors.Conflict, match="takes no slice"):
        await device.put_slice(job, b"")
    with pytest.raises(errors.InvalidResult, match="names no slice"):
        await device.put_result(job, device.result(job, job.slice.digest))
    assert (await device.put_result(job, device.result(job))).state is JobState.accepted


ABSURD: dict[str, dict[str, Any]] = {
    "no examples": {"examples": 0},
    "fewer than none": {"examples": -5},
    "more examples than there are": {"examples": 10**30},
    "half an example": {"examples": 0.5},
    "examples in words": {"examples": "many"},
    "a metric without value": {"metrics": {"accuracy": {"weight": 1}}},
    "a metric without weight": {"metrics": {"accuracy": {"value": 1, "weight": 0}}},
    "a metric of negative weight": {"metrics": {"accuracy": {"value": 1, "weight": -1}}},
    "a metric beyond any": {"metrics": {"accuracy": {"value": 1e308, "weight": 1}}},
    "more than all right": {"metrics": {"accuracy": {"value": 1.5, "weight": 1}}},
    "less than nothing right": {"metrics": {"f1": {"value": -1e100, "weight": 1}}},
    "a loss below zero": {"metrics": {"loss_after": {"value": -0.5, "weight": 1}}},
    "a metric with a strange name": {"metrics": {"<script>": {"value": 1, "weight": 1}}},
    "too many metrics": {"metrics": {f"m{n}": {"value": 1, "weight": 1} for n in range(65)}},
    "negative seconds": {"usage": {"seconds": -1}},
    "a step without end": {"usage": {"step_seconds": 1e300}},
    "bytes beyond counting": {"usage": {"download_bytes": 2**53}},
    "a slice that is a path": {"slice": "../../etc/passwd"},
    "a slice of another algorithm": {"slice": "md5:" + "0" * 32},
}


@pytest.mark.parametrize("what", ABSURD)
async def test_a_result_that_cannot_be_true_is_refused_and_the_job_goes_on(small: Federation, what: str) -> None:
    run, (device, *_), (job, *_) = await small.training(make_plan())
    slice = (await device.put_slice(job, await device.trained(job))).digest
    body = device.result(job, slice).model_dump(mode="json") | ABSURD[what]

    response = await device.call("PUT", f"/v1/jobs/{job.id}/result", json=body)

    assert isinstance(refusal(response), errors.InvalidRequest)
    assert (await small.admin.job(run, job)).state is JobState.leased
    await device.put_result(job, device.result(job, slice))


async def test_results_at_their_limits_leave_every_view_readable(federation: Federation) -> None:
    """What each client may say by itself must not, added up, be more than an operator's view can show."""
    run, devices, jobs = await federation.training(make_plan(rounds=1))
    largest = {
        "metrics": {name: {"value": value, "weight": 1e15} for name, value in (("high", 1e100), ("low", -1e100), ("loss", 1e100))},
        "usage": {"seconds": 1e9, "download_bytes": 2**53 - 1, "upload_bytes": 2**53 - 1, "steps": 10**12, "step_seconds": 1e9},
        "examples": 10**12,
    }
    for device, job in zip(devices, jobs, strict=True):
        await device.complete(job, **largest)
    federation.tick()

    for path in ("", "/rounds", "/rounds/1", "/adapter"):
        assert (await federation.viewer.call("GET", f"/v1/runs/{run}{path}")).status_code == 200
    assert (await federation.viewer.call("GET", "/v1/runs")).status_code == 200
    view = await federation.viewer.round(run, 1)
    assert view.train_metrics == {"high": pytest.approx(1e100), "low": pytest.approx(-1e100), "loss": pytest.approx(1e100)}


async def test_what_a_client_claims_to_have_fetched_is_bounded_by_what_there_was(small: Federation) -> None:
    run, devices, jobs = await small.training(make_plan(rounds=1))
    await devices[0].complete(jobs[0], usage={"download_bytes": 2**53 - 1})

    assert (await small.admin.round(run, 1)).bytes_down <= 100 * jobs[0].slice.bytes


async def test_a_result_says_what_it_cost(small: Federation) -> None:
    run, (device, *_), (job, *_) = await small.training(make_plan())
    result: Result = await device.complete(job)

    view = await small.admin.job(run, job)

    assert (view.usage, view.metrics, view.examples) == (result.usage, result.metrics, result.examples)
