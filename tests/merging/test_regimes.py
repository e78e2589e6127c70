"""Every method, on sums wide enough for its shortened way, obeys the same laws: what it loses is near the least, and it says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.folding import LARGE, folded
from coordinator.lowrank import truncate, written
from coordinator.stacks import stacked
from coordinator.sums import Sum, Term
from coordinator.truncation import HAIR, Singular, exact, quick
from protocol.slices import Factors
from tests.merging.test_quick import decaying
from tests.merging.test_truncation import dense, rand

Method = Callable[[Sum, int], Singular]


def exactly(w: Sum, rank: int) -> Singular:
    """As `truncate` does it where nothing shorter is tried."""
    return exact(stacked(w), rank) or folded(w, rank)


def quick_or_exact(w: Sum, rank: int) -> Singular:
    """As `truncate` does it."""
    return quick(stacked(w), rank) or exactly(w, rank)


METHODS: dict[str, tuple[Method, float]] = {  # with how much more than the least it may leave out
    "exact": (exactly, 1e-6),
    "quick": (quick_or_exact, HAIR),
    "folded": (folded, HAIR),
}


def assert_true(found: Singular, w: Sum, rank: int, hair: float) -> None:
    """It leaves out little more than the least that can be left out, and what it says of that is right."""
    whole, b, a = dense(w), found.b.double(), found.a.double()
    squares = torch.linalg.svdvals(whole).square()
    total, least, lost = float(squares.sum()), float(squares[rank:].sum()), float((whole - b @ a).square().sum())
    own = sum(float((t.load(w.shape).b.double() * t.weights()).norm() * t.load(w.shape).a.double().norm()) ** 2 for t in w.terms)
    rounding = 1e-12 * max(total, own)
    assert lost <= (1 + hair) * least + rounding
    assert found.total == pytest.approx(total, rel=5e-7, abs=rounding)
    assert found.total - float(found.squares.sum()) == pytest.approx(lost, rel=0.01, abs=rounding)
    assert found.total - found.most <= 1.001 * least + rounding


def shuffled(terms: Sequence[Term], seed: int) -> list[Term]:
    order = torch.randperm(len(terms), generator=torch.Generator().manual_seed(seed))
    return [terms[int(i)] for i in order]


def as_one_client(terms: Sequence[Term], seed: int) -> list[Term]:
    parts = [(t.factors, t.weights()) for t in terms if isinstance(t.factors, Factors)]
    whole = Factors(b=torch.cat([f.b for f, _ in parts], dim=1), a=torch.cat([f.a for f, _ in parts]))
    return [Term(whole, torch.cat([c for _, c in parts]))]


def twice_with_half_the_weight(terms: Sequence[Term], seed: int) -> list[Term]:
    return [Term(t.factors, t.weights() / 2) for t in [*terms, *terms]]


def in_another_gauge(terms: Sequence[Term], seed: int) -> list[Term]:
    turned = []
    for t in terms:
        assert isinstance(t.factors, Factors)
        q, _ = torch.linalg.qr(rand(t.factors.rank, t.factors.rank, seed=seed))
        turned.append(Term(Factors(b=t.factors.b @ q, a=q.T @ t.factors.a), t.weight))
    return turned


def weighted_by_direction(terms: Sequence[Term], seed: int) -> list[Term]:
    return [Term(t.factors, t.weights() * (1 + 0.5 * rand(t.factors.rank, seed=seed, dtype=torch.float64))) for t in terms]


def with_zero_changes(terms: Sequence[Term], seed: int) -> list[Term]:
    first = terms[0].factors
    assert isinstance(first, Factors)
    nothing = Factors(b=torch.zeros_like(first.b), a=first.a)
    return [*terms, Term(nothing, 1.0), Term(first, 0.0)]


def with_terms_that_cancel(terms: Sequence[Term], seed: int) -> list[Term]:
    return [*terms, Term(terms[1].factors, 0.5), Term(terms[1].factors, -0.5)]


def of_dtype(dtype: torch.dtype) -> Callable[[Sequence[Term], int], list[Term]]:
    def travelled(terms: Sequence[Term], seed: int) -> list[Term]:
        return [Term(Factors(b=t.factors.b.to(dtype), a=t.factors.a.to(dtype)), t.weight) for t in terms if isinstance(t.factors, Factors)]

    return travelled


def scaled(factor: float) -> Callable[[Sequence[Term], int], list[Term]]:
    return lambda terms, seed: [Term(t.factors, t.weights() * factor) for t in terms]


def unbalanced(factor: float) -> Callable[[Sequence[Term], int], list[Term]]:
    def turned(terms: Sequence[Term], seed: int) -> list[Term]:
        return [Term(Factors(b=t.factors.b * factor, a=t.factors.a / factor), t.weight) for t in terms if isinstance(t.factors, Factors)]

    return turned


LAWS = [
    shuffled,
    as_one_client,
    twice_with_half_the_weight,
    in_another_gauge,
    weighted_by_direction,
    with_zero_changes,
    with_terms_that_cancel,
    *map(of_dtype, (torch.float16, torch.bfloat16, torch.float64)),
    *map(scaled, (1e-30, 1e-9, 1e9, 1e30)),
    *map(unbalanced, (1e-12, 1e12)),
]


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=60)
@given(
    shape=st.sampled_from([(230, 190), (190, 230), (200, 200)]),
    rank=st.sampled_from([1, 2, 5, 20]),
    seed=st.integers(0, 2**32),
    power=st.sampled_from([0.5, 1.0, 2.0]),
    law=st.sampled_from(LAWS),
)
def test_every_method_obeys_every_law(
    method: str, shape: tuple[int, int], rank: int, seed: int, power: float, law: Callable[[Sequence[Term], int], list[Term]]
) -> None:
    ranks = [8, 16, 32, 16, 8, 32, 24]
    w = Sum(shape, law(decaying(shape, ranks, seed=seed, power=power).terms, seed))
    merge, hair = METHODS[method]
    assert_true(merge(w, rank), w, rank, hair)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_right_where_singular_values_are_equal(method: str) -> None:
    u, _ = torch.linalg.qr(rand(230, 150, seed=1, dtype=torch.float64))
    v, _ = torch.linalg.qr(rand(200, 150, seed=2, dtype=torch.float64))
    s = torch.cat([torch.full((10,), 3.0), torch.full((140,), 1.0)]).double()
    w = Sum((230, 200), [Term(Factors(b=(u * s)[:, k : k + 50], a=v.T[k : k + 50]), 1.0) for k in (0, 50, 100)])
    merge, hair = METHODS[method]
    for rank in (5, 10, 15):
        assert_true(merge(w, rank), w, rank, hair)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_holds_no_more_directions_than_the_sum_has(method: str) -> None:
    one = Factors(b=rand(230, 3, seed=1), a=rand(3, 200, seed=2))
    w = Sum((230, 200), [Term(one, 1.0)] * 40)
    found = written(METHODS[method][0](w, 20), w.rank)
    assert found.b.shape == (230, 3)
    assert found.kept(3) == pytest.approx(1.0)


def test_the_dense_form_in_float32_obeys_the_same_laws() -> None:
    shape = (520, 512)
    ranks = [64] * 17
    for law in (shuffled, in_another_gauge, weighted_by_direction, of_dtype(torch.bfloat16), scaled(1e-30), unbalanced(1e12)):
        w = Sum(shape, law(decaying(shape, ranks, seed=3).terms, 4))
        assert w.rank * shape[0] * shape[1] >= LARGE
        assert_true(folded(w, 8), w, 8, HAIR)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_nothing_where_nothing_is_wanted(method: str) -> None:
    w = decaying((230, 190), [8, 16, 32, 16, 8, 32, 24], seed=1)
    found = written(METHODS[method][0](w, 0), w.rank)
    assert (found.b.shape, found.a.shape) == ((230, 0), (0, 190))


def test_large_sums_that_nearly_cancel_are_formed_in_float64() -> None:
    shape = (520, 512)
    terms = decaying(shape, [64] * 9, seed=3).terms
    less = [Term(t.factors, -t.weights() * (1 - 1e-6)) for t in terms]
    w = Sum(shape, [*terms, *less])
    assert w.rank * shape[0] * shape[1] >= LARGE
    found, whole = folded(w, 8), dense(w)
    assert found.total == pytest.approx(float(whole.square().sum()), rel=1e-6)
    assert torch.allclose(found.squares.sqrt(), torch.linalg.svdvals(whole)[:8], rtol=1e-3)


def test_the_order_of_terms_changes_no_more_than_rounding() -> None:
    w = decaying((300, 280), [16, 32, 64, 32, 16, 64], seed=3)
    one, two = truncate(w, 4), truncate(Sum(w.shape, w.terms[::-1]), 4)
    assert torch.allclose(one.b @ one.a, two.b @ two.a, atol=1e-5 * float(one.s[0]))
    assert torch.allclose(one.s, two.s, rtol=1e-4)
