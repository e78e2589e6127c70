"""Heads that cannot count: a tensor kept whole is bounded as factors are, by what slices can hold and by what the plan says of changes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protocol import errors, slices
from protocol.compact import trained_parts
from protocol.messages import Job
from protocol.states import JobState, RunState
from tests.federation import Device, Federation, make_plan, moved


async def head_moved(device: Device, job: Job, amount: float) -> bytes:
    """A slice of which every number of the head was moved so far, and the factors as little as in any other."""
    start = slices.unpack(await device.blob(job.slice.digest))
    found = moved(start, job, size=1e-3)
    head = {name: (tensor.double() + amount).float() for name, tensor in start.full.items()}
    return b"".join(trained_parts(replace(found, full=head), start, job.trained, job.upload, directions=job.directions, sides=job.sides))


@pytest.mark.parametrize(
    ("wire", "uploads", "size"), [("float16", "float32", 1e6), ("float16", "int8", -1e6), ("bfloat16", "float32", 3.4e38)]
)
async def test_a_head_that_no_slice_could_hold_is_refused_and_the_others_are_the_round(
    small: Federation, wire: str, uploads: str, size: float
) -> None:
    """A mean with it could not be handed out: the run would fail, and again whenever it was resumed."""
    plan = make_plan(wire=wire, uploads=uploads, rounds=1)
    run, (giant, *others), (job, *held) = await small.training(plan)

    with pytest.raises(errors.ExcessiveChange, match=rf"full/head\.bias holds a number of size .*; slices in {wire} can hold"):
        await giant.put_slice(job, await head_moved(giant, job, size))

    assert (await small.admin.job(run, job)).state is JobState.rejected
    assert (await small.admin.client(giant)).rejections == 1
    for device, work in zip(others, held, strict=True):
        await device.complete(work)
    small.tick()
    assert (await small.admin.run(run)).state is RunState.finished


async def test_a_heads_change_counts_in_the_plans_bound(small: Federation) -> None:
    run, (bold, mild, *_), (job, other, *_) = await small.training(make_plan(norm={"bound": 1, "action": "reject"}))

    with pytest.raises(errors.ExcessiveChange) as caught:
        await bold.put_slice(job, await head_moved(bold, job, 1e30))
    await mild.put_slice(other, await head_moved(mild, other, 0.1))

    assert caught.value.facts["norm"] == pytest.approx(10**0.5 * 1e30)  # two numbers of a bias and eight of a matrix
    assert (await small.admin.job(run, job)).state is JobState.rejected
    assert (await small.admin.job(run, other)).change_norm == pytest.approx(10**0.5 * 0.1, rel=0.01)


async def test_a_head_far_from_the_others_is_suspicious(small: Federation) -> None:
    run, devices, jobs = await small.training(make_plan(suspicious=3.0, rounds=1))
    for device, job, amount in zip(devices, jobs, (0.1, 100.0, 0.1), strict=True):
        slice = (await device.put_slice(job, await head_moved(device, job, amount))).digest
        await device.put_result(job, device.result(job, slice))

    small.tick()

    found = [(await small.admin.job(run, job)).state for job in jobs]
    assert found == [JobState.accepted, JobState.rejected, JobState.accepted]
