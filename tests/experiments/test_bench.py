"""Whole experiments on a tiny model: through the command, cut and gone on with, with every kind of contestant and trouble."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from experiments import fleet, material, tuning
from experiments.__main__ import app
from experiments.bench import Bench, Pace
from experiments.course import Setup
from experiments.experiment import FOLDER, Experiment, read, some
from experiments.material import Places
from experiments.records import FILE, Finished, Results, RoundRecord
from experiments.report import opened, tuned
from experiments.summary import lines
from experiments.tables import tables
from experiments.timing import timed
from protocol import VERSION, errors
from tests.tiny import tiny_decoder, tiny_encoder

SILENT = Console(quiet=True)
SOON = {"lease": 5, "no_progress": 5, "job": 10, "round": 10}  # seconds after which a round is abandoned
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """Two tiny models, and sentences with labels from two sources."""
    folder = tmp_path_factory.mktemp("material")
    tiny_encoder(folder / "models" / "encoder")
    tiny_decoder(folder / "models" / "decoder")
    for source, words in {"animals": ("cow", "hen", "owl"), "tools": ("saw", "axe", "awl")}.items():
        for part, count in {"train": 40, "held-out": 12}.items():
            rows = [{"text": f"the {words[n % 3]} is no {words[n // 3 % 3]}", "label": "odd" if n % 2 else "even"} for n in range(count)]
            (folder / f"{source}-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Places(folder / "models", folder)


def experiment(**changes: Any) -> Experiment:
    """Six clients of two classes, two rounds, two contestants, two seeds."""
    told = {
        "name": "tiny",
        "question": "Does it work?",
        "model": "encoder",
        "task": {"kind": "sequence-classification", "labels": ["even", "odd"], "max_length": 16},
        "sources": [{"name": name, "train": f"{name}-train.jsonl", "held_out": f"{name}-held-out.jsonl"} for name in ("animals", "tools")],
        "partition": {"kind": "dirichlet", "over": "source", "clients": 6, "rows": 8},
        "classes": [{"name": "weak", "parts": 2, "rank": 1}, {"name": "strong", "parts": 1, "rank": 4}],
        "plan": {
            "rounds": 2,
            "adapter": {"modules": ["query", "value"]},
            "training": {"learning_rate": 0.01, "batch_size": 4, "precision": "float32"},
            "cohort": {"target": 3, "quorum": 3},
        },
        "seeds": 2,
        "reference": "rank 1 for all",
        "targets": ["rank 1 for all"],
        "contestants": [
            {"name": "rank 1 for all", "rank": 1, "plan": {"strategy": {"name": "fedavg"}}},
            {"name": "delta", "plan": {"strategy": {"name": "delta"}, "training": {"learning_rate": 0.02}}},
        ],
    }
    return Experiment.model_validate(told | changes)


def carry_out(given: Experiment, places: Places, folder: Path, *names: str, seeds: int = 1) -> list[Finished]:
    """The runs of these contestants, all if none is named."""
    assert Bench(given, places, Results(folder), SILENT).run(some(given, names), range(seeds)).whole
    return Results(folder).all()


def comparable(rounds: list[RoundRecord]) -> list[dict[str, object]]:
    """What does not depend on how quick the machine was."""
    return [round.model_dump(exclude={"seconds"}) for round in rounds]


def test_runs_that_ended_are_kept_and_one_that_was_cut_is_made_again_the_same(places: Places, tmp_path: Path) -> None:
    given = experiment()
    before = carry_out(given, places, tmp_path)
    first, second = (Results(tmp_path).file(run.header.contestant, 0) for run in before)
    untouched = first.stat().st_mtime_ns
    second.write_bytes(second.read_bytes()[:-40])  # as it may be left where the power went away
    first.with_name("other.part").write_text("{")  # as by a run that was stopped while it was written

    after = carry_out(given, places, tmp_path)

    assert first.stat().st_mtime_ns == untouched
    assert [run.header for run in after] == [run.header for run in before]
    assert [comparable(list(run.rounds)) for run in after] == [comparable(list(run.rounds)) for run in before]


def test_contestants_of_a_seed_share_rows_and_draws_and_another_seed_has_others(places: Places, tmp_path: Path) -> None:
    runs = {(run.header.contestant, run.header.seed): run for run in carry_out(experiment(), places, tmp_path, seeds=2)}
    equal, mixed, other = runs["rank 1 for all", 0], runs["delta", 0], runs["delta", 1]
    assert equal.header.mixes == mixed.header.mixes != other.header.mixes
    assert equal.rounds[0].measures[1] == mixed.rounds[0].measures[4]  # untrained
    assert [round.contributions for round in mixed.rounds] == [0, 3, 3]
    assert set(mixed.rounds[-1].measures) == {1, 4}
    assert sum(round.bytes_up for round in mixed.rounds) > sum(round.bytes_up for round in equal.rounds)
    partition = [json.loads(line) for line in (tmp_path / "partitions" / "0.jsonl").read_text().splitlines()]
    assert [sum(share["rows"].values()) for share in partition] == [8] * 6
    ours, theirs, others = ([sorted(round.drawn) for round in run.rounds] for run in (equal, mixed, other))
    assert [len(drawn) for drawn in ours] == [0, 3, 3]
    assert ours == theirs != others
    kinds = {share["client"]: share["kind"] for share in partition}
    assert all(rank == {"weak": 1, "strong": 4}[kinds[name]] for round in mixed.rounds for name, rank in round.drawn.items())
    assert sorted(share["kind"] for share in partition) == ["strong"] * 2 + ["weak"] * 4


def test_the_bounds_are_one_client_with_all_rows_and_clients_that_never_meet(places: Places, tmp_path: Path) -> None:
    """Eight rows are two steps of four; the one client takes as many of all 48 in a round as three clients would: six steps."""
    bounds = [
        {"name": "all in one", "kind": "centralised", "rank": 4},
        {"name": "each alone", "kind": "local", "clients": 3},
        {"name": "rank 1 for all", "rank": 1},
    ]
    given = experiment(contestants=bounds)
    found = {run.header.contestant: run for run in carry_out(given, places, tmp_path, "all in one", "each alone")}
    alone, one = found["each alone"], found["all in one"]
    assert [round.contributions for round in one.rounds] == [0, 1, 1]
    assert [round.contributions for round in alone.rounds] == [0, 3, 3]
    assert [round.steps for round in one.rounds] == [{}, {"all": 6}, {"all": 6}]
    assert alone.rounds[1].steps == alone.rounds[2].steps == dict.fromkeys(alone.rounds[1].drawn, 2)
    setup = Setup.prepared(places, material.read(given, places), 0)
    own = {member.name: member.rows for member in setup.members}
    (all_rows,), *local = (team for name in ("all in one", "each alone") for team in fleet.teams(given.contestant(name), setup.members))
    assert sorted(all_rows.rows) == sorted(n for rows in own.values() for n in rows)
    assert {member.name for (member,) in local} == set(alone.rounds[1].drawn)
    assert all(member.rows == own[member.name] for (member,) in local)


def test_a_language_model_is_measured_by_source_and_their_mean_counts(places: Places, tmp_path: Path) -> None:
    given = experiment(model="decoder", task={"kind": "causal-lm", "max_length": 24})
    given = given.model_copy(update={"plan": {**given.plan, "adapter": {"modules": "all-linear"}}})
    (run,) = carry_out(given, places, tmp_path, "delta")
    last = run.rounds[-1].measures[4]
    assert last["all"]["loss"] == pytest.approx((last["animals"]["loss"] + last["tools"]["loss"]) / 2, rel=1e-5)
    assert last["all"]["loss"] < run.rounds[0].measures[4]["all"]["loss"]


def test_clients_that_go_away_are_replaced_and_come_back(places: Places, tmp_path: Path) -> None:
    """All of the six go away once a round: the three that are drawn, then those in their place; then the first three are asked again."""
    (run,) = carry_out(experiment(disturbances={"dropout": 1.0}), places, tmp_path, "delta")
    assert [round.lost for round in run.rounds] == [0, 3, 3]
    assert [round.contributions for round in run.rounds] == [0, 3, 3]


def test_slow_devices_do_fewer_steps_the_same_ones_again(places: Places, tmp_path: Path) -> None:
    """A step takes some 500 s, and there is time for five; with σ = 5 two of five devices are too slow for a job's two."""
    slow = experiment(disturbances={"slowness": 5.0}, classes=[{"name": "slow", "parts": 1, "rank": 4, "training_flops": 1e4}])
    calm = slow.model_copy(update={"disturbances": slow.disturbances.model_copy(update={"slowness": 0.0})})
    disturbed, undisturbed, again = (
        carry_out(given, places, tmp_path / name, "delta")[0] for name, given in [("a", slow), ("b", calm), ("c", slow)]
    )
    assert comparable(list(disturbed.rounds)) == comparable(list(again.rounds))
    assert [sorted(round.steps.values()) for round in undisturbed.rounds] == [[], [2, 2, 2], [2, 2, 2]]
    done = [steps for round in disturbed.rounds[1:] for steps in round.steps.values()]
    assert set(done) == {1, 2}
    assert disturbed.rounds[0].measures == undisturbed.rounds[0].measures


