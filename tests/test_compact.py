"""Trained slices in every number format: what is read is what was sent, and errs by no more than is said."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coordinator.blobs import Blobs
from coordinator.reading import SliceReader, open_slice
from protocol import contents, errors, slices
from protocol.compact import STEPS, arrived, restored, trained_parts, written
from protocol.contents import SCALES, Label
from protocol.plan import Dtype, Sides
from protocol.slices import TORCH_DTYPES, Factors, Slice
from tests.merging.small import LAYOUT

DIRECTIONS = (4, 1, 2)
NAMES = ("factors/m/a", "factors/m/b", "full/head.weight", "full/b")
LABEL = Label(rank=3, scale=2.0, round=1, base=f"sha256:{0:064}", examples=5)
EPS = float(torch.finfo(torch.float32).eps)


def drawn(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def handed_out(rank: int = 5) -> Slice:
    factors = {m: Factors(b=drawn(n_out, rank, seed=1), a=drawn(rank, n_in, seed=2)) for m, (n_out, n_in) in LAYOUT.modules.items()}
    return Slice(Label(rank=rank, scale=2.0, round=0), factors, {name: drawn(*shape, seed=3) for name, shape in LAYOUT.full.items()})


def trained(start: Slice, size: float = 0.01) -> Slice:
    """What a client made of the directions that it was asked for."""

    def moved(tensor: Tensor, seed: int) -> Tensor:
        return tensor + drawn(*tensor.shape, seed=seed, size=size)

    chosen = {module: factors.of(DIRECTIONS) for module, factors in start.factors.items()}
    factors = {module: Factors(b=moved(f.b, 4), a=moved(f.a, 5)) for module, f in chosen.items()}
    return Slice(LABEL, factors, {name: moved(tensor, 6) for name, tensor in start.full.items()})


def stored(new: Slice, start: Slice, dtype: Dtype, folder: Path, sides: Sides = Sides.both) -> tuple[SliceReader, int]:
    """A trained slice in a store, and its length."""
    data = b"".join(trained_parts(new, start, LAYOUT, dtype, directions=DIRECTIONS, sides=sides))
    blobs = Blobs.open(folder.as_uri())
    return open_slice(blobs, blobs.put(data).digest), len(data)


@pytest.mark.parametrize("sides", Sides)
@pytest.mark.parametrize("dtype", Dtype)
def test_what_is_read_is_what_was_sent(dtype: Dtype, sides: Sides, tmp_path: Path) -> None:
    start = handed_out()
    new = trained(start)
    reader, length = stored(new, start, dtype, tmp_path, sides)
    assert reader.header.label == LABEL
    assert length == len(contents.head(LAYOUT, LABEL, dtype, sides)) + contents.body_length(LAYOUT, 3, dtype, sides)
    assert length <= contents.largest_length(LAYOUT, 3, dtype, sides)
    for module, factors in new.factors.items():
        old = start.factors[module].of(DIRECTIONS)
        found = reader.trained_factors(module, lambda old=old: old)  # type: ignore[misc]  # bound in the loop
        assert torch.equal(found.b, arrived(f"factors/{module}/b", factors.b, old.b, dtype))
        assert torch.equal(found.a, arrived(f"factors/{module}/a", factors.a, old.a, dtype) if sides is Sides.both else old.a)
    for name, tensor in new.full.items():
        found_full = reader.trained_full(name, partial(start.full.__getitem__, name))
        assert torch.equal(found_full, arrived(f"full/{name}", tensor, start.full[name], dtype))


def test_int8_is_a_quarter_of_float32_and_its_scales(tmp_path: Path) -> None:
    numbers = LAYOUT.numbers(64)
    scales = 64 * 2 * len(LAYOUT.modules) + 1 + 3  # a direction has two; head.bias has one, head.weight one for each row
    assert contents.body_length(LAYOUT, 64, Dtype.float32) == 4 * numbers
    assert contents.body_length(LAYOUT, 64, Dtype.int8) == numbers + 4 * scales


NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32)


@given(data=st.data(), name=st.sampled_from(NAMES), shape=st.tuples(st.integers(1, 4), st.integers(1, 5)))
@settings(max_examples=300, deadline=None)
def test_any_tensor_comes_back_within_half_a_step(data: st.DataObject, name: str, shape: tuple[int, int]) -> None:
    count = shape[0] * shape[1]
    new, old = (torch.tensor(data.draw(st.lists(NUMBERS, min_size=count, max_size=count))).reshape(shape) for _ in range(2))
    steps, sizes = written(name, new, old)
    found = restored(name, steps, sizes, old)
    spread = sizes if name == "factors/m/b" else sizes[:, None]
    # Half a step; and what float32 rounds in the difference, in the product and in the sum.
    hair = 2 * EPS * (new.double().abs() + old.double().abs()) + 1e-42
    assert bool(((found.double() - new.double()).abs() <= spread.double() * (0.5 + STEPS * EPS) + hair).all())
    assert written(name, new, old)[0].equal(steps)
    assert int(steps.min()) >= -STEPS


@given(exponent=st.integers(-60, 60), seed=st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_the_size_of_a_direction_is_nobody_elses_matter(exponent: int, seed: int) -> None:
    a, b = drawn(3, 40, seed=seed), drawn(40, 3, seed=seed + 1)
    for name, tensor, one in (("factors/m/a", a, (1, slice(None))), ("factors/m/b", b, (slice(None), 1))):
        grown = tensor.clone()
        grown[one] *= 2.0**exponent
        (steps, sizes), (same, others) = (written(name, x, torch.zeros_like(x)) for x in (tensor, grown))
        assert torch.equal(steps, same)
        assert torch.equal(others, sizes * torch.tensor([1.0, 2.0**exponent, 1.0]))


@pytest.mark.parametrize("name", NAMES)
def test_what_was_not_changed_arrives_exactly(name: str) -> None:
    old = drawn(4, 6, seed=1)
    steps, sizes = written(name, old, old)
    assert not steps.any()
    assert not sizes.any()
    assert torch.equal(restored(name, steps, sizes, old), old)


def test_the_error_is_in_proportion_to_the_change_however_large_the_tensor() -> None:
    old, change = drawn(4, 500, seed=1, size=100.0), drawn(4, 500, seed=2, size=0.01)
    found = arrived("factors/m/a", old + change, old, Dtype.int8)
    lost = (found.double() - (old + change).double()).norm() / change.double().norm()
    itself = arrived("factors/m/a", old + change, torch.zeros_like(old), Dtype.int8)
    assert lost < 0.01
    assert (itself.double() - (old + change).double()).norm() / change.double().norm() > 50  # had the tensor itself been sent


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", NAMES)
def test_no_number_arrives_as_a_number(name: str, bad: float) -> None:
    new = drawn(4, 6, seed=1)
    new[2, 3] = bad
    steps, sizes = written(name, new, torch.zeros_like(new))
    with pytest.raises(errors.NonFiniteSlice, match=SCALES):
        restored(name, steps, sizes, torch.zeros_like(new))


def test_int8_is_no_slice_by_itself(tmp_path: Path) -> None:
    start = handed_out()
    data = b"".join(trained_parts(trained(start), start, LAYOUT, Dtype.int8, directions=DIRECTIONS))
    with pytest.raises(errors.MismatchedSlice, match="none by itself"):
        slices.unpack(data)


def test_the_start_of_another_shape_is_refused(tmp_path: Path) -> None:
    start = handed_out()
    reader, _ = stored(trained(start), start, Dtype.int8, tmp_path)
    with pytest.raises(errors.MismatchedSlice, match="equal ones were expected"):
        reader.trained_factors("block.q", lambda: start.factors["block.q"])
    with pytest.raises(errors.MismatchedSlice, match="were named; there are 5"):
        reader.trained_factors("block.q", lambda: start.factors["block.q"].of((1, 2, 5)))


def test_scales_that_are_missing_are_mismatched(tmp_path: Path) -> None:
    start = handed_out()
    reader, _ = stored(trained(start), start, Dtype.int8, tmp_path)
    entries = {name: entry for name, entry in reader.header.entries.items() if name != f"factors/block.q/b{SCALES}"}
    with pytest.raises(errors.MismatchedSlice, match=f"no tensor factors/block.q/b{SCALES}"):
        replace(reader, header=replace(reader.header, entries=entries)).trained_factors("block.q", lambda: start.factors["block.q"])


@pytest.mark.parametrize("dtype", [Dtype.bfloat16, Dtype.float16])
def test_a_half_precision_errs_by_half_of_its_last_place(dtype: Dtype) -> None:
    new = drawn(4, 500, seed=1)
    found = arrived("factors/m/a", new, torch.zeros_like(new), dtype).double()
    assert bool(((found - new.double()).abs() <= new.double().abs() * torch.finfo(TORCH_DTYPES[dtype]).eps / 2).all())
