"""The agent put together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent import app, data
from agent.policy import Policy
from protocol import errors
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


def profiled(home: Path, policy: Policy, datasets: str = DATASETS) -> dict[str, int]:
    """The data sets that the coordinator is told of, with the rows to train on."""
    catalogue(home)
    (home / "datasets.toml").write_text(datasets)
    return {alias: dataset.train for alias, dataset in app.profile(home, policy).datasets.items()}


def test_the_profile_leaves_out_data_that_cannot_be_read(tmp_path: Path) -> None:
    assert profiled(tmp_path, Policy()) == {"things": 18, "letters": 24}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"a private sentence " * 20: 1}, "no more than 1,000 can be told"),
        ({f"a private word {n}": 1 for n in range(1001)}, "no more than 1,000 can be told"),
        ({"private \ud800": 1}, "column 1 needs another name"),
    ],
)
def test_the_profile_leaves_out_data_whose_columns_cannot_be_told(
    tmp_path: Path, row: dict[str, int], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone.jsonl").write_text(json.dumps(row))
    assert profiled(tmp_path, Policy(), DATASETS.replace("csv", "jsonl")) == {"things": 18, "letters": 24}
    with pytest.raises(errors.DataRefusal) as refused:
        data.load(tmp_path).describe("gone")
    assert words in refused.value.detail
    assert "private" not in str(refused.value.facts) + refused.value.detail + capsys.readouterr().out


def test_a_profile_that_is_too_large_as_a_whole_says_so_before_it_is_sent(tmp_path: Path) -> None:
    (tmp_path / "wide.jsonl").write_text(json.dumps({f"column {n}": 1 for n in range(1000)}))
    sets = "".join(f'[wide{n}]\nformat = "jsonl"\npath = "wide.jsonl"\n' for n in range(3))
    with pytest.raises(errors.InvalidProfile, match="3,000 columns of 3 data sets"):
        profiled(tmp_path, Policy(), sets)


def test_the_profile_leaves_out_data_that_the_policy_does_not_allow(tmp_path: Path) -> None:
    assert profiled(tmp_path, Policy(data=["things"])) == {"things": 18}