def test_results_of_other_settings_are_not_mixed_with_these(places: Places, tmp_path: Path) -> None:
    carry_out(experiment(), places, tmp_path, "delta")
    changed = experiment(disturbances={"dropout": 0.1})
    with pytest.raises(errors.Conflict, match="other settings"):
        carry_out(changed, places, tmp_path, "delta")
    carry_out(experiment(question="Another?", seeds=1), places, tmp_path, "delta")  # changes no number


def test_a_plan_that_cannot_be_is_refused_before_anything_runs(places: Places, tmp_path: Path) -> None:
    wrong = {"name": "wrong", "plan": {"strategy": {"name": "nonsense"}}}
    given = experiment(contestants=[*experiment().contestants, wrong])
    with pytest.raises(errors.InvalidPlan, match="wrong: there is no strategy 'nonsense'"):
        carry_out(given, places, tmp_path)
    assert Results(tmp_path).all() == []
    with pytest.raises(errors.InvalidRequest, match="there is no contestant 'nobody'"):
        some(given, ["nobody"])


def minutes(folder: Path) -> Callable[[], float]:
    """A clock by which every run that has ended took a minute, and nothing else took any time."""
    return lambda: 60.0 * len(list(folder.rglob("*--*.jsonl")))


def test_a_budget_ends_the_work_before_it_is_exceeded_and_the_rest_is_done_later(places: Places, tmp_path: Path) -> None:
    given = experiment(budget_minutes=1.5)
    told = Console(record=True, file=io.StringIO())
    ended = Bench(given, places, Results(tmp_path), told, clock=minutes(tmp_path)).run(given.contestants, range(1))
    assert [run.name for run in ended.left] == ["delta, seed 0"]
    assert [run.header.contestant for run in Results(tmp_path).all()] == ["rank 1 for all"]
    assert "3 of 6 rounds done; about 1 min 0 s left" in told.export_text()
    assert Bench(given, places, Results(tmp_path), SILENT, clock=minutes(tmp_path)).run(given.contestants, range(1)).whole


