"""Who starts from the whole adapter, where a strategy hands it out to whom can carry it: nobody is left out, and no rank falls for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import ranks, sizes
from coordinator.ranks import Candidate, Measured, Population
from protocol.contents import HEADER_SLACK
from protocol.messages import Usage
from protocol.plan import Choice, Plan
from protocol.views import RankView
from tests.ranks.small import LAYOUT, make_candidate, make_plan

CAP = 32


def plan_of(strategy: str, policy: str = "capacity", **options: float) -> Plan:
    return make_plan(policy, options=options).model_copy(update={"strategy": Choice(name=strategy), "cap": CAP})


FOLDED, DELTA = plan_of("folded"), plan_of("delta")


def choose(plan: Plan, seen: Candidate, seconds: float = 100.0) -> RankView:
    return ranks.begin(plan, seen, ranks.choose(plan, seen, Population(examples=(80,))), seconds)


def both_ways(rank: int, *, whole: bool) -> int:
    return sizes.start_bytes(FOLDED, rank, whole=whole) + sizes.upload_bytes(FOLDED, rank)


def test_who_can_carry_everything_starts_from_the_whole_adapter() -> None:
    view = choose(FOLDED, make_candidate())
    assert (view.rank, view.whole) == (16, True)
    assert view.reason.endswith("; it starts from the whole adapter")


@given(
    memory=st.integers(10**7, 10**9),
    link=st.floats(10.0, 1e6),
    max_bytes=st.none() | st.integers(10**3, 10**6),
    examples=st.integers(1, 200),
    speed=st.floats(1e7, 1e12),
)
def test_ranks_and_who_may_take_part_are_those_of_delta(
    memory: int, link: float, max_bytes: int | None, examples: int, speed: float
) -> None:
    seen = make_candidate(memory=memory, link=link, max_bytes=max_bytes, examples=examples, speed=speed)
    assert ranks.fits(FOLDED, seen) == ranks.fits(DELTA, seen)
    if ranks.fits(FOLDED, seen) is None:
        assert choose(FOLDED, seen).rank == choose(DELTA, seen).rank
        assert choose(DELTA, seen).whole is None


def test_a_link_that_carries_the_rank_alone_gets_the_slice_and_the_reason_says_so() -> None:
    enough = both_ways(16, whole=True) / 25  # a quarter of 100 s
    assert choose(FOLDED, make_candidate(link=enough * 1.001)).whole is True
    view = choose(FOLDED, make_candidate(link=enough * 0.999))
    assert (view.rank, view.whole) == (16, False)
    assert "it starts from its slice: with the whole adapter a job takes 25 s of its link, and 25 s may be used" in view.reason


def test_an_owners_bytes_are_kept() -> None:
    enough = both_ways(16, whole=True) + HEADER_SLACK
    assert choose(FOLDED, make_candidate(max_bytes=enough)).whole is True
    view = choose(FOLDED, make_candidate(max_bytes=enough - 1))
    assert (view.rank, view.whole) == (16, False)
    assert f"{enough - 1:,} bytes a job" in view.reason


def test_a_slice_at_the_cap_is_the_whole_adapter_however_slow_the_link_is() -> None:
    """So that nobody has both of one file."""
    plan = make_plan(ladder=(16,)).model_copy(update={"strategy": Choice(name="folded")})
    measured = Measured(16, Usage(download_bytes=1000, download_seconds=1000.0))
    view = choose(plan, make_candidate(measured=measured))
    assert (view.rank, view.whole) == (16, True)


def test_who_failed_with_the_whole_adapter_gets_its_slice_next() -> None:
    assert choose(FOLDED, replace(make_candidate(), overburdened=True)).whole is False


def test_a_job_that_is_short_of_time_starts_from_a_slice_if_the_whole_adapter_costs_it_a_step() -> None:
    seen = make_candidate(link=both_ways(16, whole=True) / 24)  # 24 s
    assert choose(FOLDED, seen).whole is True
    assert ranks.steps_within(FOLDED, seen, 16, 25.0) > ranks.steps_within(FOLDED, seen, 16, 25.0, whole=True)
    assert choose(FOLDED, seen, 25.0).whole is False


def test_who_had_a_slice_needs_head_room_for_the_whole_adapter_and_who_had_it_does_not() -> None:
    """A link that wavers does not change the start in every round."""
    budget, need = 25.0, both_ways(16, whole=True)
    for spare, after_slice in ((1.1, False), (1.3, True)):
        speed = need / budget * spare
        usage = Usage(download_bytes=int(1000 * speed), download_seconds=1000, upload_bytes=int(1000 * speed), upload_seconds=1000)
        assert choose(FOLDED, make_candidate(measured=Measured(16, usage, whole=True))).whole is True
        assert choose(FOLDED, make_candidate(measured=Measured(16, usage, whole=False))).whole is after_slice


def least_memory(want_whole: bool) -> int:
    """The least memory, in bytes, with which a client has the largest rank, and the whole adapter too if that is wanted."""
    plan, low, high = plan_of("folded", memory_share=1.0), 10**6, 10**10
    while high - low > 1:
        middle = (low + high) // 2
        seen = make_candidate(memory=middle, device="a card")
        view = choose(plan, seen) if ranks.fits(plan, seen) is None else None
        enough = view is not None and view.rank == 16 and (bool(view.whole) or not want_whole)
        low, high = (low, middle) if enough else (middle, high)
    return high


def test_frozen_numbers_take_four_bytes_of_memory_each() -> None:
    assert least_memory(want_whole=True) - least_memory(want_whole=False) == 4 * (LAYOUT.numbers(CAP) - LAYOUT.numbers(16))


def test_the_whole_adapter_costs_nobody_a_step() -> None:
    """Also under policies that look at no machine: ten steps in 80 % of 100 s, of which the link takes its part."""
    plan = plan_of("folded", "fixed")
    frozen = 8 * 16 * 4 * (LAYOUT.numbers(CAP) - LAYOUT.numbers(16))  # operations of a step
    own = 8 * 16 * (4 * LAYOUT.base.parameters + 6 * LAYOUT.numbers(16) - 4 * 1000 * 64)
    assert choose(plan, make_candidate(speed=(own + frozen) * 10 / 80 * 1.001)).whole is True
    assert choose(plan, make_candidate(speed=(own + frozen) * 10 / 80 * 0.999)).whole is False


@pytest.mark.parametrize("whole", [False, True])
def test_what_a_job_measured_is_of_what_it_held(whole: bool) -> None:
    """A step and a peak, carried over to the other way of starting and back, are the same."""
    measured = Measured(16, Usage(step_seconds=2.0, peak_memory_bytes=10**8), whole=whole)
    seen = make_candidate(measured=measured)
    assert ranks.step_seconds(FOLDED, seen, 16, whole=whole) == 2.0
    other = ranks.step_seconds(FOLDED, seen, 16, whole=not whole)
    assert (other < 2.0) is whole

    own = 4 * (LAYOUT.numbers(CAP) - LAYOUT.numbers(16))
    tight = 10**8 if whole else 10**8 + own
    plan = plan_of("folded", memory_share=1.0, head_room=0.0)
    assert choose(plan, make_candidate(memory=tight, measured=measured)).whole is True
    assert choose(plan, make_candidate(memory=tight - 1, measured=measured)).whole is False
