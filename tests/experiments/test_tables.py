"""What tables say, against small runs that were made up so that the answers can be worked out by hand."""

from __future__ import annotations

import pytest

from experiments import figures
from experiments.cells import arrived, complete, told
from experiments.experiment import FOLDER, Experiment, read
from experiments.records import Finished
from experiments.summary import Line, shares
from experiments.tables import Table, tables
from tests.experiments.test_summary import run


def given(**changes: object) -> Experiment:
    """The quick experiment, with contestants called `delta` and `rank 2 for all`."""
    return read(FOLDER / "quick.toml").model_copy(update=changes)


def runs(**ends: list[list[float]]) -> list[Finished]:
    """Runs by contestant (`_` for a space), one for each seed."""
    return [run(losses, seed, name.replace("_", " ")) for name, each in ends.items() for seed, losses in enumerate(each)]


def table(experiment: Experiment, found: list[Finished], title: str) -> Table:
    """The table whose title begins so."""
    return next(one for one in tables(experiment, found) if one.title.startswith(title))


def row(found: Table, name: str) -> dict[str, str]:
    """A contestant's row, by column."""
    return next(dict(zip(found.columns, cells, strict=True)) for cells in found.rows if cells[0] == name)


def test_a_mean_stands_only_where_every_seed_arrived() -> None:
    assert arrived({0: 4.0, 1: 6.0}, "{:.1f}".format) == "5.0"
    assert arrived({0: 4.0, 1: None}, "{:.1f}".format) == "in 1 of 2"
    assert arrived({0: None, 1: None}, "{:.1f}".format) == "never"
    assert arrived({}, "{:.1f}".format) == "–"
    assert complete({0: 4.0, 1: None}) == {}


def test_seeds_that_all_say_the_same_have_no_interval_to_tell() -> None:
    assert told({0: 0.0, 1: 0.0}) == "0.000"


def test_how_soon_is_told_as_a_share_of_what_it_took_the_target_itself_seed_by_seed() -> None:
    """Theirs was at its last 2 after four rounds, and after two with seed 1; ours after one and after one: ¼ and ½, mean ⅜."""
    found = runs(delta=[[4, 2, 2, 2, 2], [4, 2, 2, 2, 2]], rank_2_for_all=[[4, 3.5, 3, 2.5, 2], [4, 3, 2, 2, 2]])
    soon = table(given(targets=["rank 2 for all"]), found, "How soon it was where rank 2 for all ended")
    assert soon.columns[1:] == ["rounds", "share of its rounds", "bytes", "share of its bytes"]
    assert row(soon, "delta")["rounds"] == "1.0"
    assert row(soon, "delta")["share of its rounds"] == "0.38 ± 1.59"  # t(1) · √(2 · 0.125²) / √2
    assert row(soon, "rank 2 for all")["share of its rounds"] == "1.00"


def test_a_target_that_was_there_from_the_first_is_no_ruler() -> None:
    assert shares({0: 2.0, 1: None}, {0: 4.0, 1: 3.0}) == {0: 0.5, 1: None}
    assert shares({0: 2.0, 1: 1.0}, {0: 4.0, 1: 0.0}) == {}
    assert shares({}, {}) == {}


@pytest.mark.parametrize(("losses", "shown"), [([4.0, 3.0, 2.0], False), ([4.0, 3.0, 2.5, 2.0], True)])
def test_a_mean_over_all_rounds_needs_three_measured_ones(losses: list[float], shown: bool) -> None:
    ends = table(given(), runs(delta=[losses]), "Where it ended")
    assert ("mean over all rounds" in ends.columns) is shown


