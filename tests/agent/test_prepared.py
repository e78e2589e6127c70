"""Rows are tokenised once, and again when their files change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from agent.data import Catalogue, Part, Source
from agent.encoding import Example
from agent.prepared import Prepared
from modelling import base
from protocol import errors
from protocol.messages import Job
from protocol.plan import SequenceClassification
from tests.agent.work import ROWS, catalogue, make_job


@pytest.fixture
def job(encoder: Path) -> Job:
    return make_job(encoder)


def examples(prepared: Prepared, job: Job, part: Part = Part.train) -> list[Example]:
    return prepared.examples(job, part, base.load(job.model, job.task).tokenizer)


def test_the_same_rows_are_tokenised_once(tmp_path: Path, job: Job) -> None:
    prepared = Prepared(catalogue(tmp_path))
    first, held_out = examples(prepared, job), examples(prepared, job, Part.held_out)
    again = job.model_copy(update={"id": "job-2", "round": 4, "seed": 9})
    assert examples(prepared, again) is first
    assert examples(prepared, again, Part.held_out) is held_out
    assert (len(first), len(held_out)) == (18, 6)


def test_a_file_that_changed_is_read_anew(tmp_path: Path, job: Job) -> None:
    prepared = Prepared(catalogue(tmp_path, held_out=None))
    first = examples(prepared, job)
    turned: list[Mapping[str, object]] = [
        {**row, "label": {"blue": "red", "red": "blue"}.get(str(row["label"]), row["label"])} for row in ROWS
    ]
    catalogue(tmp_path, turned)
    assert (tmp_path / "things.jsonl").stat().st_size == sum(len(json.dumps(row)) + 1 for row in ROWS)  # as long as before
    again = examples(prepared, job)
    assert [example.ids for example in again] == [example.ids for example in first]
    assert [example.target for example in again] != [example.target for example in first]


def test_another_task_another_model_and_another_alias_are_other_rows(tmp_path: Path, job: Job) -> None:
    found = catalogue(tmp_path)
    prepared = Prepared(Catalogue({**found.sources, "others": Source(format="jsonl", path="things.jsonl", max_rows=7)}, tmp_path))
    first = examples(prepared, job)
    assert isinstance(job.task, SequenceClassification)
    short = job.model_copy(update={"task": job.task.model_copy(update={"max_length": 3})})
    assert {len(example.ids) for example in examples(prepared, short)} == {3}
    assert len(examples(prepared, job.model_copy(update={"data": "others"}))) == 7
    other = base.copy(job.model, job.task).tokenizer
    assert prepared.examples(job, Part.train, other) is not first


def test_rows_kept_back_in_a_file_of_their_own_are_those_of_that_file(tmp_path: Path, job: Job) -> None:
    catalogue(tmp_path)
    (tmp_path / "apart.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    prepared = Prepared(Catalogue({"things": Source(format="jsonl", path="things.jsonl", held_out="apart.jsonl")}, tmp_path))
    train = examples(prepared, job)
    assert len(examples(prepared, job, Part.held_out)) == 1
    (tmp_path / "apart.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    assert len(examples(prepared, job, Part.held_out)) == 2
    assert examples(prepared, job) is train


def test_more_rows_than_memory_is_meant_for_are_not_kept(tmp_path: Path, job: Job) -> None:
    count = sum(len(example.ids) for example in examples(Prepared(catalogue(tmp_path)), job))
    for most, kept in ((count, True), (count - 1, False)):
        prepared = Prepared(catalogue(tmp_path), most)
        assert (examples(prepared, job) is examples(prepared, job)) == kept


def test_rows_whose_file_is_gone_are_gone(tmp_path: Path, job: Job) -> None:
    prepared = Prepared(catalogue(tmp_path))
    examples(prepared, job)
    (tmp_path / "things.jsonl").unlink()
    with pytest.raises(errors.DataRefusal, match="is not there"):
        examples(prepared, job)


def test_of_a_data_set_on_the_hub_nobody_knows_whether_it_changed(tmp_path: Path) -> None:
    found = Catalogue({"far": Source(format="hub", path="some/where", held_out="test")}, tmp_path)
    assert found.version("far", Part.train) is found.version("far", Part.held_out) is None
