"""A plan whose trained slices travel as int8: what comes is read as what was changed, and nothing of it is believed."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.loop import Step
from protocol import contents, errors, slices
from protocol.checks import check_header
from protocol.compact import trained_parts
from protocol.contents import SCALES
from protocol.messages import Job
from protocol.plan import Dtype
from protocol.states import JobState, RunState
from tests.agent.looping import ALONE, instantly, looping
from tests.coordinator.hostile import FIRST, Parts, without
from tests.coordinator.hostile import pack as packed
from tests.coordinator.test_hostile_slices import EXPECTED, LABEL
from tests.federation import LAYOUT, Federation, make_plan, moved

PLAN = make_plan(uploads="int8")
INT8 = {"uploads": "int8"}


def changed(data: bytes, name: str, numbers: bytes, at: int = 0) -> bytes:
    """The file with some of a tensor's numbers replaced."""
    start = contents.read_header(data, len(data)).entries[name].start + at
    return data[:start] + numbers + data[start + len(numbers) :]


def scaled(value: float, name: str = FIRST) -> Callable[[bytes], bytes]:
    return lambda data: changed(data, name + SCALES, struct.pack("<f", value))


def unscaled(data: bytes) -> bytes:
    """The file without the last tensor, which holds scales."""
    parts = Parts.of(data)
    *_, last = parts.table
    assert last.endswith(SCALES)
    start, stop = parts.table[last]["data_offsets"]
    return packed(without(parts.table, last), parts.numbers[: start - stop])


HOSTILE: dict[str, tuple[type[errors.InvalidSlice], Callable[[bytes], bytes]]] = {
    "a scale that is no number": (errors.NonFiniteSlice, scaled(math.nan)),
    "a scale without end": (errors.NonFiniteSlice, scaled(math.inf)),
    "a scale in the head that is no number": (errors.NonFiniteSlice, scaled(math.nan, "full/head.weight")),
    "a scale below zero": (errors.MismatchedSlice, scaled(-0.1)),
    "minus zero of a subnormal": (errors.MismatchedSlice, scaled(-1e-45)),
    "a step of -128": (errors.MismatchedSlice, lambda data: changed(data, FIRST, b"\x80", at=7)),
    "a step of -128 in the head": (errors.MismatchedSlice, lambda data: changed(data, "full/head.bias", b"\x80")),
    "scales whose products have no end": (errors.NonFiniteSlice, lambda data: changed(scaled(3e38)(data), FIRST, b"\x7f")),
    "scales whose products nothing holds": (errors.ExcessiveChange, lambda data: changed(scaled(2e36)(data), FIRST, b"\x7f")),
    "scales that are missing": (errors.MismatchedSlice, unscaled),
    "scales in half precision": (
        errors.MalformedSlice,
        lambda data: Parts.of(data).entry(FIRST + SCALES, dtype="F16"),
    ),
    "one scale for all": (errors.MalformedSlice, lambda data: Parts.of(data).entry(FIRST + SCALES, shape=[1])),
    "scales in a column": (errors.MismatchedSlice, lambda data: Parts.of(data).entry(FIRST + SCALES, shape=[4, 1])),
}


@pytest.mark.parametrize("what", HOSTILE)
async def test_what_no_agent_writes_is_refused(small: Federation, what: str) -> None:
    kind, lie = HOSTILE[what]
    run, (device, *_), (job, *_) = await small.training(PLAN)

    with pytest.raises(kind) as caught:
        await device.put_slice(job, lie(await device.trained(job)))

    assert type(caught.value) is kind
    view = await small.admin.job(run, job)
    assert (view.state, view.reason) == (JobState.rejected, str(caught.value))


@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16])
async def test_another_dtype_than_the_plans_is_refused(small: Federation, dtype: Dtype) -> None:
    _, (device, *_), (job, *_) = await small.training(PLAN)
    start = slices.unpack(await device.blob(job.slice.digest))

    with pytest.raises(errors.InvalidSlice):
        await device.put_slice(job, slices.pack(moved(start, job), job.layout, dtype))


