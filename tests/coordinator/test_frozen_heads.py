"""Plans whose head stays as it was first made: in every file that is handed out, and in none that comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coordinator import sizes
from protocol import errors, slices
from protocol.compact import trained_parts
from protocol.plan import Plan
from protocol.states import RunState
from tests.coordinator.test_directions import findings
from tests.federation import LAYOUT, Federation, make_plan, moved

HEAD = {f"full/{name}" for name in LAYOUT.full}


def frozen(**changes: Any) -> Plan:
    return make_plan(**{"adapter": {"modules": ["key", "query"], "head": "frozen"}, "evaluation": {"every": 0}} | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": {"name": "hlora"}},
        {"strategy": {"name": "rotating"}, "uploads": "int8", "cap": 6},
        {"wire": "bfloat16"},
        {"buffer": {"size": 2}, "rounds": 4},
    ],
)
async def test_every_round_hands_out_the_head_of_the_first_and_no_contribution_holds_it(changes: dict[str, Any], small: Federation) -> None:
    await small.enrol_many(3)
    run = await small.open(frozen(**changes))
    (view,) = await small.play([run])
    assert view.state is RunState.finished, view.reason

    rounds = [await small.admin.round(run, number) for number in range(view.rounds + 1)]
    read = small.parts.blobs.read
    given = {ref.digest for round in rounds for ref in (round.adapter, *round.slices.values()) if ref is not None}
    given |= {input.base for round in rounds if round.manifest is not None for input in round.manifest.inputs}
    heads = [slices.unpack(read(digest)).full for digest in given]
    assert len(heads) > len(rounds)
    for name, first in heads[0].items():
        assert all(torch.equal(head[name].float(), first.float()) for head in heads)
    assert heads[0]["head.weight"].float().std() > 0
    sent = [job.slice.digest for round in rounds for job in round.jobs if job.slice is not None]
    assert sent
    assert not any(name.encode() in read(digest) for digest in sent for name in HEAD)
    assert set(findings(small, run)) == {"agrees"}


async def test_the_same_seed_makes_the_same_head_as_where_it_is_trained_and_another_seed_another(small: Federation) -> None:
    found = []
    for plan in (frozen(), make_plan(), frozen(seed=1)):
        run = await small.open(plan)
        adapter = (await small.admin.round(run, 0)).adapter
        assert adapter is not None
        found.append(slices.unpack(small.parts.blobs.read(adapter.digest)).full["head.weight"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


async def test_a_head_that_comes_back_all_the_same_is_refused(small: Federation) -> None:
    _, (device, *_), (job, *_) = await small.training(frozen())
    start = slices.unpack(await device.blob(job.slice.digest))
    with pytest.raises(errors.MismatchedSlice, match="2 are not the job's"):
        await device.put_slice(job, b"".join(trained_parts(moved(start, job), start, job.layout, job.upload)))


async def test_a_frozen_head_counts_as_handed_out_and_not_as_sent_back(small: Federation) -> None:
    head = LAYOUT.numbers(0)
    plain, still = make_plan(evaluation={"every": 0}), frozen(name="still")
    assert sizes.trained_numbers(plain, 4) - sizes.trained_numbers(still, 4) == head
    assert sizes.upload_bytes(plain, 4) - sizes.upload_bytes(still, 4) > 4 * head
    assert sizes.held_numbers(plain, 4) == sizes.held_numbers(still, 4)
    (device, *_) = await small.enrol_many(3)
    jobs = []
    for plan in (plain, still):
        await small.open(plan)
        jobs.append(await device.take())
        await device.complete(jobs[-1])
    assert jobs[0].slice.bytes == jobs[1].slice.bytes
    assert jobs[0].max_upload_bytes - jobs[1].max_upload_bytes > 4 * head
