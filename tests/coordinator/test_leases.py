"""A job in one client's hands: taken, renewed, lost, given back, taken up again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from protocol import errors
from protocol.messages import Job, Verdict
from protocol.states import JobKind, JobState
from tests.federation import Device, Federation, make_plan, make_profile, refusal

TIMES = {"lease": 60, "no_progress": 600, "job": 3600, "round": 7200}


def every_write(device: Device, job: Job, slice: bytes) -> list[Callable[[], Awaitable[object]]]:
    """Each thing that a client may say of a job that it holds."""
    return [
        lambda: device.renew(job),
        lambda: device.give_back(job),
        lambda: device.put_slice(job, slice),
        lambda: device.put_result(job, device.result(job)),
    ]


async def test_a_poll_whose_answer_was_lost_gives_the_same_job_under_a_higher_epoch(federation: Federation) -> None:
    _, (device, *_), (job, *_) = await federation.training(make_plan())

    again = await device.take()

    assert (again.id, again.lease.epoch) == (job.id, job.lease.epoch + 1)
    assert again.model_copy(update={"lease": job.lease}) == job
    with pytest.raises(errors.StaleLease) as caught:
        await device.renew(job)
    assert (caught.value.facts["epoch"], caught.value.facts["came"]) == (2, 1)


async def test_every_write_of_an_older_holder_is_fenced_off(federation: Federation) -> None:
    run, (device, *_), (job, *_) = await federation.training(make_plan())
    again = await device.take()
    data = await device.trained(job)

    for write in every_write(device, job, data):
        with pytest.raises(errors.StaleLease):
            await write()

    view = await federation.admin.job(run, again)
    assert (view.state, view.epoch, view.slice) == (JobState.leased, 2, None)


@pytest.mark.parametrize("epoch", [2, 2**53 - 1, 10**30])
async def test_an_epoch_that_was_never_given_is_stale(federation: Federation, epoch: int) -> None:
    _, (device, *_), (job, *_) = await federation.training(make_plan())

    for method, path, body in (
        ("POST", "lease", {}),
        ("DELETE", "lease", {"reason": "none"}),
        ("PUT", "result", {"examples": 5, "slice": job.slice.digest}),
    ):
        error = refusal(await device.call(method, f"/v1/jobs/{job.id}/{path}", json=body | {"epoch": epoch}))
        assert isinstance(error, errors.StaleLease if epoch < 2**53 else errors.InvalidRequest)


@pytest.mark.parametrize("epoch", ["0", "-1", "x", "1.5", str(10**30), ""])
async def test_a_lease_epoch_that_is_none_is_refused(small: Federation, epoch: str) -> None:
    _, (device, *_), (job, *_) = await small.training(make_plan())

    with pytest.raises(errors.InvalidRequest):
        await device.put_slice(job, b"", headers={"Lease-Epoch": epoch})


async def test_a_renewal_prolongs_the_lease_and_tells_durations(federation: Federation) -> None:
    run, (device, *_), (job, *_) = await federation.training(make_plan())
    assert (job.lease.seconds, job.lease.no_progress_seconds, job.remaining_seconds) == (60, 600, 3600)
    for step in range(5):
        federation.advance(50)
        renewal = await device.renew(job, step=step, loss=0.5)

    assert (renewal.verdict, renewal.lease_seconds, renewal.remaining_seconds) == (Verdict.proceed, 60, 3600 - 250)
    view = await federation.admin.job(run, job)
    assert view.state is JobState.leased
    assert view.progress is not None
    assert (view.progress.phase, view.progress.step, view.progress.loss) == ("train", 4, 0.5)


async def test_a_lease_that_is_not_renewed_ends(federation: Federation) -> None:
    run, (device, *_), (job, *_) = await federation.training(make_plan())

    federation.advance(59.999)
    assert (await federation.admin.job(run, job)).state is JobState.leased
    federation.advance(0.001)

    view = await federation.admin.job(run, job)
    assert (view.state, view.reason) == (JobState.expired, "the lease was not renewed for 60 s")
    data = await device.call("GET", f"/v1/blobs/{job.slice.digest}")
    assert data.status_code == 404
    for write in every_write(device, job, b""):
        with pytest.raises(errors.JobOver, match="the lease was not renewed for 60 s"):
            await write()


async def test_a_lease_still_counts_until_the_conductor_looks(small: Federation) -> None:
    """A late renewal finds its lease while nobody else was given the job: nothing is lost by a pause of the network."""
    _, (device, *_), (job, *_) = await small.training(make_plan())
    small.clock.advance(120)

    await device.renew(job)
    small.tick()

    await device.complete(job)


async def test_renewals_without_progress_do_not_save_a_job(federation: Federation) -> None:
    run, (stuck, moving, _), (job, moved, _) = await federation.training(make_plan(times=TIMES | {"no_progress": 100}))
    for step in (1, 2):
        await stuck.renew(job, step=7)
        await moving.renew(moved, step=step)
        federation.advance(50)

    view = await federation.admin.job(run, job)
    assert (view.state, view.reason) == (JobState.expired, "no progress for 100 s")
    assert (await federation.admin.job(run, moved)).state is JobState.leased


async def test_another_phase_is_progress(small: Federation) -> None:
    run, (device, *_), (job, *_) = await small.training(make_plan(times=TIMES | {"no_progress": 100}))
    for phase in ("download", "load", "train", "evaluate", "upload"):
        small.advance(50)
        await device.renew(job, phase=phase)

    assert (await small.admin.job(run, job)).state is JobState.leased


async def test_no_renewal_goes_beyond_the_jobs_deadline(small: Federation) -> None:
    run, (device, *_), (job, *_) = await small.training(make_plan(times=TIMES | {"job": 100, "lease": 60}))
    small.advance(50)
    assert (await device.renew(job, step=1)).remaining_seconds == 50

    small.advance(50)

    view = await small.admin.job(run, job)
    assert (view.state, view.reason) == (JobState.expired, "the job's deadline passed")


async def test_a_poll_does_not_put_the_deadline_off(small: Federation) -> None:
    _, (device, *_), _ = await small.training(make_plan(times=TIMES | {"job": 100, "lease": 60}))
    small.advance(30)

    assert (await device.take()).remaining_seconds == 70


async def test_a_job_that_nobody_picks_up_is_drawn_again_from_the_rest(federation: Federation) -> None:
    names = [f"device {number}" for number in range(1, 5)]
    devices = [await federation.enrol(name, make_profile(held_out=0)) for name in names]
    run = await federation.open(make_plan(times=TIMES | {"no_progress": 40}))
    chosen = {job.client_name for job in (await federation.admin.round(run, 1)).jobs}
    (left_out,) = set(names) - chosen
    taken = [device for device in devices if device.name in chosen][:2]
    jobs = [await device.take() for device in taken]

    federation.clock.advance(39)
    for device, job in zip(taken, jobs, strict=True):
        await device.renew(job, step=1)
    federation.advance(1)

    view = await federation.admin.round(run, 1)
    (released,) = [job for job in view.jobs if job.state is JobState.released]
    assert released.reason == "not picked up in time"
    assert (await next(device for device in devices if device.name == left_out).take()).round == 1
    assert view.cohort == 4


async def test_a_lost_client_that_is_back_takes_its_job_up_again(federation: Federation) -> None:
    run, (lost, *others), (job, *held) = await federation.training(make_plan())
    federation.clock.advance(60)
    for device, other in zip(others, held, strict=True):
        await device.renew(other, step=1)
    federation.tick()
    assert (await federation.admin.job(run, job)).state is JobState.expired

    federation.clock.advance(1)
    assert await lost.next_job() is None
    federation.tick()
    again = await lost.take()

    assert (again.id, again.lease.epoch) == (job.id, 2)
    with pytest.raises(errors.StaleLease):
        await lost.renew(job)
    await lost.complete(again)
    assert (await federation.admin.job(run, job)).state is JobState.submitted


async def test_a_slice_sent_before_the_lease_was_lost_still_counts_after(federation: Federation) -> None:
    run, (lost, *others), (job, *held) = await federation.training(make_plan())
    slice = (await lost.put_slice(job, await lost.trained(job))).digest
    federation.clock.advance(60)
    for device, other in zip(others, held, strict=True):
        await device.renew(other, step=1)
    federation.tick()
    federation.clock.advance(1)
    await lost.next_job()
    federation.tick()

    again = await lost.take()
    await lost.put_result(again, lost.result(again, slice))

    assert (await federation.admin.job(run, job)).state is JobState.submitted


async def test_a_job_given_back_is_drawn_again_at_once(federation: Federation) -> None:
    devices = await federation.enrol_many(4)
    run = await federation.open(make_plan(evaluation={"every": 0}))
    jobs = {device: job for device in devices if (job := await device.next_job()) is not None}
    (spare,) = set(devices) - set(jobs)
    drained, job = next(iter(jobs.items()))

    await drained.give_back(job, "the lid was closed")
    federation.tick()

    assert (await spare.take()).round == 1
    view = await federation.admin.job(run, job)
    assert (view.state, view.reason) == (JobState.released, "the lid was closed")
    assert await drained.next_job() is None


async def test_giving_back_twice_is_giving_back_once(federation: Federation) -> None:
    run, (device, *_), (job, *_) = await federation.training(make_plan())
    await device.give_back(job, "once")

    await device.give_back(job, "twice")

    assert (await federation.admin.job(run, job)).reason == "once"
    with pytest.raises(errors.JobOver, match="once"):
        await device.renew(job)


async def test_a_client_that_drained_may_come_back(small: Federation) -> None:
    _, (device, *_), (job, *_) = await small.training(make_plan())
    await device.give_back(job, "restarting")
    small.advance(10)
    assert await device.next_job() is None

    small.advance(1)

    assert (await device.take()).id == job.id


async def test_a_refused_run_is_not_offered_again_until_the_profile_changes(federation: Federation) -> None:
    run, (device, *_), (job, *_) = await federation.training(make_plan())

    await device.give_back(job, "its policy allows no such model", problem="policy-refusal")
    for _ in range(3):
        federation.advance(10)
        assert await device.next_job() is None

    federation.clock.advance(1)
    await device.put_profile(make_profile())
    federation.tick()
    view = await federation.admin.round(run, 1)
    assert [job.state for job in view.jobs].count(JobState.released) == 1
    # In this round its part is over; the next one asks it again.
    for other in federation.devices[1:]:
        await other.complete(await other.take())
    federation.tick()
    assert (await device.take()).round == 2


async def test_a_refusal_keeps_a_client_out_of_the_next_rounds(small: Federation) -> None:
    run, (device, *others), (job, *held) = await small.training(make_plan())
    await device.give_back(job, "not enough memory", problem="memory-refusal")
    for other, work in zip(others, held, strict=True):
        await other.complete(work)
    small.tick()

    assert (await small.admin.round(run, 1)).reason == "2 contributions, quorum 2, and nobody left to wait for"
    assert {job.client_name for job in (await small.admin.round(run, 2)).jobs} == {other.name for other in others}
    other_run = await small.open(make_plan(evaluation={"every": 0}))
    assert {job.client_name for job in (await small.admin.round(other_run, 1)).jobs} == {each.name for each in small.devices}


async def test_a_paused_clients_work_is_taken_from_it(federation: Federation) -> None:
    run, (device, *_), (job, *_) = await federation.training(make_plan())

    await federation.admin.change_client(device, state="paused")
    assert await device.next_job() is None
    federation.tick()

    view = await federation.admin.job(run, job)
    assert (view.state, view.reason) == (JobState.cancelled, "the client is paused")
    with pytest.raises(errors.JobOver, match="the client is paused"):
        await device.renew(job)


async def test_a_revoked_clients_work_is_taken_from_it_and_its_credential_is_void(federation: Federation) -> None:
    run, (device, *_), (job, *_) = await federation.training(make_plan())

    await federation.admin.change_client(device, state="revoked")
    with pytest.raises(errors.Unauthenticated):
        await device.renew(job)
    federation.tick()

    assert (await federation.admin.job(run, job)).reason == "the client is revoked"


async def test_an_evaluation_that_is_not_picked_up_ends_too(small: Federation) -> None:
    device, *_ = await small.enrol_many(3)
    run = await small.open(make_plan(times=TIMES | {"no_progress": 40}))
    await device.take(JobKind.evaluate)

    small.advance(40)

    states = [job.state for job in (await small.admin.round(run, 0)).jobs]
    assert sorted(states) == [JobState.expired, JobState.released, JobState.released]


@pytest.mark.parametrize("reason", ["", "x" * 2001])
async def test_a_reason_is_neither_empty_nor_endless(small: Federation, reason: str) -> None:
    _, (device, *_), (job, *_) = await small.training(make_plan())

    response = await device.call("DELETE", f"/v1/jobs/{job.id}/lease", json={"epoch": 1, "reason": reason})

    assert response.status_code == 422


async def test_a_reason_with_nul_is_kept_or_refused_but_never_a_defect(federation: Federation) -> None:
    run, (device, *_), (job, *_) = await federation.training(make_plan())

    response = await device.call("DELETE", f"/v1/jobs/{job.id}/lease", json={"epoch": 1, "reason": "no\0pe", "problem": "a\0b"})

    assert response.status_code in (204, 422)
    assert (await federation.admin.job(run, job)).state in (JobState.released, JobState.leased)


async def test_slices_are_read_in_ranges_and_known_by_their_digest(small: Federation) -> None:
    _, (device, *_), (job, *_) = await small.training(make_plan())
    whole, path = await device.blob(job.slice.digest), f"/v1/blobs/{job.slice.digest}"

    for wanted, expected in (
        ("bytes=0-9", whole[:10]),
        ("bytes=10-", whole[10:]),
        ("bytes=-5", whole[-5:]),
        ("bytes=10-999999999", whole[10:]),
    ):
        response = await device.call("GET", path, headers={"Range": wanted})
        assert (response.status_code, response.content) == (206, expected)
        start = len(whole) - len(expected) if wanted != "bytes=0-9" else 0
        assert response.headers["content-range"] == f"bytes {start}-{start + len(expected) - 1}/{len(whole)}"
    for passed_over in ("bytes=0-1,4-5", "rows=1-2", "bytes=-", "bytes", f"bytes=0-{len(whole) - 1}"):
        response = await device.call("GET", path, headers={"Range": passed_over})
        assert (response.status_code, response.content) == (200, whole)
    for outside in (f"bytes={len(whole)}-", "bytes=-0", "bytes=5-2"):
        response = await device.call("GET", path, headers={"Range": outside})
        assert response.status_code == 416

    response = await device.call("GET", path)
    assert response.headers["etag"] == f'"{job.slice.digest}"'
    assert "immutable" in response.headers["cache-control"]
    unchanged = await device.call("GET", path, headers={"If-None-Match": response.headers["etag"]})
    assert (unchanged.status_code, unchanged.content) == (304, b"")


@pytest.mark.parametrize("digest", ["sha256:x", "sha256:" + "A" * 64, "md5:" + "0" * 32, "..", "sha256:" + "0" * 63])
async def test_what_is_no_digest_names_no_blob(small: Federation, digest: str) -> None:
    device = await small.enrol("device")

    with pytest.raises((errors.InvalidRequest, errors.NotFound)):
        await device.blob(digest)
