"""The page's sentences, order and links."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import sentences
from experiments.experiment import FOLDER, Contestant, read
from experiments.links import linked
from experiments.page import CONTENTS, STORED, page
from experiments.records import FILE, Results
from experiments.summary import computed
from tests.experiments.test_summary import run

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("every", "said"),
    [(1, ""), (2, " second"), (3, " third"), (4, " 4th"), (11, " 11th"), (12, " 12th"), (21, " 21st"), (22, " 22nd"), (113, " 113th")],
)
def test_every_so_many_rounds_is_told_in_words(every: int, said: str) -> None:
    assert sentences.nth(every) == said


def test_what_is_no_federation_is_said_to_be_none() -> None:
    alone = Contestant(name="each alone", kind="local", clients=8)
    assert sentences.part(alone).startswith("no federation: 8 clients that never meet, each training in every round, at its class's rank")
    assert "all clients that never meet" in sentences.part(alone.model_copy(update={"clients": None}))
    one = Contestant(name="all rows in one place", kind="centralised", rank=16)
    assert sentences.part(one).startswith("no federation: one machine with all rows, at rank 16")
    assert "at the largest rank" in sentences.part(one.model_copy(update={"rank": None}))
    assert sentences.part(Contestant(name="rank 2 for all", rank=2)) == "all clients, at rank 2"
    assert sentences.part(Contestant(name="ours"), "the rank that suits it") == "all clients, each at the rank that suits it"
    assert sentences.part(Contestant(name="rank 2 for all", rank=2), "the rank that suits it") == "all clients, at rank 2"


def test_hours_are_those_of_all_parts_of_all_stored_runs() -> None:
    """Three rounds with the untrained one, of 10 s whole (6 of training, 2 of merging) and 1 s of measuring each."""
    runs = [run([4.0, 3.0, 2.0])]
    assert computed(runs) == {"train": 18.0, "merge": 6.0, "measure": 3.0, "overhead": 6.0}
    assert sentences.hours(runs) == 33 / 3600
    assert "tuning" not in sentences.computing(runs, [])
    assert "tuning took 0.0092" in sentences.computing(runs, runs)


def test_numbers_of_seeds_are_told_from_the_fewest_to_the_most() -> None:
    runs = [run([4.0], seed, name) for name, count in {"one": 1, "more": 6}.items() for seed in range(count)]
    assert sentences.seeds(runs).startswith("Each contestant ran with 1 to 6 seeds. With fewer than five")
    assert sentences.seeds(runs[1:]) == "Each contestant ran with 6 seeds."


def test_a_word_is_linked_where_it_is_first_used_and_a_decision_everywhere() -> None:
    text = "# products\n\n| products |\n\n`products`, products of `delta` and products (decision 30, decision 30, decision 99)\n"
    linked_once = (
        "# products\n\n| products |\n\n`products`, [products](glossary.md) of [`delta`](strategies.md) and products "
        "([decision 30](decisions/0030-what-mixed-ranks-reach.md), [decision 30](decisions/0030-what-mixed-ranks-reach.md), decision 99)\n"
    )
    assert linked(text, DOCS) == linked_once
    assert linked(linked_once, DOCS) == linked_once.replace("and products", "and [products](glossary.md)")


def test_experiments_stand_in_the_order_of_the_contents_and_others_last_by_name(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        folder = tmp_path / STORED / name
        folder.mkdir(parents=True)
        text = (FOLDER / "quick.toml").read_text().replace('name = "quick"', f'name = "{name}"', 1)
        (folder / FILE).write_text(text)
        made, given = run([4.0, 2.0], contestant="delta"), read(folder / FILE)
        made_by = {"software": {"x": "1"}, "machine": {"cores": "1", "processor": "x", "system": "y"}}
        header = made.header.model_copy(update=made_by | {"settings": given.digest(given.contestant("delta"))})
        Results(folder).keep(type(made)(header, made.rounds))
    (tmp_path / STORED / CONTENTS).write_text('c = "the third"\nb = "the second"\n')
    text = page(tmp_path)
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == ["c", "b", "a", "d"]
    question = json.dumps(read(FOLDER / "quick.toml").question).strip('"')
    assert f"- [c](#c): the third\n- [b](#b): the second\n- [a](#a): {question}\n" in text
