"""Whatever numbers a client gives of itself within the bounds of messages, it gets a rank and steps, or a reason; nothing raises."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import JsonValue

from coordinator import ranks
from coordinator.ranks import Candidate, Measured, Population
from protocol.messages import Profile, Usage
from tests.ranks.small import make_plan

OPTIONS: dict[str, dict[str, JsonValue]] = {"labels": {"table": {"a": 4}, "default": 2}}
PLANS = {name: make_plan(name, options=OPTIONS.get(name, {})) for name in ranks.names()}


def positive(largest: float) -> st.SearchStrategy[float]:
    """Those near the ends more often than by chance."""
    return st.sampled_from([5e-324, 1e-320, 1e-300, 1.0, largest]) | st.floats(5e-324, largest)


def whole(most: int) -> st.SearchStrategy[int]:
    return st.sampled_from([0, 1, most]) | st.integers(0, most)


SECONDS = st.just(0.0) | positive(1e9)
BYTES = whole(2**53 - 1)
USAGES: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "seconds": SECONDS,
        "steps": whole(10**12),
        "step_seconds": positive(1e9),
        "peak_memory_bytes": BYTES,
        "download_bytes": BYTES,
        "download_seconds": SECONDS,
        "upload_bytes": BYTES,
        "upload_seconds": SECONDS,
    },
)
PROFILES: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "memory_bytes": whole(2**53 - 1).filter(bool),
        "training_flops": positive(1e18),
        "up_bytes_per_second": st.none() | positive(1e12),
        "down_bytes_per_second": st.none() | positive(1e12),
        "datasets": whole(10**12).map(lambda rows: {"texts": {"train": rows}}),
        "limits": st.fixed_dictionaries(
            {}, optional={"largest_rank": whole(10**30).filter(bool), "max_steps": whole(10**30).filter(bool), "max_bytes": BYTES}
        ),
    }
)


@pytest.mark.parametrize("name", PLANS)
@given(
    profile=PROFILES,
    usage=st.none() | USAGES,
    ranked=st.sampled_from([2, 16]),
    seconds=st.floats(0, 1e7),
    more=st.floats(1, 1.3),
    others=whole(10**12),
)
@settings(deadline=None, max_examples=200)
def test_no_number_that_a_client_gives_raises(
    name: str, profile: dict[str, Any], usage: dict[str, Any] | None, ranked: int, seconds: float, more: float, others: int
) -> None:
    plan, known = PLANS[name], Profile.model_validate(profile)
    measured = None if usage is None else Measured(rank=ranked, usage=Usage.model_validate(usage))
    candidate = Candidate(name="odd", labels={}, profile=known, measured=measured, previous=ranked)
    rows = ranks.examples(plan, candidate)

    for rank in plan.ranks.ladder:
        for time in (
            seconds,
            min(1e9, more * ranks.link_seconds(plan, candidate, rank)),
        ):  # the second is little more than slices take of it
            assert 0 <= ranks.steps_within(plan, candidate, rank, time) <= plan.training.steps(rows)
        assert ranks.needs(plan, candidate, rank)
    if ranks.fits(plan, candidate) is None:
        assert ranks.choose(plan, candidate, Population(examples=(rows, others))).rank in plan.ranks.ladder