def test_a_budget_that_is_used_up_begins_no_run_and_the_command_says_what_is_left(places: Places, tmp_path: Path) -> None:
    given = ["run", str(FOLDER / "quick.toml"), "--out", str(tmp_path), "--only", "delta", "--minutes", "0.00001"]
    shown = CliRunner().invoke(app, given)
    assert shown.exit_code == 75
    assert "Runs left: 2, with 6 rounds; the next is delta, seed 0." in shown.stderr
    assert f"python -m experiments run {FOLDER / 'quick.toml'} --out {tmp_path} --minutes 1e-05 --only delta" in shown.stderr
    assert Results(tmp_path).all() == []


def test_nothing_is_estimated_before_a_round_is_done() -> None:
    pace = Pace(lambda: 0.0, rounds=9)
    assert str(pace) == "0 of 9 rounds done; no estimate yet"


def test_a_run_that_fails_stops_no_other_and_is_tried_again(places: Places, tmp_path: Path) -> None:
    hopeless = {"name": "hopeless", "plan": {"norm": {"bound": 1e-6, "action": "reject"}, "times": SOON}}
    given = experiment(contestants=[hopeless, *experiment().contestants])
    for _ in range(2):
        ended = Bench(given, places, Results(tmp_path), SILENT).run(some(given, ["hopeless", "delta"]), range(1))
        ((name, why),) = ended.failed.items()
        assert name == "hopeless, seed 0"
        assert "round 1 was abandoned 3 times" in why
        assert [run.header.contestant for run in Results(tmp_path).all()] == ["delta"]


