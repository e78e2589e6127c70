"""What an experiment works on: the rows of its sources, and where its model is."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
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


@dataclass(frozen=True)
class Material:
    """All rows of an experiment as they were read: of each source those that may be trained on, and those that all are measured on."""

    experiment: Experiment
    rows: Mapping[str, Sequence[Row]]  # source → its training rows
    held_out: Part  # the same for every seed
    digest: str  # of the rows' content alone: the same wherever they lie, another where one of them is another

    def training(self, seed: int) -> Part:
        """The rows that may be trained on with that seed."""
        named = [(s.name, row) for s in self.experiment.sources for row in _drawn(s, self.rows[s.name], seed)]
        return _part(self.experiment, named)


def read(experiment: Experiment, places: Places) -> Material:
    """Read all rows. Raises DataRefusal where a file or a column is missing, or a line is no row."""
    rows = {source.name: _rows(source, source.train, places) for source in experiment.sources}
    kept = [(s.name, row) for s in experiment.sources for row in _rows(s, s.held_out, places)[: s.held_out_rows]]
    return Material(experiment, rows, _part(experiment, kept), _digest([*rows.values(), [row for _, row in kept]]))


def _digest(parts: Iterable[Sequence[Row]]) -> str:
    found = hashlib.sha256()
    for rows in parts:
        for row in rows:
            found.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        found.update(b"\n")  # so that no row changes sides unnoticed
    return f"sha256:{found.hexdigest()}"


def _part(experiment: Experiment, named: Sequence[tuple[str, Row]]) -> Part:
    sources = [name for name, _ in named]
    label = experiment.task.label if isinstance(experiment.task, SequenceClassification) else None
    if experiment.partition.over == "label" and label is None:
        raise errors.InvalidRequest("a partition over labels needs a task that has some")
    kinds = [str(row.get(label)) for _, row in named] if label is not None and experiment.partition.over == "label" else sources
    return Part([row for _, row in named], sources, kinds)


def _drawn(source: Source, rows: Sequence[Row], seed: int) -> Sequence[Row]:
    if source.rows is None or source.rows >= len(rows):
        return rows
    return [rows[n] for n in sorted(random.Random(f"rows/{source.name}/{seed}").sample(range(len(rows)), source.rows))]


def _rows(source: Source, part: str, places: Places) -> list[Row]:
    """A source's rows: those of a file, or of a split on the hub."""
    place, rows = (
        (f"{source.hub}, {part}", _hub(source, part)) if source.hub else (str(places.data / part), _lines(source, places.data / part))
    )
    if not source.texts:
        return rows
    try:
        return [{"text": row[column]} for row in rows for column in source.texts]
    except KeyError as error:
        raise errors.DataRefusal(f"{source.name}: {place} has no column {error}") from None


def _lines(source: Source, file: Path) -> list[Row]:
    try:
        lines = file.read_text("utf-8").split("\n")
    except FileNotFoundError:
        raise errors.DataRefusal(f"{source.name}: {file} is not there; name the folder that holds it with --data") from None
    except OSError as error:
        raise errors.DataRefusal(f"{source.name}: {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise errors.DataRefusal(f"{source.name}: {file} is no text in UTF-8") from None
    return [_row(source, f"line {n} of {file}", line) for n, line in enumerate(lines, start=1) if line.strip()]


def _row(source: Source, place: str, line: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise errors.DataRefusal(f"{source.name}: {place} is no JSON: {error}") from None
    if not isinstance(row, dict):
        raise errors.DataRefusal(
            f"{source.name}: {place} is no row: an object with the columns' names was expected, not a {type(row).__name__}"
        )
    return row


def _hub(source: Source, split: str) -> list[Row]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise errors.DataRefusal(f"{source.name}: sets of the hub need the package datasets: pip install '.[hub]'") from None
    try:  # pragma: no cover: needs the hub's package and a network
        return [dict(row) for row in load_dataset(source.hub, source.subset, split=split)]
    except (OSError, ValueError) as error:  # pragma: no cover: as above
        raise errors.DataRefusal(f"{source.name}: {source.hub}, {split} cannot be read: {error}") from None
