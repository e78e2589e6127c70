"""The agent put together."""

from __future__ import annotations

from pathlib import Path

from agent import app
from agent.policy import Policy
from tests.agent.work import catalogue

DATASETS = """
[things]
format = "jsonl"
path = "things.jsonl"
held_out = 0.25
seed = 10
[letters]
format = "jsonl"
path = "things.jsonl"
[gone]
format = "csv"
path = "gone.csv"
"""


def profiled(home: Path, policy: Policy) -> dict[str, int]:
    """The data sets that the coordinator is told of, with the rows to train on."""
    catalogue(home)
    (home / "datasets.toml").write_text(DATASETS)
    return {alias: dataset.train for alias, dataset in app.profile(home, policy).datasets.items()}


def test_the_profile_leaves_out_data_that_cannot_be_read(tmp_path: Path) -> None:
    assert profiled(tmp_path, Policy()) == {"things": 18, "letters": 24}


def test_the_profile_leaves_out_data_that_the_policy_does_not_allow(tmp_path: Path) -> None:
    assert profiled(tmp_path, Policy(data=["things"])) == {"things": 18}