def test_differences_stand_to_every_reference_and_are_counted_once() -> None:
    """Three pairs: ours and theirs differ by 1 and 1.1, which leaves out zero; the third from both by 0 ± much."""
    third = given().contestants[0].model_copy(update={"name": "third"})
    experiment = given(contestants=[*given().contestants, third], further_references=["delta"])
    found = runs(delta=[[4, 2], [4, 2]], rank_2_for_all=[[4, 3], [4, 3.1]], third=[[4, 1], [4, 4]])
    apart = table(experiment, found, "How far")
    assert apart.columns[1:] == ["against rank 2 for all", "against delta"]
    assert row(apart, "delta")["against rank 2 for all"] == "**−1.050 ± 0.635**"
    assert row(apart, "delta")["against delta"] == "–"
    assert apart.note.startswith("There are 3 differences in this table")
    assert "the intervals of 1 leave out zero" in apart.note
    assert "about 0.1" in apart.note  # 3 / 20
    assert apart.markdown().endswith(apart.note + "\n")
    assert table(experiment, runs(delta=[[4, 2]], rank_2_for_all=[[4, 3]]), "How far").note == ""


def test_what_was_measured_at_its_end_alone_has_an_end_and_no_way_there() -> None:
    found = runs(delta=[[4, 3, 2.5, 2]], rank_2_for_all=[[4, 3, 2.5, 2]])
    before = [round.model_copy(update={"measures": {2: round.measures[2]}}) for round in found[0].rounds[:-1]]
    found[0] = Finished(found[0].header, [*before, found[0].rounds[-1]])
    ends, soon = (row(table(given(), found, title), "delta") for title in ("Where it ended", "How soon"))
    assert (ends["loss"], ends["mean over all rounds"]) == ("2.000", "–")
    assert (soon["rounds"], soon["bytes"]) == ("–", "–")
    assert [one.mean is None for one in figures.report(given(), found).contestants] == [False, True]
    assert row(table(given(), found, "How far apart they were on the way"), "delta")["against rank 2 for all"] == "–"


def test_a_class_gains_what_it_has_more_than_the_reference_seed_by_seed() -> None:
    """Both classes: one less at every rank, on every kind of rows, in the one seed that both have."""
    gains = table(given(), runs(delta=[[4, 2], [4, 1]], rank_2_for_all=[[4, 3]]), "What each class gains")
    assert gains.columns[1:] == ["weak", "strong"]
    assert [row[0] for row in gains.rows] == ["delta"]
    assert row(gains, "delta")["weak"] == row(gains, "delta")["strong"] == "−1.000"


def test_what_is_no_federation_moves_no_bytes_and_has_no_classes() -> None:
    alone = given().contestants[0].model_copy(update={"name": "alone", "kind": "local", "clients": 2, "rank": None})
    one = alone.model_copy(update={"name": "one", "kind": "centralised"})
    experiment = given(contestants=[*given().contestants, alone, one], targets=["one"])
    found = runs(delta=[[4, 3, 2]], alone=[[4, 3, 2.5]], one=[[4, 2, 1]])
    soon, costs = table(experiment, found, "How soon"), table(experiment, found, "What it cost")
    for name in ("alone", "one"):
        assert (row(soon, name)["bytes"], row(costs, name)["bytes"]) == ("–", "–")
    assert row(soon, "delta")["share of its bytes"] == "–"
    rungs = table(experiment, found, "The same adapter")
    assert (row(rungs, "alone")["rank 8"], row(rungs, "one")["rank 8"]) == ("–", "1.000")
    assert Line("one", {0: found[-1]}, "loss", kind="centralised").by_class("weak") == {}


def test_classes_are_left_out_where_all_have_the_same_mix_and_each_holds_its_rung() -> None:
    even = given().partition.model_copy(update={"kind": "iid"})
    titles = [one.title for one in tables(given(partition=even), runs(delta=[[4, 2]]))]
    assert "Each class of devices" not in titles
    assert "Each class of devices" in [one.title for one in tables(given(), runs(delta=[[4, 2]]))]
    whole = given().contestants[1].model_copy(update={"plan": {"strategy": {"name": "folded"}}})
    experiment = given(partition=even, contestants=[whole], reference="delta", targets=[])
    assert "Each class of devices" in [one.title for one in tables(experiment, runs(delta=[[4, 2]]))]
