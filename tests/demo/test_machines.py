"""Machines: unequal ones, to which the capacity policy gives all ranks of the ladder, each for its own reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent import policy
from coordinator import ranks, sizes
from coordinator.ranks import Candidate, Population
from demo import machines, plan
from demo.departments import SHARES
from demo.machines import MACHINES
from protocol.messages import Dataset, Profile
from protocol.plan import BaseFacts, Layout, Plan
from protocol.views import RankView

# MiniLM's shapes.
LAYOUT = Layout(
    modules={f"encoder.layer.{n}.attention.self.{part}": (384, 384) for n in range(6) for part in ("query", "value")},
    full={"classifier.weight": (8, 384), "classifier.bias": (8,)},
    base=BaseFacts(parameters=22_700_000, layers=6, hidden=384, vocabulary=30_522),
)


@pytest.fixture
def resolved(tmp_path: Path) -> Plan:
    (tmp_path / "plan.toml").write_text(plan.text(plan.Wishes(labels=["a", "b"], clients=8, rounds=6, seed=0)))
    return plan.read(tmp_path / "plan.toml").model_copy(update={"layout": LAYOUT})


@pytest.fixture
def profiles(tmp_path: Path) -> dict[str, Profile]:
    """What each department's agent says of itself, after its policy file and its data."""
    found = {}
    for (name, rows), machine in zip(SHARES.items(), MACHINES, strict=True):
        machines.write_policy(machine, LAYOUT, tmp_path / name)
        owner = policy.load(tmp_path / name)
        found[name] = Profile(
            memory_bytes=owner.offered(32 * 10**9),
            training_flops=1e10,
            up_bytes_per_second=owner.up_bytes_per_second,
            down_bytes_per_second=owner.down_bytes_per_second,
            datasets={"texts": Dataset(train=rows)},
            limits=owner.limits(),
        )
    return found


def choose(resolved: Plan, profiles: dict[str, Profile]) -> dict[str, RankView]:
    population = Population(tuple(SHARES.values()))
    return {name: ranks.choose(resolved, Candidate(name, {}, profile), population) for name, profile in profiles.items()}


def test_every_rung_of_the_ladder_is_given(resolved: Plan, profiles: dict[str, Profile]) -> None:
    given = {name: view.rank for name, view in choose(resolved, profiles).items()}
    assert given == {
        "research": 16,
        "platform": 16,
        "finance": 8,
        "design": 4,
        "support": 16,
        "field office": 2,
        "legal": 8,
        "archive": 4,
    }


def test_each_small_rank_has_its_own_reason(resolved: Plan, profiles: dict[str, Profile]) -> None:
    why = {name: view.reason for name, view in choose(resolved, profiles).items()}
    assert "owner allows at most rank 8" in why["finance"]
    assert "bytes a job" in why["design"]
    assert "the link" in why["field office"]
    assert "60 examples" in why["archive"]


def test_a_metered_machine_does_a_job_of_its_rank_and_refuses_none(resolved: Plan) -> None:
    allowed = machines.between(4, LAYOUT)
    assert 2 * sizes.start_bytes(resolved, 4) < allowed < 2 * sizes.start_bytes(resolved, 8)


def test_only_slow_links_have_a_speed() -> None:
    assert [machines.link_speed(machine, LAYOUT) is not None for machine in MACHINES] == [m.link_rank is not None for m in MACHINES]


def test_a_plan_for_pairs_names_the_second_column(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(plan.text(plan.Wishes(labels=["0", "1"], clients=2, rounds=1, seed=0, pairs=True, model="./somewhere")))
    found = plan.read(file)
    assert found.task.kind == "sequence-classification"
    assert found.task.text_pair == "text_pair"
    assert found.adapter.modules == "all-linear"
    assert found.cohort.quorum == 1
