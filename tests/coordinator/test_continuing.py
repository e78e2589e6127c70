"""Runs that continue an adapter which an earlier run published: made by its digest, refused where it is of something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coordinator.tables import Run
from protocol import errors, slices
from protocol.plan import Layout
from protocol.states import RunState
from protocol.views import Page, RunView
from tests.coordinator.test_directions import findings, sweep
from tests.coordinator.test_retention import give_up
from tests.federation import LAYOUT, Federation, make_plan

MODEL = make_plan().model.model_dump(mode="json")
OTHER = Layout(modules={**LAYOUT.modules, "attention.value": (8, 8)}, full=LAYOUT.full, base=LAYOUT.base)
HEADLESS = Layout(modules=LAYOUT.modules, base=LAYOUT.base)
QUIET: dict[str, Any] = {"evaluation": {"every": 0}}


async def learned(federation: Federation, **changes: Any) -> tuple[str, str]:
    """A finished run of three devices, and the digest of its last adapter."""
    await federation.enrol_many(3)
    run = (await federation.admin.create(make_plan(**QUIET | changes))).id
    await federation.play([run])
    adapter = (await federation.admin.round(run, 2)).adapter
    assert adapter is not None
    return run, adapter.digest


def product(federation: Federation, digest: str, module: str = "attention.query") -> torch.Tensor:
    found = slices.unpack(federation.parts.blobs.read(digest))
    factors = found.factors[module]
    return found.label.scale * (factors.b.double() @ factors.a.double())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"strategy": {"name": "folded", "options": {"momentum": 0.5}}, "cap": 6},
        {"strategy": {"name": "zero_pad"}, "wire": "bfloat16"},
        {"buffer": {"size": 2}, "rounds": 4},
    ],
)
async def test_a_run_goes_on_from_the_adapter_of_another_one(changes: dict[str, Any], small: Federation) -> None:
    _, digest = await learned(small)
    before = small.parts.blobs.read(digest)
    plan = make_plan(continues=digest, name="next", **QUIET | changes)
    run = await small.open(plan)
    assert give_up(small, 1) > 0  # nothing of the first run is needed any more but that adapter

    (view,) = await small.play([run])

    assert view.state is RunState.finished, view.reason
    rounds = [await small.admin.round(run, number) for number in range(view.rounds + 1)]
    wanted = product(small, digest)
    first = rounds[0].adapter
    assert first is not None
    assert torch.allclose(product(small, first.digest), wanted, rtol=0, atol=1e-6 * float(wanted.norm()))
    assert rounds[0].energy["attention.query"].total == pytest.approx(float(wanted.square().sum()), rel=1e-6)
    head = slices.unpack(before).full["head.weight"]
    assert torch.equal(slices.unpack(small.parts.blobs.read(first.digest)).full["head.weight"], head.to(torch.float32))
    last = rounds[-1].adapter
    assert last is not None
    assert not torch.equal(product(small, last.digest), wanted)
    assert set(findings(small, run)) == {"agrees"}
    assert digest in sweep(small)


async def test_another_run_that_continues_is_told_from_one_that_does_not(small: Federation) -> None:
    _, digest = await learned(small)
    await small.admin.create(make_plan(), key="monday")
    with pytest.raises(errors.KeyReused):
        await small.admin.create(make_plan(continues=digest), key="monday")
    made = await small.admin.create(make_plan(continues=digest), key="tuesday")
    assert (await small.admin.create(make_plan(continues=digest), key="tuesday")).id == made.id
    assert made.plan.continues == digest


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"continues": f"sha256:{1:064}"}, "no round of this coordinator has published the adapter"),
        ({"model": MODEL | {"fingerprint": f"sha256:{1:064}"}}, r"of run run-\w+, whose model are others"),
        ({"layout": OTHER.model_dump(mode="json")}, "whose adapted modules are others"),
        ({"layout": HEADLESS.model_dump(mode="json")}, "whose tensors kept whole are others"),
        ({"task": {"kind": "sequence-classification", "labels": ["yes", "no"]}}, "whose labels are others"),
        ({"task": {"kind": "causal-lm"}}, "whose labels are others"),
        ({"strategy": {"name": "ffa"}}, "strategy ffa trains b on rows of a that only its seed decides"),
    ],
)
async def test_what_it_cannot_continue_is_refused(changes: dict[str, Any], why: str, small: Federation) -> None:
    run, digest = await learned(small)
    with pytest.raises(errors.InvalidPlan, match=why):
        await small.admin.create(make_plan(**{"continues": digest} | changes))
    assert [view.id for view in (await small.admin.get("/v1/runs", Page[RunView])).items] == [run]


async def test_of_two_runs_that_published_the_same_bytes_it_may_continue_either(small: Federation) -> None:
    """Round 0 follows from seed and layout: labels are no part of it."""
    tasks = [{"kind": "sequence-classification", "labels": labels} for labels in (["no", "yes"], ["nay", "aye"])]
    runs = [await small.open(make_plan(task=task)) for task in tasks]
    adapters = [(await small.admin.round(run, 0)).adapter for run in runs]
    assert adapters[0] is not None
    assert adapters[0] == adapters[1]
    for task in tasks:
        assert (await small.admin.create(make_plan(continues=adapters[0].digest, task=task))).plan.continues == adapters[0].digest


async def test_a_key_finds_its_run_though_an_older_version_wrote_it_down(small: Federation) -> None:
    """Its plan lacked an option, and so its digest was another."""
    made = await small.admin.create(make_plan(), key="monday")
    with small.parts.database.write() as session:
        run = session.get_one(Run, made.id)
        run.plan = {name: value for name, value in run.plan.items() if name != "continues"}
        run.plan_digest = f"sha256:{7:064}"
    assert (await small.admin.create(make_plan(), key="monday")).id == made.id
    with pytest.raises(errors.KeyReused):
        await small.admin.create(make_plan(seed=1), key="monday")


async def test_a_slice_is_no_adapter(small: Federation) -> None:
    run, _ = await learned(small)
    slice = (await small.admin.round(run, 2)).slices[2].digest
    with pytest.raises(errors.InvalidPlan, match="has published the adapter"):
        await small.admin.create(make_plan(continues=slice))


async def test_a_plan_whose_wire_cannot_carry_it_fails_with_a_reason(small: Federation) -> None:
    """Numbers that float32 holds and float16 does not: the run fails at once, before anybody trains."""
    _, digest = await learned(
        small, strategy={"name": "delta", "options": {"step": 10.0}}, adapter={"modules": ["key", "query"], "alpha": 1e4}
    )
    plan = make_plan(continues=digest, wire="float16", adapter={"modules": ["key", "query"], "alpha": 1e-4, "split": "left"}, **QUIET)
    run = (await small.admin.create(plan)).id
    for _ in range(5):
        small.tick()
    view = await small.admin.run(run)
    assert view.state is RunState.failed
    assert "start a run whose wire is bfloat16 or float32" in str(view.reason)
