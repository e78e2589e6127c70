"""What is said of runs, against small runs that were made up so that the answers can be worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from experiments import curves, figures
from experiments.cells import signed, told
from experiments.experiment import FOLDER, read
from experiments.intervals import Interval
from experiments.records import Finished, Header, RoundRecord, Seconds
from experiments.summary import Line

SECONDS = Seconds(whole=10.0, train=6.0, merge=2.0, measure=1.0)


def run(losses: Sequence[float], seed: int = 0, contestant: str = "ours") -> Finished:
    """A run of two classes and two sources: at rank 2 the loss is higher by 0.1, on news by as much as it is lower on questions."""
    header = Header(
        experiment="made up",
        contestant=contestant,
        seed=seed,
        settings="",
        plan="",
        model="",
        ranks={"weak": 2, "strong": 8},
        mixes={"weak": {"news": 0.75, "questions": 0.25}, "strong": {"questions": 1.0}},
        headline=8,
        software={},
        machine={},
    )
    return Finished(header, [round_of(n, loss) for n, loss in enumerate(losses)])


def round_of(n: int, loss: float) -> RoundRecord:
    """A round that moved 100 bytes up and 200 down, 1,000 more in all with each round."""
    measures = {
        rank: {"all": {"loss": x}, "news": {"loss": x + 0.2}, "questions": {"loss": x - 0.2}} for rank, x in ((2, loss + 0.1), (8, loss))
    }
    return RoundRecord(
        round=n,
        contributions=3,
        lost=0,
        ranks={2: 2, 8: 1},
        bytes_up=100.0,
        bytes_down=200.0 + 1000.0 * n,
        kept={2: 0.9, 8: 1.0},
        measures=measures,
        seconds=SECONDS,
    )


def test_a_target_costs_the_bytes_of_the_rounds_until_then() -> None:
    """4, 3, 2: half of the second round's way to 2.5; the first moved 1,300 bytes, the second 2,300."""
    line = Line("ours", {0: run([4.0, 3.0, 2.0]), 1: run([4.0, 3.9, 3.8], seed=1)}, "loss")
    target = {0: 2.5, 1: 2.5, 2: 2.5}
    assert line.rounds_to(target, better=-1) == {0: 1.5, 1: None}
    assert line.bytes_to(target, better=-1) == {0: 1300 + 2300 / 2, 1: None}
    assert line.bytes() == {0: 3600, 1: 3600}


def test_a_class_of_devices_is_measured_at_its_own_rank_on_its_own_mix() -> None:
    """Weak: 2 + 0.1, three quarters news: + 0.2 · 0.75 − 0.2 · 0.25. Strong: 2, all questions: − 0.2."""
    line = Line("ours", {0: run([4.0, 2.0])}, "loss")
    assert line.by_class("weak") == {0: pytest.approx(2.2)}
    assert line.by_class("strong") == {0: pytest.approx(1.8)}


def test_ends_areas_rungs_energy_and_seconds() -> None:
    line = Line("ours", {0: run([4.0, 3.0, 2.0]), 1: run([4.0, 3.0, 3.0], seed=1)}, "loss")
    assert line.final() == {0: 2.0, 1: 3.0}
    assert line.mean() == {0: 3.0, 1: 3.25}
    assert line.at(2) == {0: pytest.approx(2.1), 1: pytest.approx(3.1)}
    assert line.at(4) == {}
    assert line.beyond(2) == {0: pytest.approx(0.1), 1: pytest.approx(0.1)}
    assert line.seconds("overhead") == {0: 6.0, 1: 6.0}


def test_numbers_are_told_with_their_intervals_and_differences_in_bold() -> None:
    assert told({0: 2.0, 1: 3.0}) == "2.500 ± 6.353"  # t(1) √0.5 / √2
    assert told({0: 2.0}) == "2.000"
    assert told({}) == "–"
    assert signed(Interval(-0.05, 0.02, 5)) == "**−0.050 ± 0.020**"
    assert signed(Interval(0.01, 0.02, 5)) == "+0.010 ± 0.020"
    assert signed(None) == "–"


def test_figures_for_scripts_hold_what_tables_say_and_the_values_of_every_seed() -> None:
    """Ours ends at 2 and 3, theirs at 2.5 and 2.5; it was at 2.5 after 1.5 rounds of two, and never."""
    given = read(FOLDER / "quick.toml").model_copy(
        update={"reference": "rank 2 for all", "further_references": ["delta"], "targets": ["rank 2 for all"]}
    )
    ends = {"delta": ([4.0, 3.0, 2.0], [4.0, 3.0, 3.0]), "rank 2 for all": ([4.0, 3.0, 2.5], [4.0, 3.0, 2.5])}
    runs = [run(losses, seed, name) for name, both in ends.items() for seed, losses in enumerate(both)]

    told = figures.report(given, runs)

    theirs, ours = told.contestants  # in the experiment's order
    assert (told.metric, told.better, told.reference) == ("loss", "smaller", "rank 2 for all")
    assert (ours.contestant, ours.final.mean, ours.final.by_seed) == ("delta", 2.5, {0: 2.0, 1: 3.0})
    assert ours.final.half == pytest.approx(6.3531, abs=1e-3)
    assert ours.difference is not None
    assert (ours.difference.mean, ours.difference.by_seed, theirs.difference) == (0.0, {0: -0.5, 1: 0.5}, None)
    assert ours.targets["rank 2 for all"].rounds == {0: 1.5, 1: None}
    assert ours.targets["rank 2 for all"].share_of_rounds == {0: 0.75, 1: None}
    assert theirs.targets["rank 2 for all"].share_of_bytes == {0: 1.0, 1: 1.0}
    assert ours.last == {"loss": ours.final}
    assert theirs.differences == {"delta": theirs.differences["delta"]}
    assert theirs.differences["delta"].by_seed == {0: 0.5, 1: -0.5}
    assert ours.ranks[2].by_seed == {0: pytest.approx(2.1), 1: pytest.approx(3.1)}
    assert ours.bytes is not None
    assert ours.bytes.mean == 3600
    assert ours.seconds == {"train": 18.0, "merge": 6.0, "overhead": 6.0}
    assert figures.report(given, []).contestants == []
    assert figures.Report.model_validate_json(told.model_dump_json()) == told


@pytest.mark.parametrize(("losses", "title"), [([4.0, 2.0], "after the last round"), ([4.0, 3.0, 2.0], "of the global adapter")])
def test_a_beginning_and_an_end_are_drawn_as_ends_and_more_as_curves(losses: list[float], title: str, tmp_path: Path) -> None:
    runs = [run(losses, seed, name) for name in ("delta", "rank 2 for all") for seed in range(2)]
    png, svg = tmp_path / "curves.png", tmp_path / "curves.svg"
    curves.draw(read(FOLDER / "quick.toml"), runs, png, svg)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert f"Held-out loss {title}" in svg.read_text()
