"""The two policies that look at no machine."""

from __future__ import annotations

import pytest
from pydantic import JsonValue

from coordinator import ranks
from coordinator.ranks import Population
from protocol import errors
from tests.ranks.small import make_candidate, make_plan

NOBODY = Population(())
TABLE: dict[str, JsonValue] = {"phone": 2, "server": 16}


def test_fixed_gives_everybody_the_ladders_largest_rank() -> None:
    view = ranks.choose(make_plan("fixed", (2, 8)), make_candidate(memory=1), NOBODY)
    assert (view.rank, view.reason) == (8, "8: the plan gives every client the same rank")


def test_fixed_gives_everybody_the_rank_of_its_option() -> None:
    assert ranks.choose(make_plan("fixed", (2, 8), {"rank": 2}), make_candidate(), NOBODY).rank == 2


def test_fixed_refuses_a_rank_beside_the_ladder() -> None:
    with pytest.raises(errors.InvalidPlan, match=r"rank 4 is not on the ladder \[2, 8\]"):
        ranks.check(make_plan("fixed", (2, 8), {"rank": 4}).ranks)


def test_fixed_leaves_out_whom_the_owner_allows_less() -> None:
    assert ranks.fits(make_plan("fixed", (2, 8)), make_candidate(largest_rank=4)) == (
        "the plan gives every client rank 8; the device's owner allows at most rank 4"
    )


def test_labels_gives_the_rank_of_the_clients_label() -> None:
    view = ranks.choose(make_plan("labels", options={"table": TABLE}), make_candidate(labels={"class": "phone"}), NOBODY)
    assert (view.rank, view.reason) == (2, "2: the client is labelled class = phone")


def test_labels_looks_at_the_label_that_the_plan_names() -> None:
    plan = make_plan("labels", options={"label": "gpu", "table": {"a100": 16}, "default": 2})
    assert ranks.choose(plan, make_candidate(labels={"gpu": "a100", "class": "phone"}), NOBODY).rank == 16


@pytest.mark.parametrize(
    ("labels", "said"), [({}, "the client has no label 'class'"), ({"class": "watch"}, "the client is labelled class = watch")]
)
def test_labels_gives_the_default_to_whom_the_table_does_not_name(labels: dict[str, str], said: str) -> None:
    view = ranks.choose(make_plan("labels", options={"table": TABLE, "default": 4}), make_candidate(labels=labels), NOBODY)
    assert (view.rank, view.reason) == (4, f"4: {said}, so it gets the table's default")


def test_labels_without_a_default_leaves_out_whom_the_table_does_not_name() -> None:
    reason = ranks.fits(make_plan("labels", options={"table": TABLE}), make_candidate())
    assert reason == "the client has no label 'class', for which the plan's table has no rank and no default"


def test_labels_gives_the_largest_rung_that_the_owner_allows() -> None:
    view = ranks.choose(make_plan("labels", options={"table": TABLE}), make_candidate(labels={"class": "server"}, largest_rank=9), NOBODY)
    assert view.rank == 8
    assert view.reason == "8: the table gives rank 16, but the device's owner allows at most rank 9"
    assert view.limits == {"label": 16, "owner": 8}


@pytest.mark.parametrize("options", [{"table": {"phone": 3}}, {"table": TABLE, "default": 3}])
def test_labels_refuses_ranks_beside_the_ladder(options: dict[str, JsonValue]) -> None:
    with pytest.raises(errors.InvalidPlan, match="has rank 3, which is not on the ladder"):
        ranks.check(make_plan("labels", options=options).ranks)


def test_labels_needs_a_table() -> None:
    with pytest.raises(errors.InvalidPlan, match="table: Field required; its options are label, table, default"):
        ranks.check(make_plan("labels").ranks)
