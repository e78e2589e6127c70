"""Slices that cannot count: each is refused with its own problem, costs its client the job, and nobody else anything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import problems
from protocol import contents, errors, slices
from protocol.checks import Expected, check_header
from protocol.contents import Label
from protocol.plan import Dtype
from protocol.slices import Factors
from protocol.states import ClientState, JobState, RoundState, RunState
from tests.coordinator.hostile import MALFORMED, NON_FINITE, Lie, Parts, grown, lies, of_rank, pack, raw
from tests.federation import LAYOUT, Federation, make_plan, moved

BASE = f"sha256:{1:064}"
LABEL = Label(rank=4, scale=2.0, round=1, base=BASE, examples=5)
HONEST = contents.head(LAYOUT, LABEL, Dtype.float32)
HONEST += bytes(4 * LAYOUT.numbers(4))
EXPECTED = Expected(layout=LAYOUT, rank=4, scale=2.0, dtype=Dtype.float32, base=BASE, round=1)


async def check_refused(federation: Federation, kind: type[errors.InvalidSlice], lie: Lie) -> None:
    """The lie is answered with its problem; the job is over, the client has a mark against it."""
    run, (liar, *_), (job, *_) = await federation.training(make_plan())
    honest = await liar.trained(job)

    with pytest.raises(kind) as caught:
        await liar.put_slice(job, lie(Parts.of(honest)))

    assert type(caught.value) is kind
    view = await federation.admin.job(run, job)
    assert (view.state, view.reason, view.slice) == (JobState.rejected, str(caught.value), None)
    assert (await federation.admin.client(liar)).rejections == 1
    with pytest.raises(errors.JobOver):
        await liar.put_slice(job, honest)


@pytest.mark.parametrize(("kind", "lie"), [pytest.param(kind, lie, id=what) for what, kind, lie in lies()])
async def test_a_slice_that_lies_is_refused_and_its_job_is_over(small: Federation, kind: type[errors.InvalidSlice], lie: Lie) -> None:
    await check_refused(small, kind, lie)


@pytest.mark.parametrize("what", [what for what in MALFORMED if "name" in what or "character" in what or what == "nothing"])
async def test_what_a_database_could_not_store_is_refused_by_either(federation: Federation, what: str) -> None:
    await check_refused(federation, errors.MalformedSlice, MALFORMED[what])


@pytest.mark.parametrize("what", NON_FINITE)
async def test_a_slice_with_a_number_that_is_none_is_refused(small: Federation, what: str) -> None:
    run, (device, *_), (job, *_) = await small.training(make_plan())
    start = moved(slices.unpack(await device.blob(job.slice.digest)), job)

    with pytest.raises(errors.NonFiniteSlice) as caught:
        await device.put_slice(job, NON_FINITE[what](start, job))

    assert str(caught.value.facts["tensor"]) in str(caught.value)
    assert (await small.admin.job(run, job)).state is JobState.rejected


@pytest.mark.parametrize("rank", [1, 2, 3])
async def test_a_slice_of_another_rank_is_refused_never_broadcast(small: Federation, rank: int) -> None:
    _, (device, *_), (job, *_) = await small.training(make_plan())
    start = moved(slices.unpack(await device.blob(job.slice.digest)), job)

    with pytest.raises(errors.MismatchedSlice, match=f"rank is {rank}; the job's is 4"):
        await device.put_slice(job, slices.pack(of_rank(start, rank), job.layout, job.wire))


@pytest.mark.parametrize("dtype", [Dtype.bfloat16, Dtype.float16])
async def test_a_slice_in_another_dtype_is_refused(small: Federation, dtype: Dtype) -> None:
    _, (device, *_), (job, *_) = await small.training(make_plan())
    start = moved(slices.unpack(await device.blob(job.slice.digest)), job)

    with pytest.raises(errors.MismatchedSlice, match="F32 was expected"):
        await device.put_slice(job, slices.pack(start, job.layout, dtype))


async def test_bad_clients_are_paused_after_three_and_the_good_ones_finish_undelayed(federation: Federation) -> None:
    """The first to answer is always the bad one; every round is there at the moment that the good ones are done."""
    bad, *good = await federation.enrol_many(4)
    run = await federation.open(make_plan(rounds=4, cohort={"target": 4, "quorum": 3}, evaluation={"every": 0}))
    for number in range(1, 5):
        job = await bad.next_job()
        if job is not None:
            with pytest.raises(errors.MalformedSlice):
                await bad.put_slice(job, b"nonsense")
        for device in good:
            await device.complete(await device.take())
        federation.tick()
        assert (await federation.admin.round(run, number)).state is RoundState.published

    view = await federation.admin.client(bad)
    assert (view.state, view.rejections) == (ClientState.paused, 3)
    assert str(view.reason).startswith("3 contributions in a row were rejected, the last because ")
    assert (await federation.admin.run(run)).state is RunState.finished
    assert (await federation.admin.round(run, 4)).cohort == 3

    await federation.admin.change_client(bad, state="active")
    assert (await federation.admin.client(bad)).rejections == 0


async def test_a_good_contribution_ends_the_row_of_bad_ones(small: Federation) -> None:
    unsteady, *others = await small.enrol_many(3)
    run = await small.open(make_plan(rounds=5, evaluation={"every": 0}))
    for number in range(1, 6):
        job = await unsteady.take()
        if number == 3:
            await unsteady.complete(job)
        else:
            with pytest.raises(errors.MalformedSlice):
                await unsteady.put_slice(job, b"nonsense")
        for device in others:
            await device.complete(await device.take())
        small.tick()

    assert (await small.admin.run(run)).state is RunState.finished
    view = await small.admin.client(unsteady)
    assert (view.state, view.rejections) == (ClientState.active, 2)


async def test_somebody_else_is_drawn_for_a_job_that_was_rejected(federation: Federation) -> None:
    devices = await federation.enrol_many(4)
    await federation.open(make_plan(evaluation={"every": 0}))
    jobs = {device: job for device in devices if (job := await device.next_job()) is not None}
    (spare,) = set(devices) - set(jobs)
    liar = next(iter(jobs))

    with pytest.raises(errors.MalformedSlice):
        await liar.put_slice(jobs[liar], b"nonsense")
    federation.tick()

    assert (await spare.take()).round == 1
    assert await liar.next_job() is None


# --- changes that are too large -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["delta", "hlora"])
@pytest.mark.parametrize("wire", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", [1e2, 6e4, 1e10, 1e19, 3e38])
async def test_no_size_of_a_change_keeps_a_round_of_others_from_being_published(
    small: Federation, strategy: str, wire: str, size: float
) -> None:
    """What arithmetic cannot hold is refused at the door: behind it, it would fail the merge, and with it the run."""
    run, (giant, *others), (job, *held) = await small.training(make_plan(strategy={"name": strategy}, wire=wire, rounds=1))
    start = grown(moved(slices.unpack(await giant.blob(job.slice.digest)), job), size)

    try:
        slice = (await giant.put_slice(job, slices.pack(start, job.layout, job.wire))).digest
        await giant.put_result(job, giant.result(job, slice))
    except (errors.ExcessiveChange, errors.NonFiniteSlice):
        assert (await small.admin.job(run, job)).state is JobState.rejected
    for device, work in zip(others, held, strict=True):
        await device.complete(work)
    small.tick()

    assert (await small.admin.run(run)).state is RunState.finished


async def test_a_change_that_no_slice_could_hold_is_refused(small: Federation) -> None:
    run, (device, *_), (job, *_) = await small.training(make_plan(wire="float16"))
    given = slices.unpack(await device.blob(job.slice.digest))
    start = replace(grown(given, 6e4), full=given.full)

    with pytest.raises(errors.ExcessiveChange, match="slices in float16 can hold 65504"):
        await device.put_slice(job, slices.pack(moved(start, job, size=0), job.layout, job.wire))

    assert (await small.admin.job(run, job)).state is JobState.rejected


@pytest.mark.parametrize("strategy", ["delta", "hlora", "folded", "flora"])
async def test_directions_that_cancel_are_refused_however_little_they_add_up_to(small: Federation, strategy: str) -> None:
    """Their sum may be nothing, and so is its norm; in a mean they would drown everybody else's in their rounding."""
    run, (device, *_), (job, *_) = await small.training(make_plan(strategy={"name": strategy}))
    start = moved(slices.unpack(await device.blob(job.slice.digest)), job)
    factors = {}
    for name, (n_out, n_in) in job.layout.modules.items():
        v, u, beside = torch.full((n_out,), 1e4), torch.full((n_in,), 1e4), job.rank - 2
        b, a = torch.stack([v, v, *[torch.zeros(n_out)] * beside], dim=1), torch.stack([u, -u, *[torch.zeros(n_in)] * beside])
        factors[name] = Factors(b=b, a=a)

    with pytest.raises(errors.ExcessiveChange, match="cancel each other"):
        await device.put_slice(job, slices.pack(replace(of_rank(start, job.rank), factors=factors), job.layout, job.wire))

    assert (await small.admin.job(run, job)).state is JobState.rejected