def test_each_contestant_is_tuned_with_a_seed_of_its_own_and_then_keeps_its_settings(places: Places, tmp_path: Path) -> None:
    tries = [{"training": {"learning_rate": rate}} for rate in (1e-7, 2e-2)]
    given = experiment(tuning={"rounds": 1, "tries": tries}, seeds=1)
    told = Console(record=True, file=io.StringIO())
    assert Bench(given, places, Results(tmp_path), told).run(given.contestants, given.numbers()).whole
    assert [line.partition(" rounds")[0] for line in told.export_text().splitlines() if "rounds done" in line] == [
        f"{n} of 14" for n in (2, 4, 6, 8, 11, 14)
    ]
    tried, runs = tuned(tmp_path), Results(tmp_path).all()
    assert {run.header.seed for run in tried} == {0}
    assert {run.header.seed for run in runs} == {1}
    assert {len(run.rounds) for run in tried} == {2}  # the untrained adapter, and one round
    for contestant in given.contestants:
        own = tuning.trials(given, contestant, tried)
        assert [trial.settings for trial in own] == tries
        chosen = tuning.frozen(given, contestant, tried)
        assert chosen.plan["training"] == min(own, key=lambda trial: trial.value or 0.0).settings["training"]
        assert Results(tmp_path).find(chosen, 1, given.digest(chosen)) is not None
    last = tables(given, runs, tried)[-1]
    assert last.columns[1:] == ["training = { learning_rate = 1e-07 }", "training = { learning_rate = 0.02 }"]
    assert all(sum(cell.startswith("**") for cell in row) == 1 for row in last.rows)


def test_nothing_is_frozen_before_everything_was_tried(places: Places, tmp_path: Path) -> None:
    tries = [{"training": {"learning_rate": rate}} for rate in (1e-2, 2e-2)]
    given = experiment(tuning={"rounds": 1, "tries": tries}, budget_minutes=1.5)
    told = Console(record=True, file=io.StringIO())
    ended = Bench(given, places, Results(tmp_path), told, clock=minutes(tmp_path)).run(given.contestants, given.numbers())
    assert len(ended.left) == 3 + 4  # three of four short runs, and two contestants with two seeds
    assert "2 of 20 rounds done; about 9 min 0 s left" in told.export_text()  # 4 · 2 and 4 · 3 rounds in all
    assert len(tuned(tmp_path)) == 1
    assert Results(tmp_path).all() == []
    assert tuning.frozen(given, given.contestants[0], tuned(tmp_path)) == given.contestants[0]


def test_settings_with_which_no_round_comes_about_are_the_worst_and_stop_nobody(places: Places, tmp_path: Path) -> None:
    hopeless = {"norm": {"bound": 1e-6, "action": "reject"}, "times": SOON}  # no change is as small
    given = experiment(tuning={"rounds": 1, "tries": [hopeless, {"training": {"learning_rate": 1e-2}}]}, seeds=1)
    (delta,) = some(given, ["delta"])

    assert Bench(given, places, Results(tmp_path), SILENT).run([delta], given.numbers()).whole

    first, second = tuned(tmp_path)
    assert "round 1 was abandoned 3 times" in str(first.header.failed)
    assert (first.rounds, second.header.failed) == ([], None)
    assert tuning.frozen(given, delta, [first, second]).plan["training"] == {"learning_rate": 1e-2}
    (row,) = tables(given, Results(tmp_path).all(), [first, second])[-1].rows
    assert row[1] == "failed"
    assert row[2].startswith("**")


