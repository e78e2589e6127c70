"""Cutting: every slice is the adapter's leading part at its own scale, and every pair of factors can learn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coordinator.fresh import fresh_rows, fresh_tensor
from coordinator.lowrank import cut, pad, truncate
from coordinator.sums import Sum, Term
from protocol.plan import Split
from protocol.slices import Factors
from tests.merging.small import best, dense
from tests.merging.test_truncation import rand

FRESH = fresh_rows(8, 30, seed=1, round=1, module="m")


def adapter(rank: int, cap: int = 8, magnitude: float = 1.0) -> tuple[Factors, Tensor]:
    """A stored adapter of 20 × 30 with that many directions, and its update in float64."""
    w = magnitude * dense(Factors(b=rand(20, rank, seed=1), a=rand(rank, 30, seed=2)))
    found = truncate(Sum((20, 30), [Term(Factors(b=w, a=torch.eye(30, dtype=torch.float64)), 1.0)]), cap)
    return found.padded(cap), w


@pytest.mark.parametrize("split", Split)
@given(live=st.integers(1, 8), rank=st.integers(1, 8), scale=st.floats(1e-3, 1e3), magnitude=st.sampled_from([1e-4, 1.0, 1e4]))
@settings(deadline=None, max_examples=25)
def test_a_slice_is_the_leading_part_whatever_scale_and_split(split: Split, live: int, rank: int, scale: float, magnitude: float) -> None:
    stored, w = adapter(live, magnitude=magnitude)
    slice = cut(stored, rank, scale, split, FRESH, torch.float32)
    assert slice.b.shape == (20, rank)
    assert slice.a.shape == (rank, 30)
    assert torch.allclose(dense(slice, scale), best(w, rank), rtol=0, atol=1e-6 * float(w.norm()))


@pytest.mark.parametrize(
    ("split", "norms_b", "norms_a"),
    [(Split.balanced, 0.5, 0.5), (Split.left, 1.0, 0.0), (Split.right, 0.0, 1.0)],
)
def test_the_split_says_where_the_singular_values_go(split: Split, norms_b: float, norms_a: float) -> None:
    # s · b @ a = U S Vᵀ, so b @ a has the singular values S / s: all of them in b, all in a, or their root in both.
    stored, w = adapter(5)
    slice = cut(stored, 5, 2.0, split, FRESH, torch.float32)
    s = torch.linalg.svdvals(w)[:5] / 2.0
    assert torch.allclose(slice.b.double().norm(dim=0), s**norms_b, rtol=1e-5)
    assert torch.allclose(slice.a.double().norm(dim=1), s**norms_a, rtol=1e-5)


@pytest.mark.parametrize("split", Split)
def test_smaller_slices_are_the_first_part_of_larger_ones(split: Split) -> None:
    stored, _ = adapter(3)
    whole = cut(stored, 8, 2.0, split, FRESH, torch.bfloat16)
    for rank in (1, 2, 4):
        part = cut(stored, rank, 2.0, split, FRESH, torch.bfloat16)
        assert torch.equal(part.a, whole.a[:rank])
        assert torch.equal(part.b, whole.b[:, :rank])


@pytest.mark.parametrize("split", Split)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("magnitude", [0.0, 1e-20, 1e-8, 1.0])
def test_no_pair_of_factors_is_dead(split: Split, dtype: torch.dtype, magnitude: float) -> None:
    # At 1e-20 the directions are there in float32 and vanish in float16: then they begin afresh.
    stored, _ = adapter(3, magnitude=magnitude)
    slice = cut(stored, 8, 2.0, split, FRESH, dtype)
    alive = (slice.b != 0).any(dim=0) | (slice.a != 0).any(dim=1)
    assert bool(alive.all())


def test_directions_that_the_adapter_does_not_have_begin_with_fresh_rows_and_change_nothing() -> None:
    stored, _ = adapter(3)
    slice = cut(stored, 8, 2.0, Split.balanced, FRESH, torch.float32)
    assert torch.equal(slice.a[3:], FRESH[3:])
    assert not slice.b[:, 3:].any()


def test_a_slice_may_be_larger_than_the_adapter() -> None:
    stored, w = adapter(2, cap=2)
    slice = cut(stored, 4, 1.0, Split.balanced, FRESH, torch.float32)
    assert torch.equal(slice.a[2:], FRESH[2:4])
    assert torch.allclose(dense(slice), w, atol=1e-5)


def test_padding_adds_zero_directions_and_never_takes_any() -> None:
    factors = Factors(b=rand(4, 2, seed=1), a=rand(2, 5, seed=2))
    padded = pad(factors, 3)
    assert torch.equal(padded.b[:, :2], factors.b)
    assert torch.equal(padded.a[:2], factors.a)
    assert not padded.b[:, 2].any()
    assert not padded.a[2].any()
    assert pad(factors, 1).rank == 2


def test_fresh_rows_are_within_the_bound_and_the_same_for_everybody() -> None:
    rows = fresh_rows(64, 100, seed=3, round=2, module="m")
    assert torch.equal(rows, fresh_rows(64, 100, seed=3, round=2, module="m"))
    assert float(rows.abs().max()) <= 0.1
    assert float(rows.std()) == pytest.approx(0.1 / 3**0.5, rel=0.05)  # a uniform variable on ±c has variance c² / 3


def test_fresh_rows_differ_by_seed_round_and_module() -> None:
    rows = [
        fresh_rows(2, 50, seed=seed, round=round, module=module)
        for seed, round, module in ((0, 1, "m"), (1, 1, "m"), (0, 2, "m"), (0, 1, "n"))
    ]
    assert len({tuple(r.flatten().tolist()) for r in rows}) == 4


def test_fresh_tensors_begin_as_layers_do() -> None:
    assert not fresh_tensor("head.bias", (3,), seed=0).any()
    assert bool((fresh_tensor("head.norm.weight", (3,), seed=0) == 1).all())
    weight = fresh_tensor("head.weight", (50, 80), seed=0)
    assert torch.equal(weight, fresh_tensor("head.weight", (50, 80), seed=0))
    assert not torch.equal(weight, fresh_tensor("other.weight", (50, 80), seed=0))
    assert float(weight.std()) == pytest.approx(0.02, rel=0.1)