async def test_a_change_beyond_the_plans_bound_is_rejected_where_the_plan_says_so(small: Federation) -> None:
    run, (device, *_), (job, *_) = await small.training(make_plan(norm={"bound": 0.01, "action": "reject"}))

    with pytest.raises(errors.ExcessiveChange) as caught:
        await device.put_slice(job, await device.trained(job))

    assert caught.value.facts["bound"] == 0.01
    assert isinstance(norm := caught.value.facts["norm"], float)
    assert norm > 0.01
    assert (await small.admin.job(run, job)).state is JobState.rejected


async def test_a_change_within_the_bound_counts_whole(small: Federation) -> None:
    run, (device, *_), (job, *_) = await small.training(make_plan(norm={"bound": 1000, "action": "reject"}))

    await device.complete(job)

    assert (await small.admin.job(run, job)).state is JobState.submitted


@pytest.mark.parametrize("strategy", ["delta", "hlora"])
async def test_a_change_beyond_the_plans_bound_is_clipped_to_it(small: Federation, strategy: str) -> None:
    """Round 1 starts from W = 0 and has one contribution, so that ‖W₁‖² and its head's change are the clipped norm's square itself."""
    plan = make_plan(strategy={"name": strategy}, norm={"bound": 0.01}, cohort={"target": 1, "quorum": 1}, rounds=1)
    run, (device,), (job,) = await small.training(plan, count=1)
    started = slices.unpack(await device.blob(job.slice.digest)).full

    await device.complete(job)
    small.tick()

    view = await small.admin.round(run, 1)
    assert view.adapter is not None
    assert view.jobs[0].change_norm is not None
    assert view.jobs[0].change_norm > 0.01
    published = slices.unpack(small.parts.blobs.read(view.adapter.digest)).full
    head = sum(float((published[name] - tensor).double().square().sum()) for name, tensor in started.items())
    modules = sum(energy.total for energy in view.energy.values())
    assert (modules + head) ** 0.5 == pytest.approx(0.01, rel=1e-4)
    assert head > 0


