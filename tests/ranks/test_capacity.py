"""The capacity policy: each consideration by hand, and its laws."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import ranks, sizes
from coordinator.ranks import Candidate, Measured, Population
from protocol import errors
from protocol.plan import CausalLM, Dtype, Plan
from protocol.views import RankView
from tests.ranks.small import make_candidate, make_measured, make_plan

EQUALS = Population((80, 80, 80))
LADDER = [2, 4, 8, 16]

# the estimate for rank 2 is 405.12 MB, for rank 16 405.20 MB, of which 90 % may be used; a quarter more with head-room
memories = st.integers(450_100_000, 450_300_000) | st.integers(449_000_000, 570_000_000)
speeds = st.floats(1e6, 1e10)  # at the slowest, a step takes five times as long as a job may
links = st.floats(100, 20_000)
rows = st.integers(0, 400)
previous = st.sampled_from([None, *LADDER])


def choose(candidate: Candidate, plan: Plan | None = None, population: Population = EQUALS) -> RankView:
    return ranks.choose(plan or make_plan(), candidate, population)


def test_a_client_that_can_do_everything_gets_the_largest_rank() -> None:
    view = choose(make_candidate())
    assert view.rank == 16
    assert view.reason == "16: the ladder's largest rank fits the client's memory, link and data"
    assert view.limits == {"owner": None, "memory": 16, "link": None, "data": 16}


def test_memory_holds_base_activations_and_optimiser_state() -> None:
    # 4·10⁶ + 4·17·128·2·64 = 5,114,112; and for each rank 16·256 of training state and 4·128·2 of activations: 5,120
    needed = 5_114_112 + 8 * 5_120
    plan = make_plan(options={"memory_share": 0.5})
    assert choose(make_candidate(device="H200", memory=2 * needed), plan).limits["memory"] == 8
    assert choose(make_candidate(device="H200", memory=2 * needed - 2), plan).limits["memory"] == 4


def test_on_the_machines_own_memory_the_process_counts_too() -> None:
    needed, plan = 400_000_000 + 5_114_112 + 8 * 5_120, make_plan(options={"memory_share": 1.0})
    assert choose(make_candidate(device="cpu", memory=needed), plan).limits["memory"] == 8
    assert choose(make_candidate(device="cpu", memory=needed - 1), plan).limits["memory"] == 4


@pytest.mark.parametrize(
    ("wish", "precisions", "width"),
    [
        ("auto", (Dtype.float32,), 4),
        ("auto", (Dtype.float32, Dtype.bfloat16), 2),
        ("float32", (Dtype.float32, Dtype.bfloat16), 4),
        ("float16", (Dtype.float32,), 2),
    ],
)
def test_half_precision_halves_base_and_activations(wish: str, precisions: tuple[Dtype, ...], width: int) -> None:
    plan = make_plan(options={"memory_share": 1.0})
    plan = plan.model_copy(update={"training": plan.training.model_copy(update={"precision": wish})})
    needed = 5_114_112 // 4 * width + 16 * 5_120
    assert choose(make_candidate(device="H200", memory=needed, precisions=precisions), plan).limits["memory"] == 16
    assert choose(make_candidate(device="H200", memory=needed - 1, precisions=precisions), plan).limits["memory"] == 8


def test_a_language_models_logits_count() -> None:
    plan = make_plan(options={"memory_share": 1.0}).model_copy(update={"task": CausalLM(max_length=16)})
    needed = 5_114_112 + 8 * 128 * 1_000 + 16 * 5_120
    assert choose(make_candidate(device="H200", memory=needed), plan).limits["memory"] == 16
    assert choose(make_candidate(device="H200", memory=needed - 1), plan).limits["memory"] == 8


def test_the_measured_peak_replaces_the_estimate() -> None:
    measured = make_measured(2, peak_memory_bytes=60_000_000)
    budget = 60_000_000 + 2 * 5_120  # rank 4 trains two ranks more than were measured
    view = choose(make_candidate(memory=budget, measured=measured), make_plan(options={"memory_share": 1.0}))
    assert view.limits["memory"] == 4
    assert view.reason == "4: the memory (60 MB of 60 MB usable, 60 MB measured at rank 2) holds at most rank 4"


def test_the_link_carries_a_slice_down_and_one_up_in_its_share_of_the_job() -> None:
    seconds = 25  # a quarter of the job's 100 s
    speed = 2 * sizes.start_bytes(make_plan(), 8) / seconds
    view = choose(make_candidate(link=speed * 1.001))
    assert view.rank == 8
    assert view.reason == "8: the link (698 bytes/s down, 698 bytes/s up) carries at most rank 8 in 25 % of the job's time"
    assert choose(make_candidate(link=speed * 0.999)).rank == 4


def test_the_speeds_that_were_reached_replace_the_declared_ones() -> None:
    speed = 2 * sizes.start_bytes(make_plan(), 4) / 25 * 1.001
    measured = make_measured(16, download_bytes=1000, download_seconds=1000 / speed, upload_bytes=3000, upload_seconds=3000 / speed)
    assert choose(make_candidate(link=1e9, measured=measured)).rank == 4


def test_a_download_that_was_not_needed_says_nothing_of_the_link() -> None:
    assert choose(make_candidate(link=1e9, measured=make_measured(16, download_bytes=0, download_seconds=0.5))).rank == 16


def test_a_slow_machine_keeps_its_rank_and_takes_fewer_steps() -> None:
    """A deadline is met by fewer steps: a step takes nearly as long at any rank."""
    slow = make_candidate(speed=1e7)
    assert choose(slow).rank == 16
    assert 1 <= ranks.steps_within(make_plan(), slow, 16, 100) < 10


def test_fewer_examples_than_the_typical_client_support_a_smaller_rank() -> None:
    # degrees of freedom of 64 × 64: 4 (128 − 4) = 496 and 16 (128 − 16) = 1792; 496 / 1792 of 80 rows are 22.1
    assert choose(make_candidate(examples=23)).rank == 4
    assert choose(make_candidate(examples=22)).rank == 2
    assert choose(make_candidate(examples=23)).reason == "4: its 23 examples (the typical client has 80) support at most rank 4"


def test_one_huge_client_pushes_nobody_down() -> None:
    assert choose(make_candidate(examples=80), population=Population((70, 80, 10**9))).rank == 16


def test_where_nobody_else_is_known_the_data_set_no_limit() -> None:
    assert choose(make_candidate(examples=1), population=Population(())).limits["data"] is None


def test_two_reasons_that_bind_alike_are_both_told() -> None:
    view = choose(make_candidate(examples=23, link=2 * sizes.start_bytes(make_plan(), 4) / 25 * 1.001))
    assert "the link" in view.reason
    assert " and its 23 examples" in view.reason


def test_a_rank_rises_only_with_head_room() -> None:
    speed = 2 * sizes.start_bytes(make_plan(), 16) / 25
    held = choose(make_candidate(link=speed * 1.2, previous=8))
    assert held.rank == 8
    assert held.reason == "8: rank 16 would fit, but with less than 25 % to spare on link: too little to rise so far"
    assert choose(make_candidate(link=speed * 1.26, previous=8)).rank == 16
    assert choose(make_candidate(link=speed * 1.2)).rank == 16


def test_a_rank_falls_at_once() -> None:
    speed = 2 * sizes.start_bytes(make_plan(), 16) / 25
    assert choose(make_candidate(link=speed * 0.99, previous=16)).rank == 8


def test_a_client_with_as_many_examples_as_all_others_can_rise() -> None:
    assert choose(make_candidate(examples=80, previous=2)).rank == 16


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (make_candidate(memory=1_000_000), "memory: it needs 405 MB, and 900 kB may be used"),
        (make_candidate(link=10), "link: it needs 514 s, and 25 s may be used"),
    ],
)
def test_a_client_that_not_even_the_smallest_rank_fits_is_told_why(candidate: Candidate, reason: str) -> None:
    assert ranks.fits(make_plan(), candidate) == f"not even rank 2 fits the client's {reason}"


def test_an_accepted_job_proves_that_the_smallest_rank_fits() -> None:
    candidate = make_candidate(memory=1_000_000, measured=make_measured(4, peak_memory_bytes=2_000_000))
    assert ranks.fits(make_plan(), candidate) is None
    assert choose(candidate).rank == 2


def test_a_plan_without_layout_must_be_resolved_first() -> None:
    with pytest.raises(errors.InvalidPlan, match="resolve it against its base model first"):
        ranks.fits(make_plan().model_copy(update={"layout": None}), make_candidate())


def rank_of(
    memory: int, speed: float, link: float, examples: int, before: int | None, measured: Measured | None = None, job: float = 100.0
) -> int:
    """The rank, or 0 for a client that cannot take part."""
    plan = make_plan(job=job)
    candidate = make_candidate(memory=memory, speed=speed, link=link, examples=examples, previous=before, measured=measured)
    return 0 if ranks.fits(plan, candidate) else ranks.choose(plan, candidate, EQUALS).rank


@given(memories, memories, speeds, speeds, links, links, rows, previous)
@settings(deadline=None, max_examples=100)
def test_more_memory_speed_and_link_never_lower_a_rank(
    m1: int, m2: int, s1: float, s2: float, l1: float, l2: float, examples: int, before: int | None
) -> None:
    weak = rank_of(min(m1, m2), min(s1, s2), min(l1, l2), examples, before)
    strong = rank_of(max(m1, m2), max(s1, s2), max(l1, l2), examples, before)
    assert weak <= strong


@given(memories, links, rows, rows, previous)
@settings(deadline=None, max_examples=60)
def test_more_examples_never_lower_a_rank(memory: int, link: float, n1: int, n2: int, before: int | None) -> None:
    few, many = sorted((n1, n2))
    assert rank_of(memory, 1e10, link, few, before) <= rank_of(memory, 1e10, link, many, before)


@given(memories, st.floats(1e8, 1e12), st.floats(1e8, 1e12), links, rows, previous)
@settings(deadline=None, max_examples=60)
def test_a_machines_speed_is_no_matter_of_its_rank(
    memory: int, s1: float, s2: float, link: float, examples: int, before: int | None
) -> None:
    assert rank_of(memory, s1, link, examples, before) == rank_of(memory, s2, link, examples, before)


@given(memories, speeds, links, rows)
@settings(deadline=None, max_examples=60)
def test_what_was_chosen_is_chosen_again(memory: int, speed: float, link: float, examples: int) -> None:
    first = rank_of(memory, speed, link, examples, None)
    assert rank_of(memory, speed, link, examples, first or None) == first


@given(memories, speeds, links, rows, st.sampled_from(LADDER))
@settings(deadline=None, max_examples=60)
def test_history_never_gives_more_than_what_fits_nor_less_than_it_was_unless_it_must_fall(
    memory: int, speed: float, link: float, examples: int, before: int
) -> None:
    fitting = rank_of(memory, speed, link, examples, None)
    assert min(before, fitting) <= rank_of(memory, speed, link, examples, before) <= fitting