@given(place=st.integers(0, 10**6), byte=st.binary(min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_a_header_of_int8_is_as_exact_as_any(place: int, byte: bytes) -> None:
    honest = contents.head(LAYOUT, LABEL, Dtype.int8)
    honest += bytes(contents.body_length(LAYOUT, 4, Dtype.int8))
    expected = replace(EXPECTED, dtype=Dtype.int8)
    check_header(contents.read_header(honest, len(honest)), expected)
    size = 8 + int.from_bytes(honest[:8], "little")
    at = place % size
    data = honest[:at] + byte + honest[at + len(byte) :]
    said = ""
    try:
        check_header(contents.read_header(data, len(data)), expected)
    except errors.InvalidSlice as error:
        said = str(error)
    assert said.isprintable()


async def test_a_run_sends_a_quarter_of_the_bytes_and_comes_to_the_same(federation: Federation) -> None:
    """The second run's clients train the same change; its adapter differs by what int8 rounds, and no more."""
    wide = make_plan(layout=LAYOUT.model_dump() | {"modules": {"attention.key": (1300, 1500), "attention.query": (1200, 1600)}})
    up, adapters = [], []
    await federation.enrol_many(3)
    for uploads in ("float32", "int8"):
        plan = wide.model_copy(
            update={"uploads": Dtype(uploads), "rounds": 1, "evaluation": wide.evaluation.model_copy(update={"every": 0})}
        )
        run = await federation.open(plan)
        (view,) = await federation.play([run])
        assert view.state is RunState.finished
        found = await federation.admin.round(run, 1)
        assert found.adapter is not None
        assert found.bytes_up == view.bytes_up == sum(job.slice.bytes for job in found.jobs if job.slice)
        up.append(found.bytes_up)
        adapters.append(slices.unpack(federation.parts.blobs.read(found.adapter.digest)))
    assert 3.6 < up[0] / up[1] < 4  # headers and scales are the rest
    for module in wide.layout.modules if wide.layout else ():
        exact, rounded = ((a.factors[module].b.double() @ a.factors[module].a.double()) for a in adapters)
        assert 0 < (rounded - exact).norm() / exact.norm() < 0.05


async def test_a_job_says_how_its_slice_comes_back_and_how_long_it_may_be(small: Federation) -> None:
    _, _, (job, *_) = await small.training(PLAN)

    assert (job.wire, job.uploads, job.upload) == (Dtype.float32, Dtype.int8, Dtype.int8)
    assert job.max_upload_bytes == contents.largest_length(LAYOUT, 4, Dtype.int8) < contents.largest_length(LAYOUT, 4, Dtype.float32)


async def test_an_agent_packs_what_the_plan_says_and_tells_what_was_rounded(small: Federation, tmp_path: Path) -> None:
    device = await small.enrol("device")
    run = await small.open(make_plan(**ALONE, **INT8))

    async with looping(small, device, instantly, tmp_path) as loop:
        assert await loop.step() is Step.done
    small.tick()

    found = await small.admin.round(run, 1)
    (job,) = found.jobs
    assert job.slice is not None
    header = contents.read_header(data := small.parts.blobs.read(job.slice.digest), len(data))
    assert header.entries[FIRST].dtype == "I8"
    assert 0 < found.train_metrics["rounding"] < 0.02


async def test_heads_and_factors_are_merged_as_they_were_sent(small: Federation) -> None:
    """One client, and the change form: what is published is what it sent, not what it trained."""
    run, (device,), (job,) = await small.training(make_plan(**INT8, cohort={"target": 1, "quorum": 1}, rounds=1), count=1)
    start = slices.unpack(await device.blob(job.slice.digest))

    await device.complete(job)
    small.tick()

    found = await small.admin.round(run, 1)
    assert found.adapter is not None
    adapter = slices.unpack(small.parts.blobs.read(found.adapter.digest))
    sent = reread(b"".join(trained_parts(moved(start, job), start, job.layout, Dtype.int8)), start, job)
    for module, (b, a) in sent.items():
        merged = adapter.factors[module].b.double() @ adapter.factors[module].a.double()
        assert (merged - job.scale * b @ a).norm() < 1e-6 * merged.norm()


def reread(data: bytes, start: slices.Slice, job: Job) -> dict[str, tuple[Any, Any]]:
    """b and a by module, float64, after the format's own words: x₀ + t q."""
    header = contents.read_header(data, len(data))
    found = {name: slices.decode(data[e.start : e.stop], e).double() for name, e in header.entries.items()}
    return {
        module: (
            old.b.double() + found[f"factors/{module}/b"] * found[f"factors/{module}/b/scales"],
            old.a.double() + found[f"factors/{module}/a"] * found[f"factors/{module}/a/scales"][:, None],
        )
        for module, old in start.factors.items()
    }


@pytest.mark.parametrize("uploads", ["int4", "I8", 8])
async def test_formats_that_there_are_not_are_refused(small: Federation, uploads: object) -> None:
    plan = make_plan().model_dump(mode="json") | {"uploads": uploads}
    response = await small.admin.call("POST", "/v1/runs", json=plan)
    assert response.status_code == 422
    response = await small.admin.call("POST", "/v1/runs", json=make_plan().model_dump(mode="json") | {"wire": "int8"})
    assert response.status_code == 422  # a slice to start from is no change of another
