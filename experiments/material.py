"""What an experiment works on: the rows of its sources, and where its model is."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.experiment import Experiment, Source
from protocol import errors
from protocol.plan import Model, SequenceClassification

Row = dict[str, object]


@dataclass(frozen=True)
class Places:
    """Where models and data are on this machine; results know nothing of it."""

    models: Path
    data: Path

    def model(self, experiment: Experiment) -> Model:
        """The experiment's model: a folder of the models' folder, or else what the name says anywhere."""
        folder = self.models / experiment.model
        return Model(id=str(folder.resolve()) if folder.is_dir() else experiment.model, revision=experiment.revision)


@dataclass(frozen=True)
class Part:
    """Some rows, with the source of each and the kind by which partitions mix them."""

    rows: Sequence[Row]
    sources: Sequence[str]
    kinds: Sequence[str]

    def of(self, kind: str) -> list[Row]:
        """The rows of one kind."""
        return [row for row, own in zip(self.rows, self.kinds, strict=True) if own == kind]


def training(experiment: Experiment, places: Places, seed: int) -> Part:
    """All rows that may be trained on. Raises DataRefusal where a file or a column is missing."""
    return _part(experiment, [(source.name, row) for source in experiment.sources for row in _drawn(source, places, seed)])


def held_out(experiment: Experiment, places: Places) -> Part:
    """The rows on which everything is measured, the same for every seed. Raises DataRefusal as `training` does."""
    named = [(s.name, row) for s in experiment.sources for row in _rows(s, places.data / s.held_out)[: s.held_out_rows]]
    return _part(experiment, named)


def _part(experiment: Experiment, named: Sequence[tuple[str, Row]]) -> Part:
    sources = [name for name, _ in named]
    label = experiment.task.label if isinstance(experiment.task, SequenceClassification) else None
    if experiment.partition.over == "label" and label is None:
        raise errors.InvalidRequest("a partition over labels needs a task that has some")
    kinds = [str(row.get(label)) for _, row in named] if label is not None and experiment.partition.over == "label" else sources
    return Part([row for _, row in named], sources, kinds)


def _drawn(source: Source, places: Places, seed: int) -> list[Row]:
    rows = _rows(source, places.data / source.train)
    if source.rows is None or source.rows >= len(rows):
        return rows
    return [rows[n] for n in sorted(random.Random(f"rows/{source.name}/{seed}").sample(range(len(rows)), source.rows))]


def _rows(source: Source, file: Path) -> list[Row]:
    try:
        return [row for line in file.read_text("utf-8").split("\n") if line.strip() for row in _texts(source, json.loads(line))]
    except FileNotFoundError:
        raise errors.DataRefusal(f"{source.name}: {file} is not there; name the folder that holds it with --data") from None
    except KeyError as error:
        raise errors.DataRefusal(f"{source.name}: {file} has no column {error}") from None
    except ValueError as error:
        raise errors.DataRefusal(f"{source.name}: {file} is not JSON lines: {error}") from None


def _texts(source: Source, row: Row) -> Iterator[Row]:
    if source.texts:
        yield from ({"text": row[column]} for column in source.texts)
    else:
        yield row
