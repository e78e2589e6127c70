"""What a rank takes under each strategy: computed from counts, held against the files that travel."""

from __future__ import annotations

import re

import pytest
import torch

from coordinator import aggregation, ranks, sizes
from coordinator.ranks import Population
from protocol.compact import trained_parts
from protocol.contents import Label
from protocol.plan import Choice, Dtype, Plan, Sides
from protocol.slices import Factors, Slice, parts
from tests.ranks.small import LAYOUT, make_candidate, make_plan

CAP = 32
SHARES = {"folded": CAP, "rotating": CAP, "fedex": CAP, "flora": CAP + 4}  # directions that rank 4 starts from


def plan_of(strategy: str, **options: float) -> Plan:
    return make_plan(options=options).model_copy(update={"strategy": Choice(name=strategy), "cap": CAP})


def length(plan: Plan, rank: int, sides: Sides) -> int:
    factors = {m: Factors(b=torch.zeros(64, rank), a=torch.zeros(rank, 64)) for m in LAYOUT.modules}
    return len(b"".join(parts(Slice(Label(rank=rank, scale=1.0, round=3), factors), LAYOUT, plan.wire, sides)))


@pytest.mark.parametrize("name", aggregation.names())
def test_files_down_and_up_are_about_as_long_as_estimated_and_never_longer(name: str) -> None:
    plan, sides = plan_of(name), aggregation.load(name).sides
    down, up = length(plan, SHARES.get(name, 4), Sides.both), length(plan, 4, sides)
    assert down <= sizes.start_bytes(plan, 4, whole=True) <= down + 400
    assert up <= sizes.upload_bytes(plan, 4) <= up + 800
    both_ways = sizes.start_bytes(plan, 4, whole=True) + sizes.upload_bytes(plan, 4)
    assert ranks.link_seconds(plan, make_candidate(link=1000), 4, whole=True) == pytest.approx(both_ways / 1000)


@pytest.mark.parametrize("name", ["delta", "ffa"])
@pytest.mark.parametrize("uploads", Dtype)
def test_the_file_up_follows_the_plans_uploads_and_the_one_down_does_not(uploads: Dtype, name: str) -> None:
    plan, sides = plan_of(name).model_copy(update={"uploads": uploads}), aggregation.load(name).sides
    factors = {m: Factors(b=torch.zeros(64, 16), a=torch.zeros(16, 64)) for m in LAYOUT.modules}
    slice = Slice(Label(rank=16, scale=1.0, round=3), factors)
    up = len(b"".join(trained_parts(slice, slice, LAYOUT, uploads, sides=sides)))
    assert up <= sizes.upload_bytes(plan, 16) <= up + 1200
    assert sizes.start_bytes(plan, 16) == sizes.start_bytes(plan_of(name), 16)
    both_ways = sizes.start_bytes(plan, 16) + sizes.upload_bytes(plan, 16)
    assert ranks.link_seconds(plan, make_candidate(link=1000), 16) == pytest.approx(both_ways / 1000)


@pytest.mark.parametrize("name", aggregation.names())
def test_what_a_strategy_says_of_its_traffic_is_what_travels(name: str) -> None:
    plan, kind = plan_of(name), aggregation.load(name)
    for said, numbers in (
        (aggregation.DOWN[kind.portion], sizes.held_numbers(plan, 4, whole=True)),
        (aggregation.UP[kind.sides], sizes.trained_numbers(plan, 4)),
    ):
        of_a_module = re.sub(r"(?<=[\w)]) (?=\w)", " * ", said).replace("R_g", str(CAP))
        assert sum(eval(of_a_module, {"r": 4, "D": n_out + n_in, "n_out": n_out}) for n_out, n_in in LAYOUT.modules.values()) == numbers


def test_what_is_frozen_costs_a_step_no_gradients_of_its_own() -> None:
    """4 for each number that is handed out, 2 more for each that is trained."""
    whole, part = (ranks.step_seconds(plan_of(name), make_candidate(speed=1.0), 4) for name in ("rotating", "delta"))
    assert whole - part == pytest.approx(8 * 16 * 4 * (LAYOUT.numbers(CAP) - LAYOUT.numbers(4)))
    both, b_alone = (ranks.step_seconds(plan_of(name), make_candidate(speed=1.0), 4) for name in ("delta", "ffa"))
    assert both - b_alone == pytest.approx(8 * 16 * 2 * LAYOUT.numbers(4) / 2)


def least_memory(name: str) -> int:
    """The least memory, in bytes, with which a client is given the largest rank."""
    plan, low, high = plan_of(name, memory_share=1.0), 10**6, 10**10
    while high - low > 1:
        middle = (low + high) // 2
        seen = make_candidate(memory=middle, device="a card")
        enough = ranks.fits(plan, seen) is None and ranks.choose(plan, seen, Population(examples=(80,))).rank == 16
        low, high = (low, middle) if enough else (middle, high)
    return high


def test_frozen_numbers_take_four_bytes_of_memory_each_where_trained_ones_take_sixteen() -> None:
    assert least_memory("rotating") - least_memory("delta") == 4 * (LAYOUT.numbers(CAP) - LAYOUT.numbers(16))
    assert least_memory("delta") - least_memory("ffa") == (16 - 4) * LAYOUT.numbers(16) // 2


def test_an_owners_bytes_are_those_of_the_file_that_is_handed_out() -> None:
    room = 2 * sizes.start_bytes(plan_of("delta"), 4) + 5000
    seen = make_candidate(max_bytes=room)
    assert ranks.allowed(plan_of("delta"), seen.profile) == [2, 4]
    assert ranks.allowed(plan_of("rotating"), seen.profile) == []
    assert "bytes a job" in str(ranks.fits(plan_of("rotating"), seen))
