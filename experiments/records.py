"""What is kept of a run: a file of JSON lines, the first about the run, then one for each round.

    experiment.toml                     as it was when the results were last added to
    runs/<contestant>--<seed>.jsonl     written whole, or not at all: a file that is there is a run that ended
    partitions/<seed>.jsonl             one line for each client: its class, and how many rows of which kind

Nothing in them names a place of the machine that they were made on.
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from experiments.experiment import Contestant, Experiment, read, slug
from protocol import VERSION, errors

if TYPE_CHECKING:
    from experiments.fleet import Member
    from experiments.material import Part

FILE = "experiment.toml"
ALL = "all"  # beside the kinds of rows: all of them together
LIBRARIES = ("torch", "transformers", "peft", "numpy")


class Record(BaseModel):
    """One line."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Header(Record):
    """What a run is, and where it was made."""

    experiment: str
    contestant: str
    seed: int
    settings: str  # the digest of all that the run follows from, but seed and model
    plan: str  # the plan's digest, with the model under the experiment's name for it
    model: str  # fingerprint
    ranks: dict[str, int]  # class of device → the rank that it runs, where that follows from its class
    mixes: dict[str, dict[str, float]]  # class → kind of rows → share of its rows
    headline: int  # the largest rank that any device runs: where the global adapter is looked at first
    software: dict[str, str]
    machine: dict[str, str]
    failed: str | None = None  # why there are no rounds: tried settings may be none that learn


class Seconds(Record):
    """Where a round's time went."""

    whole: float  # from one publication to the next, without measuring; the first round's with all that is made once
    train: float  # steps of agents: forward, backward, optimiser
    merge: float
    measure: float

    @property
    def overhead(self) -> float:
        """Everything but steps and merging."""
        return max(0.0, self.whole - self.train - self.merge)


class RoundRecord(Record):
    """What one published round came to."""

    round: int
    contributions: int
    lost: int  # jobs that were handed out and came to nothing
    ranks: dict[int, int]  # rank → contributions
    bytes_up: float
    bytes_down: float
    kept: dict[int, float]  # rank → share of the update's energy in the leading directions
    measures: dict[int, dict[str, dict[str, float]]]  # rank → ALL, or kind of rows → metric
    seconds: Seconds


class Share(Record):
    """One client's part of the rows."""

    client: str
    kind: str  # class of device
    rank: int
    rows: dict[str, int]  # kind of rows → how many


@dataclass(frozen=True)
class Finished:
    """A run that ended."""

    header: Header
    rounds: Sequence[RoundRecord]

    @cached_property
    def values(self) -> list[tuple[int, dict[str, float]]]:
        """The rounds that were measured at the headline rank, and what was found of all rows."""
        return [(r.round, r.measures[self.header.headline][ALL]) for r in self.rounds if self.header.headline in r.measures]


@dataclass(frozen=True)
class Results:
    """The folder of one experiment's results."""

    folder: Path
    source: Path | None = None  # the experiment's file

    def check(self, experiment: Experiment) -> None:
        """Raise Conflict where the folder holds another experiment's results."""
        if (kept := self.folder / FILE).is_file() and (other := read(kept).name) != experiment.name:
            raise errors.Conflict(f"{self.folder} holds results of the experiment {other}; choose another folder for {experiment.name}")

    def describe(self) -> None:
        """Keep the experiment's file beside its results."""
        if self.source is not None and self.source != self.folder / FILE:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / FILE).write_bytes(self.source.read_bytes())

    def file(self, contestant: str, seed: int) -> Path:
        """Where a run is kept."""
        return self.folder / "runs" / f"{slug(contestant)}--{seed}.jsonl"

    def find(self, contestant: Contestant, seed: int, settings: str) -> Finished | None:
        """A run, if it ended. Raises Conflict if it was made by other settings."""
        file = self.file(contestant.name, seed)
        if not file.exists():
            return None
        found = _read(file)
        if found.header.settings != settings:
            raise errors.Conflict(f"{file} was made by other settings of this experiment; remove it, or choose another folder")
        return found

    def keep(self, finished: Finished) -> None:
        """Write a run, whole."""
        _write(self.file(finished.header.contestant, finished.header.seed), [finished.header, *finished.rounds])

    def keep_partition(self, everybody: Sequence[Member], part: Part, seed: int) -> None:
        """Write who had which rows, unless that is there."""
        file = self.folder / "partitions" / f"{seed}.jsonl"
        if not file.exists():
            counts = [dict(sorted(Counter(part.kinds[n] for n in member.rows).items())) for member in everybody]
            shares = [Share(client=m.name, kind=m.kind.name, rank=m.kind.rank, rows=n) for m, n in zip(everybody, counts, strict=True)]
            _write(file, shares)

    def all(self) -> list[Finished]:
        """Every run that ended, by contestant and seed."""
        return sorted(map(_read, self.folder.glob("runs/*.jsonl")), key=lambda run: (run.header.contestant, run.header.seed))


def _read(file: Path) -> Finished:
    first, *rest = file.read_text("utf-8").splitlines()
    return Finished(Header.model_validate_json(first), [RoundRecord.model_validate_json(line) for line in rest])


def _write(file: Path, records: Iterable[Record]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    growing = file.with_suffix(".part")
    growing.write_text("".join(record.model_dump_json() + "\n" for record in records), "utf-8")
    os.replace(growing, file)


def software() -> dict[str, str]:
    """Versions of what computes."""
    return {"hlora": VERSION, "python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def machine() -> dict[str, str]:
    """What the numbers of seconds belong to."""
    return {"system": platform.system(), "processor": platform.machine(), "cores": str(os.cpu_count())}


def rounded(value: float) -> float:
    """Six digits: more than any difference here means, and fewer bytes."""
    return float(f"{value:.6g}")
