"""The folder is the registry of rank policies, and what every policy obeys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import JsonValue

from coordinator import ranks, sizes
from coordinator.ranks import Population
from protocol import errors
from protocol.contents import Label
from protocol.plan import Dtype, Ranks
from protocol.slices import Factors, Slice, pack
from tests.ranks.small import LAYOUT, make_candidate, make_plan

OPTIONS: dict[str, dict[str, JsonValue]] = {"labels": {"table": {"phone": 2, "server": 16}, "default": 4}}
DOCS = Path(__file__).parents[2] / "docs" / "ranks.md"


each_policy = pytest.mark.parametrize("name", ranks.names())


def test_the_folder_holds_the_three_policies() -> None:
    assert ranks.names() == ["capacity", "fixed", "labels"]


@each_policy
def test_every_policy_has_its_section_in_the_docs(name: str) -> None:
    assert f"\n## {name}\n" in DOCS.read_text()


@each_policy
def test_every_option_is_named_in_the_docs(name: str) -> None:
    text = DOCS.read_text().split(f"\n## {name}\n")[1].split("\n## ")[0]
    assert [option for option in ranks.load(name).model_fields if f"`{option}`" not in text] == []


@each_policy
def test_every_policy_is_described_with_the_schema_of_its_options(name: str) -> None:
    described = {d.name: d for d in ranks.describe()}[name]
    assert described.summary.endswith(".")
    assert described.options == ranks.load(name).model_json_schema()


@each_policy
def test_every_policy_refuses_an_option_that_it_does_not_know(name: str) -> None:
    with pytest.raises(errors.InvalidPlan, match="speed: Extra inputs are not permitted"):
        ranks.check(Ranks(name=name, ladder=[2, 4, 16], options={**OPTIONS.get(name, {}), "speed": 1}))


@pytest.mark.parametrize("wrong", ["generous", "os", "__init__", "fixed.Fixed"])
def test_a_name_that_is_not_in_the_folder_loads_nothing(wrong: str) -> None:
    with pytest.raises(errors.InvalidPlan, match=r"no rank policy .*; there are capacity, fixed, labels"):
        ranks.load(wrong)


@each_policy
@given(
    memory=st.integers(5 * 10**8, 10**9),
    speed=st.floats(1e7, 1e12),
    link=st.none() | st.floats(100, 1e7),
    examples=st.integers(0, 500),
    largest_rank=st.none() | st.integers(1, 20),
    max_bytes=st.none() | st.integers(5_000, 60_000),
    previous=st.sampled_from([None, 2, 4, 8, 16]),
    ladder=st.sets(st.sampled_from([2, 4, 8, 16]), min_size=1).map(lambda rungs: tuple(sorted({*rungs, 2, 4, 16}))),
)
@settings(deadline=None, max_examples=40)
def test_a_chosen_rank_is_on_the_ladder_and_within_the_owners_limits(
    name: str,
    memory: int,
    speed: float,
    link: float | None,
    examples: int,
    largest_rank: int | None,
    max_bytes: int | None,
    previous: int | None,
    ladder: tuple[int, ...],
) -> None:
    plan = make_plan(name, ladder, OPTIONS.get(name))
    candidate = make_candidate(
        memory=memory, speed=speed, link=link, examples=examples, largest_rank=largest_rank, max_bytes=max_bytes, previous=previous
    )
    population = Population((examples, 80, 200))
    if ranks.fits(plan, candidate) is not None:
        with pytest.raises(errors.PolicyRefusal):
            ranks.choose(plan, candidate, population)
        return
    view = ranks.choose(plan, candidate, population)
    assert view.rank in ladder
    assert view.rank <= (largest_rank or 16)
    assert max_bytes is None or 2 * sizes.start_bytes(plan, view.rank) <= max_bytes
    assert view.reason.startswith(f"{view.rank}: ")
    assert set(view.limits.values()) <= {None, *ladder}


@each_policy
def test_an_owner_who_allows_less_than_the_smallest_rank_is_left_out_and_told_why(name: str) -> None:
    plan = make_plan(name, (2, 4, 16), OPTIONS.get(name))
    assert ranks.fits(plan, make_candidate(largest_rank=1)) == (
        "the device's owner allows at most rank 1, and the plan's smallest rank 2 is more than that"
    )


@each_policy
def test_an_owner_who_allows_fewer_steps_than_the_plan_takes_is_left_out_and_told_why(name: str) -> None:
    plan = make_plan(name, (2, 4, 16), OPTIONS.get(name))  # eighty rows are ten steps
    assert ranks.fits(plan, make_candidate(max_steps=10)) is None
    assert ranks.fits(plan, make_candidate(max_steps=9)) == (
        "the device's owner allows at most 9 steps a job; the plan takes 10 unless training.max_steps says less"
    )


def test_a_slice_is_about_as_long_as_estimated_and_never_longer() -> None:
    factors = {m: Factors(b=torch.zeros(64, 8), a=torch.zeros(8, 64)) for m in LAYOUT.modules}
    real = len(pack(Slice(Label(rank=8, scale=1.0, round=3), factors), LAYOUT, Dtype.float32))
    assert real <= sizes.start_bytes(make_plan(), 8) <= real + 400


def test_the_policy_of_the_docs_works_as_an_entry_point_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "savers.py").write_text(DOCS.read_text().split("```python\n")[1].split("```")[0])
    metadata = tmp_path / "savers-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: savers\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[hlora.ranks]\nbattery = savers:Battery\n")
    monkeypatch.syspath_prepend(tmp_path)
    plan = make_plan("battery", (2, 4, 16), {"label": "runs on"})
    assert "battery" in ranks.names()
    assert ranks.choose(plan, make_candidate(labels={"runs on": "battery"}), Population(())).rank == 2
    assert ranks.choose(plan, make_candidate(), Population(())).rank == 16
