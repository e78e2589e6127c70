"""The shortened methods: they count only with their proof, and the proof is true."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coordinator import folding, truncation
from coordinator.aggregation import check
from coordinator.lowrank import truncate
from coordinator.stacks import stacked
from coordinator.sums import Sum, Term
from coordinator.truncation import quick, quicker, wide
from protocol.plan import Choice
from protocol.slices import Factors
from tests.merging.small import best
from tests.merging.test_strategies import Client, make_round
from tests.merging.test_truncation import assert_best, dense, rand

HAIR = 1 + truncation.HAIR


def decaying(shape: tuple[int, int], ranks: list[int], *, seed: int, power: float = 1.0) -> Sum:
    """Clients who share one subspace of falling singular values i^−power, each with noise of its own."""
    n_out, n_in = shape
    d = min(shape) // 2
    u, _ = torch.linalg.qr(rand(n_out, d, seed=seed))
    v, _ = torch.linalg.qr(rand(n_in, d, seed=seed + 1))
    s = torch.arange(1, d + 1).float() ** -power
    terms = []
    for k, r in enumerate(ranks):
        noise_b, noise_a = rand(n_out, r, seed=seed + 2 * k + 2) / n_out**0.5, rand(r, n_in, seed=seed + 2 * k + 3) / n_in**0.5
        terms.append(Term(Factors(b=(u * s.sqrt())[:, :r] + 0.02 * noise_b, a=(v * s.sqrt()).T[:r] + 0.02 * noise_a), 1 / len(ranks)))
    return Sum(shape, terms)


def lost(w: Tensor, found: truncation.Singular) -> float:
    """‖W − U S Vᵀ‖²_F."""
    return float((w - found.b.double() @ found.a.double()).square().sum())


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([(260, 220), (220, 260), (240, 240)]), st.integers(1, 12), st.integers(0, 2**32), st.sampled_from([0.5, 1.0]))
def test_what_the_quick_method_leaves_out_is_proved_to_be_near_the_least(
    shape: tuple[int, int], rank: int, seed: int, power: float
) -> None:
    w = decaying(shape, [8, 16, 32, 16, 8, 32, 24], seed=seed, power=power)
    found = quick(stacked(w), rank)
    assert found is not None
    whole = dense(w)
    total, least = float(whole.square().sum()), float((whole - best(whole, rank)).square().sum())
    assert found.total == pytest.approx(total, rel=5e-7)  # and what is kept is wrong by as much: what is left out is not
    assert least <= lost(whole, found) <= HAIR * least
    assert found.total - float(found.squares.sum()) == pytest.approx(lost(whole, found), rel=0.01)
    assert found.total - found.most <= 1.001 * least  # no choice can lose less than the certificate says


def test_the_rule_takes_the_quick_method_where_many_directions_are_stacked_and_few_are_wanted() -> None:
    assert quicker((1024, 1024), 496, 64)
    assert quicker((4096, 4096), 2480, 64)
    assert not quicker((4096, 4096), 128, 8)
    assert not quicker((1024, 1024), 170, 64)


def test_the_rule_forms_the_sum_where_a_stack_would_be_nearly_as_wide() -> None:
    assert wide((1024, 1024), 1024, 64)
    assert wide((1024, 1024), 950, 64)
    assert not wide((1024, 1024), 496, 64)
    assert not wide((4096, 4096), 2480, 64)
    assert wide((24, 24), 24, 4)
    assert not wide((24, 24), 23, 4)


def test_where_the_rule_takes_it_the_truncation_says_how_much_may_be_missing() -> None:
    w = decaying((300, 280), [16, 32, 64, 32, 16, 64], seed=3)
    assert quicker(w.shape, w.rank, 4)
    found = truncate(w, 4)
    whole = dense(w)
    least = float((whole - best(whole, 4)).square().sum())
    assert float((whole - found.b.double() @ found.a.double()).square().sum()) <= HAIR * least
    assert 0 <= found.short < truncation.HAIR * least / found.total
    assert torch.equal(found.b, truncate(w, 4).b)


def test_singular_values_that_float32_cannot_tell_from_nothing_are_left_to_the_exact_method() -> None:
    w = decaying((300, 280), [16, 32, 64, 32, 16, 64], seed=3, power=8.0)
    sharp = Sum(
        w.shape, [Term(Factors(b=t.load(w.shape).b[:, :40], a=t.load(w.shape).a[:40]), t.weight) for t in w.terms if t.factors.rank > 40]
    )
    thin = Sum(w.shape, [Term(Factors(b=rand(300, 30, seed=k) @ rand(30, 30, seed=90), a=rand(30, 280, seed=7)), 0.2) for k in range(6)])
    for hard in (sharp, thin):
        again = Sum(hard.shape, [*hard.terms] * 2)
        assert_best(truncate(again, 40), again, 40)


@pytest.mark.parametrize("bad", [0.0, 1e-25, 1e25])
def test_directions_whose_squares_float32_cannot_hold_are_left_to_the_exact_method(bad: float) -> None:
    w = decaying((260, 220), [32, 64, 64], seed=1)
    part = w.terms[0].load(w.shape)
    odd = Sum(w.shape, [Term(Factors(b=part.b * bad, a=part.a), 1.0), *w.terms[1:]])
    assert quick(stacked(odd), 3) is None


def test_of_a_flat_spectrum_any_directions_are_within_a_hair_of_the_best() -> None:
    u, _ = torch.linalg.qr(rand(260, 200, seed=1))
    v, _ = torch.linalg.qr(rand(220, 200, seed=2))
    w = Sum((260, 220), [Term(Factors(b=u[:, k : k + 50], a=v.T[k : k + 50]), 1.0) for k in range(0, 200, 50)])
    found, whole = quick(stacked(w), 3), dense(w)
    assert found is not None
    assert lost(whole, found) <= HAIR * 197
    assert found.total - found.most <= 197
    assert truncate(w, 3).kept(3) == pytest.approx(3 / 200, rel=1e-5)


def test_many_terms_are_folded_and_few_directions_are_followed_with_a_proof() -> None:
    w = decaying((180, 160), [32] * 8, seed=5)
    found, whole = truncate(w, 3), dense(w)
    least = float((whole - best(whole, 3)).square().sum())
    assert float((whole - found.b.double() @ found.a.double()).square().sum()) <= HAIR * least
    assert 0 <= found.short < truncation.HAIR * least / found.total
    flat = Sum((160, 160), [Term(Factors(b=torch.eye(160), a=torch.eye(160)), 2.0)])
    assert truncate(flat, 3).kept(3) == pytest.approx(3 / 160)


def test_large_sums_are_multiplied_in_float32_and_stay_as_exact_as_their_result() -> None:
    w = decaying((1024, 1024), [64] * 17, seed=9)
    assert w.rank * 1024**2 >= folding.LARGE
    found, whole = truncate(w, 8), dense(w)
    total = float(whole.square().sum())
    least = total - float(torch.linalg.eigvalsh(whole @ whole.T)[-8:].sum())
    missed = float((whole - found.b.double() @ found.a.double()).square().sum())
    assert missed**0.5 <= (HAIR * least) ** 0.5
    assert (1 - found.kept(8)) * found.total == pytest.approx(missed, rel=1e-6)
    assert found.total == pytest.approx(total, rel=1e-7)
    tiny = Sum(w.shape, [Term(t.factors, 1e-20) for t in w.terms])
    assert truncate(tiny, 8).total == pytest.approx(1e-40 * total, rel=1e-9)


def test_slices_that_are_the_adapters_own_directions_cost_no_directions_of_their_own() -> None:
    round = make_round((40, 36), [Client(rank, 1.0, 1.0, 10 * rank) for rank in (1, 2, 4)])
    w = check(Choice(name="delta")).combine(round)
    assert w.rank == 4 + 2 * (1 + 2 + 4)
    stack = stacked(w)
    assert stack.rank == 3 + (1 + 2 + 4)  # all three clients trained the first direction: nothing of the old one stays
    assert stack.c[-3:].tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert_best(truncate(w, 4), w, 4)


@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float16])
def test_slices_that_were_rounded_on_their_way_stay_terms_of_their_own(wire: torch.dtype) -> None:
    adapter = Factors(b=rand(40, 4, seed=1), a=rand(4, 36, seed=2))
    given = Factors(b=adapter.b[:, :2].to(wire), a=adapter.a[:2].to(wire))
    assert stacked(Sum((40, 36), [Term(adapter, 1.0), Term(given, -0.5)])).rank == 6


def test_a_fresh_row_without_anything_in_b_adds_nothing_and_is_dropped_unless_it_is_no_number() -> None:
    adapter = Factors(b=torch.zeros(40, 4), a=torch.zeros(4, 36))
    fresh = Factors(b=torch.zeros(40, 2), a=rand(2, 36, seed=2))
    trained = Term(Factors(b=rand(40, 2, seed=3), a=rand(2, 36, seed=4)), 0.5)
    assert stacked(Sum((40, 36), [Term(adapter, 1.0), trained, Term(fresh, -0.5)])).rank == 2
    assert truncate(Sum((40, 36), [Term(adapter, 1.0), Term(fresh, -0.5)]), 2).total == 0
    fresh.a[1, 1] = float("nan")
    assert stacked(Sum((40, 36), [Term(adapter, 1.0), trained, Term(fresh, -0.5)])).rank == 4
