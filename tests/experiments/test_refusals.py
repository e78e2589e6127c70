"""What an experiment, its data or its plans cannot be is said in a line, before anything runs."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from experiments import course, material
from experiments.__main__ import app
from experiments.course import Setup
from experiments.experiment import FOLDER, Experiment
from experiments.material import Places
from experiments.measuring import Measurer
from experiments.plans import overlaid
from modelling.layout import resolve
from protocol import errors

QUICK: dict[str, Any] = tomllib.loads((FOLDER / "quick.toml").read_text("utf-8"))
ROWS = [{"text": f"text {n}", "label": "weather"} for n in range(64)]


def quick(**changes: object) -> Experiment:
    """The quick experiment, changed; tables key by key."""
    return Experiment.model_validate(overlaid(QUICK, changes))  # type: ignore[arg-type]  # what JSON can say


def written(folder: Path, *, train: str | None = None, held_out: str | None = None) -> Places:
    """A folder with both data files."""
    good = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "quick-train.jsonl").write_text(good if train is None else train)
    (folder / "quick-held-out.jsonl").write_text(good if held_out is None else held_out)
    return Places(folder, folder)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('["sunny", "weather"]', "sentences: line 2 of .*quick-train.jsonl is no row: .*, not a list"),
        ('{"text": ', "sentences: line 2 of .*quick-train.jsonl is no JSON: "),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str, why: str) -> None:
    places = written(tmp_path, train=json.dumps(ROWS[0]) + "\n" + line + "\n")
    with pytest.raises(errors.DataRefusal, match=why):
        material.read(quick(), places)


def test_files_that_are_no_text_or_cannot_be_opened_are_named(tmp_path: Path) -> None:
    places = written(tmp_path)
    (tmp_path / "quick-train.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(errors.DataRefusal, match=r"quick-train\.jsonl is no text in UTF-8"):
        material.read(quick(), places)
    (tmp_path / "quick-train.jsonl").unlink()
    (tmp_path / "quick-train.jsonl").mkdir()
    with pytest.raises(errors.DataRefusal, match=r"quick-train\.jsonl cannot be read: Is a directory"):
        material.read(quick(), places)
    file = tmp_path / "latin.toml"
    file.write_bytes('name = "größe"\n'.encode("latin-1"))
    shown = CliRunner().invoke(app, ["run", str(file), "--out", str(tmp_path / "out")])
    assert (shown.exit_code, shown.stderr) == (1, f"{file} is no text in UTF-8, as TOML must be; save it in that encoding\n")


def test_the_digest_of_the_rows_follows_their_content_and_nothing_else(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    first = material.read(quick(), written(here)).digest
    assert material.read(quick(), written(there, train=text.replace("\n", "\n\n").replace(": ", ":"))).digest == first
    changed = {
        "a row": written(there, train=text.replace("text 7", "text 8")),
        "a held-out row": written(there, held_out=text.replace("text 7", "text 8")),
        "a side": written(there, train=text + json.dumps(ROWS[0]) + "\n", held_out="".join(text.splitlines(keepends=True)[1:])),
    }
    assert {what for what, places in changed.items() if material.read(quick(), places).digest == first} == set()


def test_a_held_out_row_that_cannot_be_measured_is_named_by_its_source_and_number(tmp_path: Path) -> None:
    """The fortieth row is the first of the kind `snow`."""
    rows = [{"text": "a text", "label": "weather" if n % 2 else "kitchen"} for n in range(39)] + [{"text": "a text", "label": "snow"}]
    given = quick()
    places = written(tmp_path, held_out="".join(json.dumps(row) + "\n" for row in rows))
    setup = Setup.prepared(places, material.read(given, places), 0)
    (_, plan), *_ = course.plans(setup, given.contestants[0])
    with pytest.raises(errors.DataRefusal, match="row 40 of 'sentences' has a label that is none of the plan's labels"):
        Measurer.prepared(resolve(plan), setup.held_out, 32)


@pytest.mark.skipif(find_spec("datasets") is not None, reason="the package of the hub's data sets is installed")
def test_a_set_of_the_hub_without_the_hubs_package_says_what_to_install(tmp_path: Path) -> None:
    source = {"name": "mrpc", "hub": "nyu-mll/glue", "subset": "mrpc", "train": "train", "held_out": "validation"}
    with pytest.raises(errors.DataRefusal, match=r"mrpc: sets of the hub need the package datasets: pip install '\.\[hub\]'"):
        material.read(quick(sources=[source]), Places(tmp_path, tmp_path))


SOURCE = {"name": "sentences", "train": "quick-train.jsonl", "held_out": "quick-held-out.jsonl"}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"measures": {"metric": "f1"}},
            'f1 says nothing of rows of a single label; with a partition over "label" measure accuracy or loss',
        ),
        (
            {"task": {"kind": "causal-lm", "max_length": 16}, "partition": {"over": "source"}, "measures": {"metric": "accuracy"}},
            "a language model has no accuracy; its metric is loss",
        ),
        ({"sources": [{**SOURCE, "subset": "mrpc"}]}, "only a data set of the hub has a subset"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes: Mapping[str, object], why: str) -> None:
    told = overlaid(QUICK, changes)  # type: ignore[arg-type]  # what JSON can say
    if "task" in changes:
        told["task"] = changes["task"]  # type: ignore[assignment]  # as above
    with pytest.raises(ValidationError, match=why):
        Experiment.model_validate(told)


def test_f1_over_sources_is_no_trouble() -> None:
    assert quick(measures={"metric": "f1"}, partition={"over": "source"}).measures.metric == "f1"


@pytest.mark.parametrize(
    ("right", "wrong", "why"),
    [
        ("rounds = 2\n", "roundz = 2\n", "delta: rounds: Field required; roundz is unknown; is rounds meant?"),
        ("target = 4, quorum = 3", "target = 9, quorum = 9", "delta: cohort.quorum: 9 contributions never come of 8 clients"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_with_what_was_meant(tmp_path: Path, right: str, wrong: str, why: str) -> None:
    (tmp_path / "wrong.toml").write_text((FOLDER / "quick.toml").read_text("utf-8").replace(right, wrong))
    asked = ["run", str(tmp_path / "wrong.toml"), "--data", str(FOLDER), "--out", str(tmp_path / "out"), "--only", "delta"]
    shown = CliRunner().invoke(app, asked)
    assert (shown.exit_code, shown.stderr) == (1, why + "\n")
    assert not (tmp_path / "out").exists()
