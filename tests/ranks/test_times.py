"""What a job takes of a client's time, whatever the policy: fewer steps where the deadline is near, no job where there is no time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import ranks, sizes
from tests.ranks.small import make_candidate, make_measured, make_plan

PLAN = make_plan("fixed")  # ten steps of 8 · 16 tokens for eighty rows, in a job of 100 s


def operations(rank: int) -> float:
    """4 · (10⁶ − 1000 · 64) for the base without its embedding table, and 6 · 256 for each rank, for each token."""
    return 128 * (4 * 936_000 + 6 * 256 * rank)


def test_a_step_takes_the_operations_of_base_and_adapter() -> None:
    assert ranks.step_seconds(PLAN, make_candidate(speed=1e9), 8) == pytest.approx(operations(8) / 1e9)


def test_a_measured_step_replaces_the_declared_speed_and_is_scaled_to_the_rank() -> None:
    measured = make_candidate(speed=1e9, measured=make_measured(4, step_seconds=2.0))
    assert ranks.step_seconds(PLAN, measured, 4) == 2.0
    assert ranks.step_seconds(PLAN, measured, 16) == pytest.approx(2.0 * operations(16) / operations(4))


def test_the_link_takes_a_slice_down_and_one_up_where_its_speeds_are_known() -> None:
    bytes = sizes.start_bytes(PLAN, 8)
    assert ranks.link_seconds(PLAN, make_candidate(link=1000), 8) == pytest.approx(2 * bytes / 1000)
    assert ranks.link_seconds(PLAN, make_candidate(), 8) == 0
    half = make_candidate(measured=make_measured(2, upload_bytes=500, upload_seconds=1.0))
    assert ranks.link_seconds(PLAN, half, 8) == pytest.approx(bytes / 500)


@pytest.mark.parametrize(
    ("seconds", "steps"),
    [
        (100.0, 10),  # all of the plan's, in 20 of the 80 s that may be planned
        (25.0, 10),  # exactly
        (24.9, 9),
        (12.5, 5),
        (2.5, 1),
        (2.1, 1),  # one step fits, though not within the share
        (1.9, 0),
        (0.0, 0),
    ],
)
def test_steps_of_two_seconds_within_four_fifths_of_the_time(seconds: float, steps: int) -> None:
    assert ranks.steps_within(PLAN, make_candidate(measured=make_measured(4, step_seconds=2.0)), 4, seconds) == steps


def test_what_the_link_takes_is_not_left_for_steps() -> None:
    bytes = sizes.start_bytes(PLAN, 4)
    usage = {"download_bytes": bytes, "download_seconds": 3.0, "upload_bytes": bytes, "upload_seconds": 5.0}
    candidate = make_candidate(measured=make_measured(4, step_seconds=2.0, **usage))
    assert ranks.steps_within(PLAN, candidate, 4, 25) == 6  # (0.8 · 25 − 8) / 2
    assert ranks.steps_within(PLAN, candidate, 4, 9.9) == 0


@pytest.mark.parametrize("name", ["capacity", "fixed"])
def test_a_client_whose_single_step_is_longer_than_a_job_takes_no_part_until_a_job_proves_otherwise(name: str) -> None:
    plan = make_plan(name, options={})
    assert ranks.fits(plan, make_candidate(speed=1e6)) == (
        "a job has 100 s; a single step at rank 2 takes about 480 s, and slices 0 s on the link"
    )
    assert ranks.fits(plan, make_candidate(speed=1e6, measured=make_measured(2))) is None


@given(st.floats(0, 1e6), st.floats(5e-324, 1e9), st.integers(0, 10**12), st.none() | st.floats(1e-6, 1e12))
@settings(deadline=None, max_examples=100)
def test_steps_are_never_more_than_the_plans_nor_more_than_fit(seconds: float, step: float, rows: int, link: float | None) -> None:
    candidate = make_candidate(examples=rows, link=link, measured=make_measured(4, step_seconds=step))
    found = ranks.steps_within(PLAN, candidate, 4, seconds)
    assert 0 <= found <= PLAN.training.steps(rows)
    assert found * step + ranks.link_seconds(PLAN, candidate, 4) <= seconds * (1 + 1e-9) or found == 0
