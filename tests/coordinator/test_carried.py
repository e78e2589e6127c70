"""Some clients start from the whole adapter and some, in the same round, from their slice: over HTTP, to the verified round."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coordinator import sizes
from protocol import slices
from protocol.contents import HEADER_SLACK
from protocol.messages import Job
from protocol.plan import Plan
from protocol.slices import Slice
from protocol.states import RunState
from tests.coordinator.test_directions import CAP, findings, plan_of, sweep
from tests.federation import Device, Federation, make_plan, make_profile

RANKS = {"name": "labels", "ladder": [2, 4], "options": {"label": "class", "table": {"small": 2}, "default": 4}}
MODULE = "attention.query"


async def enrol(federation: Federation, plan: Plan) -> None:
    """One whose owner allows the bytes of rank 2 alone, and two without limits."""
    most = sizes.start_bytes(plan, 2) + sizes.upload_bytes(plan, 2) + HEADER_SLACK
    await federation.enrol("device 1", make_profile(train=10, limits={"max_bytes": most}), labels={"class": "small"})
    await federation.enrol("device 2", make_profile(train=20), labels={"class": "small"})
    await federation.enrol("device 3", make_profile(train=30), labels={"class": "large"})


def change(job: Job, start: Slice, trained: Slice) -> torch.Tensor:
    """s (b a − b₀ a₀) over the trained directions."""
    new, old = trained.factors[MODULE], start.factors[MODULE].of(job.directions)
    return job.scale * (new.b.double() @ new.a.double() - old.b.double() @ old.a.double())


def adapter(federation: Federation, digest: str) -> torch.Tensor:
    factors = slices.unpack(federation.parts.blobs.read(digest)).factors[MODULE]
    return factors.b.double() @ factors.a.double()


async def told(device: Device) -> tuple[Job, Slice]:
    job = await device.take()
    return job, slices.unpack(await device.blob(job.slice.digest))


async def test_each_starts_from_what_it_carries_and_the_sum_is_that_of_the_changes(federation: Federation) -> None:
    plan = make_plan(strategy={"name": "folded"}, cap=CAP, evaluation={"every": 0}, ranks=RANKS)
    await enrol(federation, plan)
    run = await federation.open(plan)
    for number in (1, 2):
        before = await federation.admin.round(run, number - 1)
        given = [await told(device) for device in federation.devices]
        assert [(job.directions, start.label.rank) for job, start in given] == [(None, 2), ([0, 1], CAP), ([0, 1, 2, 3], CAP)]
        assert given[0][0].slice == before.slices[2]
        assert "starts from its slice" in given[0][0].rank_reason

        assert before.adapter is not None
        expected = adapter(federation, before.adapter.digest)
        for (job, start), rows, device in zip(given, (10, 20, 30), federation.devices, strict=True):
            trained = slices.unpack(await device.trained(job))
            expected += rows / 60 * change(job, start, trained)
            await device.complete(job, examples=rows)
        federation.tick()
        after = (await federation.admin.round(run, number)).adapter
        assert after is not None
        u, s, v = torch.linalg.svd(expected)
        best = (u[:, :CAP] * s[:CAP]) @ v[:CAP]
        assert torch.allclose(adapter(federation, after.digest), best, atol=1e-5)


async def test_both_ways_of_starting_go_with_momentum_weights_by_direction_and_sweeping(small: Federation) -> None:
    plan = plan_of("folded", ranks=RANKS, rounds=3, norm={"bound": 1.0}, wire="bfloat16", uploads="int8")
    await enrol(small, plan)
    run = (await small.admin.create(plan)).id
    while (await small.admin.run(run)).state is RunState.running:
        for device in small.devices:
            small.tick()
            sweep(small)
            if (job := await device.next_job()) is not None:
                await device.complete(job)
    assert (await small.admin.run(run)).state is RunState.finished
    assert set(findings(small, run)) == {"agrees"}


@pytest.mark.parametrize("buffer", [None, {"size": 1, "exponent": 0.5}])
async def test_a_client_may_change_between_the_two(small: Federation, buffer: dict[str, Any] | None) -> None:
    """Its owner takes the limit back in the middle of a run."""
    plan = plan_of("folded", ranks=RANKS, rounds=4, buffer=buffer)
    await enrol(small, plan)
    run = await small.open(plan)
    first = small.devices[0]
    begun = await first.take()
    assert begun.directions is None
    await first.put_profile(make_profile(train=10))
    await first.complete(begun)
    seen = []
    for _ in range(20):
        for device in small.devices:
            if (job := await device.next_job()) is not None:
                seen.append((device.name, job.directions))
                await device.complete(job)
        small.tick()
    assert (await small.admin.run(run)).state is RunState.finished
    assert ("device 1", [0, 1]) in seen
    assert set(findings(small, run)) == {"agrees"}