def test_a_device_that_is_handed_the_whole_adapter_is_measured_with_it(places: Places, tmp_path: Path) -> None:
    """Both classes of `folded` hold all six directions that are kept; of `delta` the weak ones hold rank 1, and the strong ones rank 4."""
    both = [{"name": name, "plan": {"strategy": {"name": name}, "cap": 6}} for name in ("delta", "folded")]
    given = experiment(contestants=both, reference="delta", targets=[])
    for line in lines(given, carry_out(given, places, tmp_path)):
        (run,) = line.runs.values()
        last, mixes = run.rounds[-1].measures, run.header.mixes
        headline = 4 if line.name == "delta" else 6
        assert [round for round, _ in line.curve(run)] == [round.round for round in run.rounds], "followed as it is held"
        assert line.final() == {0: last[headline]["all"]["loss"]}
        for kind, rank in {"weak": 1 if line.name == "delta" else 6, "strong": headline}.items():
            wanted = sum(share * last[rank][rows]["loss"] for rows, share in mixes[kind].items())
            assert line.by_class(kind)[0] == pytest.approx(wanted)


def test_a_class_has_the_rank_that_its_jobs_were_given_where_a_policy_chooses(places: Places, tmp_path: Path) -> None:
    """A quarter of a job's hour is 900 s. Two slices at 10 bytes a second take 586 at rank 1 (2,928 bytes), and 1,200 at rank 4 (6,000)."""
    classes = [{"name": "weak", "parts": 2, "rank": 4, "bytes_per_second": 10}, {"name": "strong", "parts": 1, "rank": 4}]
    given = experiment(classes=classes)
    given = given.model_copy(update={"plan": {**given.plan, "ranks": {"name": "capacity", "ladder": [1, 4]}}})
    (run,) = carry_out(given, places, tmp_path, "delta")
    assert run.header.ranks == {"weak": 1, "strong": 4}
    (line,) = lines(given, [run])
    last = run.rounds[-1].measures
    for kind, rank in run.header.ranks.items():
        assert line.by_class(kind)[0] == pytest.approx(sum(x * last[rank][rows]["loss"] for rows, x in run.header.mixes[kind].items()))


def test_a_class_whose_links_do_not_carry_the_whole_adapter_is_measured_with_its_slice(places: Places, tmp_path: Path) -> None:
    classes = [{"name": "weak", "parts": 2, "rank": 4, "bytes_per_second": 10}, {"name": "strong", "parts": 1, "rank": 4}]
    folded = [{"name": "folded", "plan": {"strategy": {"name": "folded"}, "cap": 6}}]
    given = experiment(classes=classes, contestants=folded, reference="folded", targets=[])
    given = given.model_copy(update={"plan": {**given.plan, "ranks": {"name": "capacity", "ladder": [1, 4]}}})
    (run,) = carry_out(given, places, tmp_path)
    assert (run.header.ranks, run.header.sliced) == ({"weak": 1, "strong": 4}, ["weak"])
    drawn = {name for round in run.rounds for name in round.drawn}
    assert set() < {name for round in run.rounds for name in round.sliced} < drawn
    (line,) = lines(given, [run])
    last = run.rounds[-1].measures
    for kind, rank in {"weak": 1, "strong": 6}.items():
        assert line.by_class(kind)[0] == pytest.approx(sum(x * last[rank][rows]["loss"] for rows, x in run.header.mixes[kind].items()))