# --- mutations ----------------------------------------------------------------------------------------------------------


def look(data: bytes) -> None:
    """All that is done with a header that nobody has checked: it is sound, or refused with a reason that can be told."""
    said = "sound"
    try:
        check_header(contents.read_header(data, len(data)), EXPECTED)
    except errors.InvalidSlice as error:
        said = problems.problem(error).model_dump_json()
    assert said.isprintable()
    assert len(said) < 10_000


def test_the_honest_slice_passes() -> None:
    check_header(contents.read_header(HONEST, len(HONEST)), EXPECTED)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_bytes_changed_anywhere_in_the_header_are_refused_or_mean_the_same(data: st.DataObject) -> None:
    size = 8 + int.from_bytes(HONEST[:8], "little")
    changed = bytearray(HONEST)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, size - 1))
        changed[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    look(bytes(changed))


NUMBERS = st.sampled_from([-1, 0, 1, 4, 15, 60, 240, 2**31, 2**40, 2**63, 10**30, True, 0.5, 1e308, float("nan"), float("inf")])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5) | st.sampled_from(["F32", "F16", "BF16", "I64", "\ud800", "\0"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=4)
    ),
    max_leaves=6,
)


@given(name=st.sampled_from([*contents.names(LAYOUT, 4), "__metadata__", "more", "\0", ""]), value=VALUES)
@settings(max_examples=200, deadline=None)
def test_any_value_for_an_entry_is_refused_or_means_the_same(name: str, value: Any) -> None:
    parts = Parts.of(HONEST)
    look(pack(parts.table | {name: value}, parts.numbers))


@given(member=st.sampled_from(["dtype", "shape", "data_offsets"]), name=st.sampled_from(list(contents.names(LAYOUT, 4))), value=VALUES)
@settings(max_examples=200, deadline=None)
def test_any_value_for_a_member_is_refused_or_means_the_same(member: str, name: str, value: Any) -> None:
    look(Parts.of(HONEST).entry(name, **{member: value}))


@given(member=st.sampled_from(["rank", "scale", "round", "base", "examples", "more"]), value=VALUES)
@settings(max_examples=100, deadline=None)
def test_any_value_in_the_label_is_refused_or_means_the_same(member: str, value: Any) -> None:
    look(Parts.of(HONEST).label(**{member: value}))


@given(text=st.binary(max_size=60), numbers=st.binary(max_size=20))
@settings(max_examples=200, deadline=None)
def test_any_bytes_at_all_are_refused(text: bytes, numbers: bytes) -> None:
    for data in (text, raw(text, numbers)):
        with pytest.raises(errors.InvalidSlice):
            check_header(contents.read_header(data, len(data)), EXPECTED)
