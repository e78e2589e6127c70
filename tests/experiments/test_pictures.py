"""How contestants look, and where their names stand."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import curves
from experiments.curves import spread
from experiments.experiment import FOLDER, read
from experiments.looks import OTHER, Look, look
from experiments.records import ALL, Finished
from tests.experiments.test_summary import run

EXPERIMENTS = [read(file) for file in sorted(FOLDER.glob("*.toml"))]


def test_a_contestant_looks_the_same_in_every_experiment() -> None:
    """But for dots, where the rate cools for everybody."""
    looks: dict[str, set[tuple[str, object]]] = {}
    for experiment in EXPERIMENTS:
        for contestant in experiment.contestants:
            found = look(experiment, contestant)
            looks.setdefault(contestant.name, set()).add((found.colour, found.line))
    assert {name: found for name, found in looks.items() if len(found) > 1} == {}


def test_contestants_of_one_experiment_look_different() -> None:
    for experiment in EXPERIMENTS:
        looks: dict[Look, list[str]] = {}
        for contestant in experiment.contestants:
            looks.setdefault(look(experiment, contestant), []).append(contestant.name)
        assert [names for names in looks.values() if len(names) > 1] == []


def test_a_strategy_that_has_no_colour_yet_is_grey() -> None:
    (experiment, *_) = EXPERIMENTS
    unknown = experiment.contestants[0].model_copy(update={"rank": None, "plan": {"strategy": {"name": "tomorrow"}}})
    assert look(experiment, unknown).colour == OTHER


def test_names_are_moved_no_farther_than_the_others_need() -> None:
    """Two at ½ are moved by half a gap each; those at the ends stay inside; what is far away stays."""
    assert spread([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert spread([0.1, 0.5, 0.52], 0.1) == pytest.approx([0.1, 0.46, 0.56])
    assert spread([1.0, 1.0], 0.1) == pytest.approx([0.9, 1.0])
    assert spread([-3.0, 0.0], 0.1) == pytest.approx([0.0, 0.1])
    assert spread([], 0.1) == []


def accurate(seed: int, values: list[float]) -> Finished:
    """A classifier's run."""
    made = run(values, seed, "rank 2 for all")
    rounds = [
        round.model_copy(update={"measures": {8: {ALL: {"accuracy": value, "f1": value / 2, "loss": 1 - value}}}})
        for round, value in zip(made.rounds, values, strict=True)
    ]
    return Finished(made.header, rounds)


@pytest.mark.parametrize("values", [[0.5, 0.7], [0.5, 0.6, 0.7]])
def test_the_majoritys_guess_is_drawn_beside_accuracies(values: list[float], tmp_path: Path) -> None:
    experiment = next(one for one in EXPERIMENTS if one.name == "qqp")
    png, svg = tmp_path / "a.png", tmp_path / "a.svg"
    curves.draw(experiment, [accurate(seed, values) for seed in range(2)], png, svg)
    assert "the majority's guess" in svg.read_text()
    assert "rank 2 for all" in svg.read_text()
    curves.draw(experiment.model_copy(update={"majority": None}), [accurate(0, values)], png, svg)
    assert "the majority's guess" not in svg.read_text()
