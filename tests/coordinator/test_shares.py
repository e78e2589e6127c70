"""The weights of a round's contributions."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.counting import shares

COUNTS = st.lists(st.integers(1, 10**12), min_size=1, max_size=40)
LARGEST = st.floats(0.001, 1.0)


@pytest.mark.parametrize(
    ("counts", "largest", "expected"),
    [
        ([10, 20, 70], 1.0, [0.1, 0.2, 0.7]),
        ([10, 20, 70], 0.5, [1 / 6, 1 / 3, 0.5]),  # what is cut from 70 goes to the others as 10 : 20
        ([1, 1, 98], 0.4, [0.3, 0.3, 0.4]),
        ([1, 10, 89], 0.5, [1 / 22, 10 / 22, 0.5]),
        ([1, 30, 69], 0.4, [0.2, 0.4, 0.4]),  # cutting the largest lifts the second above the limit
        ([5, 5], 0.1, [0.5, 0.5]),  # less than an equal share is no limit that can be kept
        ([1, 10**12], 0.1, [0.5, 0.5]),
        ([7], 0.1, [1.0]),
        ([], 0.5, []),
    ],
)
def test_shares_worked_by_hand(counts: list[int], largest: float, expected: list[float]) -> None:
    assert shares(counts, largest) == pytest.approx(expected)


@given(counts=COUNTS, largest=LARGEST)
@settings(deadline=None)
def test_shares_sum_to_one_and_none_is_above_the_limit_or_nothing(counts: list[int], largest: float) -> None:
    found = shares(counts, largest)

    assert math.fsum(found) == pytest.approx(1, abs=1e-12)
    assert all(0 < share <= max(largest, 1 / len(counts)) + 1e-12 for share in found)


@given(counts=COUNTS, largest=LARGEST)
@settings(deadline=None)
def test_more_examples_never_weigh_less(counts: list[int], largest: float) -> None:
    ordered = [share for _, share in sorted(zip(counts, shares(counts, largest), strict=True))]

    assert all(low <= high + 1e-12 for low, high in itertools.pairwise(ordered))


@given(counts=COUNTS, largest=LARGEST, seed=st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_order_of_the_contributions_does_not_matter(counts: list[int], largest: float, seed: object) -> None:
    order = list(range(len(counts)))
    seed.shuffle(order)  # type: ignore[attr-defined]
    found, mixed = shares(counts, largest), shares([counts[i] for i in order], largest)

    assert mixed == pytest.approx([found[i] for i in order], abs=1e-12)


@given(counts=COUNTS)
@settings(deadline=None)
def test_without_a_limit_shares_are_in_proportion(counts: list[int]) -> None:
    assert shares(counts, 1.0) == pytest.approx([count / sum(counts) for count in counts])
