"""Truncation against a dense float64 reference, below and above the stacked rank at which the method changes."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coordinator.lowrank import Truncation, truncate
from coordinator.sums import Sum, Term
from protocol import errors
from protocol.slices import Factors
from tests.merging.small import best

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense(w: Sum) -> Tensor:
    """The sum, multiplied out in float64: (n_out, n_in)."""
    parts = [(term.load(w.shape), term.weights()) for term in w.terms]
    return torch.stack([part.b.double() @ (c[:, None] * part.a.double()) for part, c in parts]).sum(dim=0)


def size(w: Sum) -> float:
    """The scale of rounding: the root of the summed energies of the sum and of its single directions."""
    energy = float(dense(w).square().sum())
    for term in w.terms:
        part, c = term.load(w.shape), term.weights()
        energy += float((part.b.double().square().sum(dim=0) * c.square() * part.a.double().square().sum(dim=1)).sum())
    return math.sqrt(energy)


def error(found: Truncation, w: Tensor) -> float:
    return float((w - found.b.double() @ found.a.double()).norm())


def assert_best(found: Truncation, w: Sum, rank: int) -> None:
    """The truncation is within a millionth of the best one, and its certificate is true."""
    whole, hair = dense(w), 1e-6 * size(w)
    s = torch.linalg.svdvals(whole)
    assert error(found, whole) <= float((whole - best(whole, rank)).norm()) + hair
    assert found.total == pytest.approx(float(whole.square().sum()), rel=1e-9, abs=hair**2)
    held = torch.zeros(min(rank, len(s)), dtype=torch.float64)
    held[: len(found.s)] = found.s
    assert torch.allclose(held, s[:rank], rtol=0, atol=hair)
    for few in range(1, rank + 1):
        lost = float((whole - best(whole, few)).square().sum())
        assert (1 - found.kept(few)) * found.total == pytest.approx(lost, rel=1e-6, abs=1e-9 * size(w) ** 2)


@dataclass(frozen=True)
class Case:
    w: Sum
    rank: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n_out, n_in = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    seed = draw(st.integers(0, 2**32))
    ranks = draw(st.lists(st.integers(1, 8), min_size=1, max_size=6))
    dtype = draw(st.sampled_from(DTYPES))
    magnitude = 10.0 ** draw(st.integers(-3, 3))
    terms = []
    for number, r in enumerate(ranks):
        factors = Factors(
            b=(magnitude * rand(n_out, r, seed=seed + 2 * number)).to(dtype), a=rand(r, n_in, seed=seed + 2 * number + 1).to(dtype)
        )
        weight: float | Tensor = draw(st.floats(-2, 2).filter(lambda x: x == 0 or abs(x) > 1e-3))
        if draw(st.booleans()):
            weight = weight * rand(r, seed=seed + 999, dtype=torch.float64)
        terms.append(Term(factors, weight))
    return Case(Sum((n_out, n_in), terms), draw(st.integers(1, 12)))


@settings(deadline=None, max_examples=150)
@given(cases())
def test_the_truncation_is_the_best_one_and_knows_what_it_lost(case: Case) -> None:
    assert_best(truncate(case.w, case.rank), case.w, case.rank)


@settings(deadline=None, max_examples=50)
@given(cases())
def test_the_singular_values_are_split_evenly_and_the_largest_entry_of_each_left_vector_is_positive(case: Case) -> None:
    found = truncate(case.w, case.rank)
    assert torch.allclose(found.b.double().norm(dim=0), found.s.sqrt(), rtol=1e-5)
    assert torch.allclose(found.a.double().norm(dim=1), found.s.sqrt(), rtol=1e-3)
    assert bool((found.s[:-1] >= found.s[1:]).all())
    for column in found.b.T:
        assert column[column.abs().argmax()] > 0


@settings(deadline=None, max_examples=50)
@given(cases())
def test_the_same_sum_gives_the_same_bits(case: Case) -> None:
    one, two = truncate(case.w, case.rank), truncate(case.w, case.rank)
    assert torch.equal(one.b, two.b)
    assert torch.equal(one.a, two.a)


@settings(deadline=None, max_examples=50)
@given(cases(), st.integers(2, 5))
def test_a_term_counts_as_much_as_its_copies_with_shared_weight(case: Case, copies: int) -> None:
    # The copies raise the stacked rank over the smaller side, where the dense form takes over, and they are exactly dependent.
    shared = [Term(t.factors, t.weights() / copies) for t in case.w.terms for _ in range(copies)]
    found = truncate(Sum(case.w.shape, shared), case.rank)
    assert_best(found, case.w, case.rank)


@settings(deadline=None, max_examples=50)
@given(cases(), st.integers(0, 2**32))
def test_the_gauge_of_the_factors_does_not_matter(case: Case, seed: int) -> None:
    turned = []
    for term in case.w.terms:
        r = term.factors.rank
        part = term.load(case.w.shape)
        q, _ = torch.linalg.qr(rand(r, r, seed=seed, dtype=torch.float64))
        m = q * torch.logspace(-1, 1, r, dtype=torch.float64)  # condition number 100
        # A weight per direction is no number of the product; it goes into b first.
        turned.append(Term(Factors(b=part.b.double() * term.weights() @ m, a=torch.linalg.solve(m, part.a.double())), 1.0))
    assert_best(truncate(Sum(case.w.shape, turned), case.rank), Sum(case.w.shape, turned), case.rank)
    assert torch.allclose(dense(Sum(case.w.shape, turned)), dense(case.w), rtol=0, atol=1e-9 * size(case.w))


@settings(deadline=None, max_examples=30)
@given(cases(), st.sampled_from([2.0**-60, 2.0**-10, 2.0**10, 2.0**60]))
def test_a_scaled_sum_gives_scaled_singular_values(case: Case, factor: float) -> None:
    scaled = Sum(case.w.shape, [Term(t.factors, t.weights() * factor) for t in case.w.terms])
    one, two = truncate(case.w, case.rank), truncate(scaled, case.rank)
    assert torch.equal(two.s, one.s * factor)  # a power of two changes no rounding
    assert two.total == one.total * factor**2


@pytest.mark.parametrize("magnitude", [1e-18, 1e-9, 1.0, 1e9, 1e17])
@pytest.mark.parametrize("copies", [1, 9])
def test_tiny_and_huge_factors_are_as_exact_as_others(magnitude: float, copies: int) -> None:
    factors = Factors(b=magnitude * rand(9, 3, seed=1), a=magnitude * rand(3, 7, seed=2))
    w = Sum((9, 7), [Term(factors, 1 / copies)] * copies)
    assert_best(truncate(w, 2), w, 2)


def test_the_product_of_tall_wide_and_square_shapes_is_found() -> None:
    for n_out, n_in in ((40, 6), (6, 40), (16, 16), (1, 9), (9, 1), (1, 1)):
        w = Sum((n_out, n_in), [Term(Factors(b=rand(n_out, 2, seed=3), a=rand(2, n_in, seed=4)), 1.5)])
        found = truncate(w, 2)
        assert found.b.shape[0] == n_out
        assert found.a.shape[1] == n_in
        assert torch.allclose(found.b @ found.a, dense(w).float(), atol=1e-5)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (9, 8)])
def test_equal_singular_values_lose_nothing(shape: tuple[int, int]) -> None:
    # An isometry: every singular value is 3.
    u, _ = torch.linalg.qr(rand(shape[0], 8, seed=5, dtype=torch.float64))
    v, _ = torch.linalg.qr(rand(shape[1], 8, seed=6, dtype=torch.float64))
    w = Sum(shape, [Term(Factors(b=u, a=v.T), 3.0)])
    found = truncate(w, 8)
    assert torch.allclose(found.s, torch.full((8,), 3.0, dtype=torch.float64))
    assert_best(found, w, 8)
    assert truncate(w, 2).kept(2) == pytest.approx(2 / 8)


@pytest.mark.parametrize("copies", [1, 20])
def test_a_sum_of_low_rank_holds_no_more_directions_than_it_has(copies: int) -> None:
    factors = Factors(b=rand(12, 2, seed=7), a=rand(2, 15, seed=8))
    found = truncate(Sum((12, 15), [Term(factors, 1.0)] * copies), 6)
    assert found.a.shape == (2, 15)
    assert found.kept(2) == pytest.approx(1.0)
    padded = found.padded(6)
    assert padded.b.shape == (12, 6)
    assert not padded.b[:, 2:].any()
    assert not padded.a[2:].any()


@pytest.mark.parametrize("copies", [1, 20])
def test_terms_that_cancel_leave_nothing(copies: int) -> None:
    factors = Factors(b=rand(12, 3, seed=9), a=rand(3, 15, seed=10))
    found = truncate(Sum((12, 15), [Term(factors, 0.3), Term(factors, -0.3)] * copies), 4)
    assert found.s.shape == (0,)
    assert found.total == 0
    assert found.kept(1) == 1


def test_a_zero_direction_enters_the_sum_without_harm() -> None:
    b, a = rand(12, 3, seed=9), rand(3, 15, seed=10)
    b[:, 1] = 0
    a[2] = 0
    w = Sum((12, 15), [Term(Factors(b=b, a=a), 1.0)])
    found = truncate(w, 3)
    assert found.a.shape == (1, 15)
    assert_best(found, w, 3)


def test_many_clients_with_nearly_the_same_a_are_told_apart() -> None:
    # The first round: every client starts from the same rows of a and moves them by a thousandth.
    start = rand(8, 64, seed=11)
    terms = [Term(Factors(b=rand(48, 4, seed=k), a=start[:4] + 1e-3 * rand(4, 64, seed=100 + k)), 0.2) for k in range(5)]
    w = Sum((48, 64), terms)
    assert_best(truncate(w, 8), w, 8)


class Far:
    """Factors that lie somewhere; the ledger notes, whenever some are read, how many of their numbers are in memory."""

    rank = 8

    def __init__(self, ledger: list[int], read: list[weakref.ref[Tensor]], seed: int) -> None:
        self._ledger, self._read, self._seed = ledger, read, seed

    def load(self) -> Factors:
        # float64, so that what is widened is not a copy of what was read, and can be seen to go.
        found = Factors(b=rand(9, 8, seed=self._seed), a=rand(8, 7, seed=self._seed + 1000, dtype=torch.float64))
        self._read.append(weakref.ref(found.a))
        self._ledger.append(sum(8 for a in self._read if a() is not None))
        return found


def test_however_many_clients_there_are_each_is_read_once_and_few_are_in_memory() -> None:
    ledger: list[int] = []
    read: list[weakref.ref[Tensor]] = []
    far = Sum((9, 7), [Term(Far(ledger, read, k), 0.1) for k in range(500)])
    found = truncate(far, 3)
    assert len(ledger) == 500
    assert max(ledger) <= 600  # directions, of 4000
    assert found.stacked_rank == 4000
    assert_best(found, far, 3)


def test_an_empty_sum_is_refused() -> None:
    with pytest.raises(errors.NoContributions):
        truncate(Sum((4, 4), []), 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("shape", [(40, 40), (3, 3)])
def test_numbers_that_are_none_are_refused_by_both_methods(bad: float, shape: tuple[int, int]) -> None:
    b, a = rand(shape[0], 3, seed=1), rand(3, shape[1], seed=2)
    b[1, 1] = bad
    with pytest.raises(errors.NonFiniteSlice):
        truncate(Sum(shape, [Term(Factors(b=b, a=a), 1.0)]), 2)


def test_a_sum_that_float32_cannot_hold_is_refused() -> None:
    factors = Factors(b=torch.full((6, 1), 1e70, dtype=torch.float64), a=torch.full((1, 6), 1e70, dtype=torch.float64))
    with pytest.raises(errors.NonFiniteSlice, match="float32"):
        truncate(Sum((6, 6), [Term(factors, 1.0)]), 1)


def test_factors_of_another_matrix_are_refused() -> None:
    factors = Factors(b=rand(5, 2, seed=1), a=rand(2, 6, seed=2))
    with pytest.raises(errors.MismatchedSlice, match=r"\[5, 2\] and \[2, 6\] .* 6 × 5"):
        truncate(Sum((6, 5), [Term(factors, 1.0)]), 2)


# --- directions that cancel each other ----------------------------------------------------------------------------------


def cancelling(shape: tuple[int, int], size: float) -> Factors:
    """Two directions, each of that size squared, that add up to nothing."""
    n_out, n_in = shape
    v, u = (size * (8 * rand(n, seed=seed)).round() / 8 for n, seed in ((n_out, 91), (n_in, 92)))  # whose products are exact
    return Factors(b=torch.stack([v, v], dim=1), a=torch.stack([u, -u]))


@pytest.mark.parametrize("size", [1e1, 1e2, 1e3, 3e3, 1e4, 1e5])
def test_what_cancels_does_not_hide_what_is_there(size: float) -> None:
    """Beside 10²⁰ times its energy, which adds up to nothing, a sum is as well approximated as without, and its energies are true."""
    shape, rank = (200, 160), 16
    terms = [Term(Factors(b=rand(200, 4, seed=n), a=rand(4, 160, seed=50 + n)), 10.0**-n) for n in range(5)]
    alone = dense(Sum(shape, terms))

    found = truncate(Sum(shape, [*terms, Term(cancelling(shape, size), 0.25)]), rank)

    least, whole = float((alone - best(alone, rank)).norm()), float(alone.norm())
    assert error(found, alone) <= 1.01 * least + 1e-9 * whole
    assert found.total == pytest.approx(whole**2, rel=1e-6)
    assert (1 - found.kept(rank)) * found.total == pytest.approx(error(found, alone) ** 2, rel=0.02, abs=1e-9 * whole**2)


def test_a_sum_that_is_nothing_but_what_cancels_is_zero() -> None:
    found = truncate(Sum((200, 160), [Term(cancelling((200, 160), 1e4), 1.0)]), 4)
    assert (len(found.s), found.total, found.kept(4), found.short) == (0, 0.0, 1.0, 0.0)


@pytest.mark.parametrize("weight", [math.nan, math.inf, torch.tensor([1.0, math.nan, 1.0])])
@pytest.mark.parametrize("first", [True, False])
def test_a_weight_that_is_no_number_is_refused_wherever_it_stands(weight: float | Tensor, first: bool) -> None:
    wrong = Term(Factors(b=rand(20, 3, seed=1), a=rand(3, 16, seed=2)), weight)
    right = Term(Factors(b=rand(20, 3, seed=3), a=rand(3, 16, seed=4)), 1.0)
    with pytest.raises(errors.NonFiniteSlice, match="weights"):
        truncate(Sum((20, 16), [wrong, right] if first else [right, wrong]), 2)


def test_other_weights_than_directions_are_refused_and_no_direction_is_none() -> None:
    factors = Factors(b=rand(20, 3, seed=1), a=rand(3, 16, seed=2))
    with pytest.raises(errors.MismatchedSlice, match=r"\[2\] weights came for 3 directions"):
        truncate(Sum((20, 16), [Term(factors, torch.ones(2))]), 2)
    nothing = Term(Factors(b=torch.zeros(20, 0), a=torch.zeros(0, 16)), 1.0)
    w = Sum((20, 16), [nothing, Term(factors, 1.0)])
    assert_best(truncate(w, 2), w, 2)


@pytest.mark.parametrize("first", [0, 1])
def test_how_large_weights_are_says_nothing_of_unlike_directions(first: int) -> None:
    """A weight of 10¹⁶ beside factors of 10⁻¹⁶ counts as one beside factors of size one."""
    one = Term(Factors(b=rand(20, 3, seed=1), a=rand(3, 16, seed=2)), 1.0)
    other = Term(Factors(b=1e-8 * rand(20, 3, seed=3), a=1e-8 * rand(3, 16, seed=4)), 1e16)
    w = Sum((20, 16), [one, other] if first == 0 else [other, one])
    assert_best(truncate(w, 6), w, 6)