def test_whatever_is_missing_is_named(places: Places, tmp_path: Path) -> None:
    with pytest.raises(errors.DataRefusal, match="--data"):
        carry_out(experiment(), Places(places.models, tmp_path), tmp_path)
    source = experiment().sources[0].model_copy(update={"texts": ["nothing"]})
    with pytest.raises(errors.DataRefusal, match="has no column 'nothing'"):
        carry_out(experiment(sources=[source]), places, tmp_path)
    file = tmp_path / "experiment.toml"
    file.write_text("name = 1\n")
    with pytest.raises(errors.InvalidRequest, match=r"experiment\.toml: name"):
        read(file)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of the experiment that anybody can run, made by the command."""
    out = tmp_path_factory.mktemp("quick")
    subprocess.run([sys.executable, "-m", "experiments", "run", FOLDER / "quick.toml", "--out", out, "--seeds", "1"], check=True, cwd=ROOT)
    return out


def test_the_command_leaves_results_tables_and_pictures(quick: Path) -> None:
    given, runs = opened(quick)
    assert [run.header.contestant for run in runs] == ["delta", "rank 2 for all"]
    assert [table.columns[0] for table in tables(given, runs)] == ["contestant"] * 7
    assert (quick / "report.md").read_text().startswith("# quick\n")
    assert (quick / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (quick / "curves.svg").read_text().startswith("<?xml")
    files = ("report.md", "curves.png", "curves.svg")
    for name in files:
        (quick / name).unlink()
    shown = CliRunner().invoke(app, ["report", str(quick)])
    assert "Where it ended" in shown.output
    assert not any((quick / name).exists() for name in files)  # it only looks
    assert CliRunner().invoke(app, ["report", str(quick), "--write"]).exit_code == 0
    assert all((quick / name).exists() for name in files)
    assert CliRunner().invoke(app, ["report", str(quick / "runs")]).exit_code == 1
    told = json.loads(CliRunner().invoke(app, ["report", str(quick), "--json"]).stdout)
    assert [line["contestant"] for line in told["contestants"]] == ["rank 2 for all", "delta"]
    assert told["contestants"][1]["final"]["by_seed"] == {"0": runs[0].values[-1][1]["loss"]}


def test_the_command_goes_on_when_a_run_fails_and_ends_with_1(tmp_path: Path) -> None:
    """No change is as small as delta may make."""
    text = (FOLDER / "quick.toml").read_text("utf-8")
    hopeless = 'norm = { bound = 1e-6, action = "reject" }, times = { lease = 5, no_progress = 5, job = 10, round = 10 }'
    text = text.replace('{ strategy = { name = "delta" } }', f'{{ strategy = {{ name = "delta" }}, {hopeless} }}').replace(
        "= 3e8", "= 1e11"
    )
    before, mark, delta = text.rpartition("[[contestants]]")
    start, first, rest = before.partition("[[contestants]]")
    (tmp_path / "hopeless.toml").write_text(start + mark + delta + "\n" + first + rest)
    asked = ["run", str(tmp_path / "hopeless.toml"), "--data", str(FOLDER), "--out", str(tmp_path / "out"), "--seeds", "1"]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 1
    *_, why, again = shown.stderr.splitlines()
    assert re.fullmatch(r"delta, seed 0 failed: .*round 1 was abandoned 3 times.*", why)
    assert again.startswith("What ended is kept; this does the rest: python -m experiments run ")
    assert "Where it ended" in shown.stdout
    assert [run.header.contestant for run in Results(tmp_path / "out").all()] == ["rank 2 for all"]


def test_a_model_that_cannot_be_had_ends_all_at_once(places: Places, tmp_path: Path) -> None:
    (places.models / "empty").mkdir()
    with pytest.raises(errors.ModelRefusal):
        carry_out(experiment(model="empty"), places, tmp_path)


def test_slow_machines_of_the_quick_experiment_do_fewer_steps_and_some_jobs_are_lost(quick: Path) -> None:
    """Eight rows are two steps; the strong are a hundred times as quick as they need to be."""
    kinds = {share["client"]: share["kind"] for share in map(json.loads, (quick / "partitions" / "0.jsonl").read_text().splitlines())}
    rounds = [round for run in opened(quick)[1] for round in run.rounds]
    done = {kind: [steps for r in rounds for name, steps in r.steps.items() if kinds[name] == kind] for kind in ("weak", "strong")}
    assert set(done["weak"]) == {1, 2}
    assert set(done["strong"]) == {2}
    assert sum(round.lost for round in rounds) > 0


def test_a_run_says_what_it_was_made_of_and_names_no_place(quick: Path) -> None:
    headers = [run.header for run in opened(quick)[1]]
    (data,) = {header.data for header in headers}
    assert data == material.read(read(FOLDER / "quick.toml"), Places(FOLDER, FOLDER)).digest
    assert all(header.rounds == 2 and header.software["hlora"] == VERSION for header in headers)
    assert not any(str(ROOT) in file.read_text() for file in quick.rglob("*.jsonl"))


def test_what_is_published_is_a_page_that_names_all_that_was_run(quick: Path, tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["publish", "--docs", str(tmp_path)]).exit_code == 1
    shown = CliRunner().invoke(app, ["publish", str(quick), "--docs", str(tmp_path)])
    assert shown.output.strip() == str(tmp_path / "evidence.md")
    text = (tmp_path / "evidence.md").read_text()
    assert "Does the bench work on this machine?" in text
    assert "Each contestant ran with 1 seed." in text
    assert (tmp_path / "images" / "evidence-quick.png").exists()
    assert CliRunner().invoke(app, ["publish", "--docs", str(tmp_path)]).exit_code == 0
    assert (tmp_path / "evidence.md").read_text() == text


def test_results_are_not_told_under_settings_that_they_were_not_made_by(quick: Path, tmp_path: Path) -> None:
    edited = shutil.copytree(quick, tmp_path / "edited")
    (edited / FILE).write_text((quick / FILE).read_text().replace("learning_rate = 2e-3", "learning_rate = 3e-3"))
    with pytest.raises(errors.Conflict, match=r"other settings than .* says now"):
        opened(edited)


def test_what_is_stored_is_not_lost_by_publishing_it_again(quick: Path, tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["publish", str(quick), "--docs", str(tmp_path)]).exit_code == 0
    stored = tmp_path / "evidence" / "quick"
    files = sorted(file.name for file in stored.rglob("*") if file.is_file())
    assert CliRunner().invoke(app, ["publish", str(stored), "--docs", str(tmp_path)]).exit_code == 0
    assert sorted(file.name for file in stored.rglob("*") if file.is_file()) == files
    assert [folder.name for folder in stored.parent.iterdir()] == ["quick"]


def test_a_run_that_is_refused_leaves_results_and_their_description_as_they_are(quick: Path, tmp_path: Path) -> None:
    before = (quick / "experiment.toml").read_bytes()
    text = (FOLDER / "quick.toml").read_text()
    for name in ("quick-train.jsonl", "quick-held-out.jsonl"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    (tmp_path / "other.toml").write_text(text.replace('name = "quick"', 'name = "other"', 1))
    (tmp_path / "changed.toml").write_text(
        text.replace("batch_size = ", "batch_size = 1", 1).replace("on this machine", "on that machine", 1)
    )
    refused = {
        "other.toml": "holds results of the experiment quick; choose another folder for other",
        "changed.toml": "other settings",
    }
    for file, why in refused.items():
        shown = CliRunner().invoke(app, ["run", str(tmp_path / file), "--out", str(quick), "--seeds", "1"])
        assert shown.exit_code == 1, shown.output
        assert why in shown.output
        assert (quick / "experiment.toml").read_bytes() == before
    missing = tmp_path / "missing"
    shown = CliRunner().invoke(app, ["run", str(FOLDER / "qqp.toml"), "--out", str(missing), "--data", str(tmp_path)])
    assert shown.exit_code == 1
    assert "name the folder that holds it with --data" in shown.output
    assert not missing.exists()


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.toml")), ids=lambda file: file.stem)
def test_every_experiment_that_comes_with_the_project_can_be_read(file: Path) -> None:
    assert read(file).name == file.stem
    named = re.findall(r"(?m)^(\S+) +\d+ contestants × \d+ seeds × \d+ rounds$", CliRunner().invoke(app, ["list"]).output)
    assert named.count(file.stem) == 1
    assert file.stem in {given["name"] for given in json.loads(CliRunner().invoke(app, ["list", "--json"]).stdout)}


def test_the_overhead_is_told_as_a_share_of_training_and_merging(places: Places, tmp_path: Path) -> None:
    given = experiment()
    found = timed(given, given.contestants[1], places, rounds=1)
    assert (found.agents, found.rounds, found.jobs) == (3, 1, 3)
    assert 0 < found.once <= found.other
    assert found.job * found.jobs == pytest.approx(found.steady * (found.train + found.merge)) == pytest.approx(found.other - found.once)
    assert found.share == pytest.approx(found.other / (found.train + found.merge))
    assert "1 rounds of 3 agents, delta" in str(found)
