"""Statistics against values that were worked out by hand, or stand in tables of Student's t."""

from __future__ import annotations

import pytest

from experiments.intervals import Interval, beyond, difference, interval, quantile, standing
from experiments.summary import area, reached


def test_an_interval_is_the_mean_and_students_t_times_the_standard_error() -> None:
    """1, 2, 3, 4, 5: mean 3, s = √2.5, standard error √0.5 = 0.70711, t(4) = 2.7764."""
    found = interval([1, 2, 3, 4, 5])
    assert (found.mean, found.count) == (3, 5)
    assert found.half == pytest.approx(2.7764 * 0.5**0.5)


def test_one_value_has_no_interval() -> None:
    assert interval([2.5]).half is None
    assert not interval([2.5]).apart


def test_differences_are_taken_seed_by_seed_over_the_seeds_that_both_have() -> None:
    """−1, −2, −3: mean −2, s = 1, half = 4.3027 / √3 = 2.4842; the values themselves spread a hundred times as wide."""
    ours, theirs = {0: 99.0, 1: 198.0, 2: 297.0, 7: 5.0}, {0: 100.0, 1: 200.0, 2: 300.0, 8: 6.0}
    found = difference(ours, theirs)
    assert found is not None
    assert (found.mean, found.count) == (-2, 3)
    assert found.half == pytest.approx(2.4842, abs=1e-4)
    assert not found.apart
    assert difference({0: 1.0}, {1: 2.0}) is None


def test_a_difference_whose_interval_leaves_out_zero_is_one() -> None:
    found = difference({0: 1.0, 1: 1.1, 2: 0.9}, {0: 2.0, 1: 2.11, 2: 1.89})
    assert found is not None
    assert found.apart


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.7062), (4, 2.7764), (9, 2.2622), (30, 2.0423), (40, 2.0211), (60, 2.0003), (120, 1.9799)]
)
def test_students_t_is_that_of_the_tables(freedom: int, expected: float) -> None:
    assert quantile(freedom) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 9, 29, 30])
def test_what_lies_beyond_students_t_is_a_twentieth_of_it(freedom: int) -> None:
    assert beyond(quantile(freedom), freedom) == pytest.approx(0.05, abs=2e-5)
    assert beyond(0.0, freedom) == pytest.approx(1)


def test_what_lies_beyond_is_what_tables_say_elsewhere_too() -> None:
    """t(4) = 3.7469 at 2 %, t(7) = 3.4995 at 1 %, t(1) = 1 at 50 %."""
    assert [beyond(3.7469, 4), beyond(3.4995, 7), beyond(1.0, 1)] == pytest.approx([0.02, 0.01, 0.5], abs=1e-5)


def test_by_holm_a_difference_stands_against_all_that_are_no_clearer() -> None:
    """Three: 0.01 stands against 0.05 / 3, then 0.04 does not against 0.05 / 2, and 0.045, which alone would, is not asked any more."""

    def at(chance: float) -> Interval:
        return Interval(1.0, quantile(4) / next(t / 1000 for t in range(10_000) if beyond(t / 1000, 4) <= chance), 5)

    assert at(0.04).chance == pytest.approx(0.04, abs=1e-3)
    assert standing({"a": at(0.04), "b": at(0.01), "c": at(0.045)}) == {"b"}
    assert standing(dict(enumerate([at(0.001), at(0.002), at(0.003)]))) == {0, 1, 2}
    assert standing({}) == standing({"one seed": Interval(1.0, None, 1)}) == set()
    assert standing({"no spread": Interval(1.0, 0.0, 5)}) == {"no spread"}


def test_the_area_under_a_curve_is_its_mean_height() -> None:
    """From 4 to 2 over two rounds, then flat for two: (3·2 + 2·2) / 4."""
    assert area([(0, 4.0), (2, 2.0), (4, 2.0)]) == 2.5
    assert area([(0, 4.0)]) == 4.0


def test_a_target_is_reached_between_measures_on_a_straight_line() -> None:
    falling = [(0, 4.0), (5, 3.0), (10, 2.0)]
    assert reached(falling, 2.5, better=-1) == 7.5
    assert reached(falling, 4.0, better=-1) == 0
    assert reached(falling, 1.9, better=-1) is None
    assert reached([(0, 0.5), (4, 0.7)], 0.6, better=1) == pytest.approx(2)
