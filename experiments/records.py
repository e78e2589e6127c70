"""What is kept of a run: a file of JSON lines, the first about the run, then one for each round.

    experiment.toml                     as it was when the results were last added to
    runs/<contestant>--<seed>.jsonl     written whole, or not at all; one that was cut all the same is a run that did not end
    partitions/<seed>.jsonl             one line for each client: its class, and how many rows of which kind it has

Nothing in them names a place of the machine that they were made on.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from experiments.experiment import Contestant, Experiment, read, slug
from protocol import VERSION, errors

if TYPE_CHECKING:
    from experiments.fleet import Member
    from experiments.material import Part

ROOT = Path(__file__).parents[1]
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
    ranks: dict[str, int]  # class of device → the rank that it runs: what its class says, or else what most of its jobs were given
    mixes: dict[str, dict[str, float]]  # class → kind of rows → share of its rows
    headline: int  # the rank at which the largest devices hold the adapter: where it is looked at first
    sliced: list[str] = []  # classes that hold their slices alone, under a strategy that hands out the whole adapter to whom can carry it
    software: dict[str, str]
    machine: dict[str, str]
    failed: str | None = None  # why there are no rounds: tried settings may be none that learn
    rounds: int | None = None  # the last round's number; older files do not say it, nor what follows
    data: str | None = None  # the digest of all rows that were there to train and to measure on
    commit: str | None = None  # of the project's checkout, "-dirty" where it was changed; none where there is no checkout


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
    drawn: dict[str, int] = {}  # client that was given a training job → its rank
    sliced: list[str] = []  # of these, who started from its slice because it cannot carry the whole adapter
    steps: dict[str, int] = {}  # client whose contribution came → the optimiser steps that it did


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

    def check(self, experiment: Experiment, data: str) -> None:
        """Raise Conflict where the folder holds another experiment's results, or some that were made with other rows."""
        if (kept := self.folder / FILE).is_file() and (other := read(kept).name) != experiment.name:
            raise errors.Conflict(f"{self.folder} holds results of the experiment {other}; choose another folder for {experiment.name}")
        for file in self._files():
            run = _read(file)
            if run is not None and run.header.data not in (None, data):
                raise errors.Conflict(f"{file} was made with other rows than the data files hold now; mend these, or choose another folder")

    def describe(self) -> None:
        """Keep the experiment's file beside its results."""
        if self.source is not None and self.source != self.folder / FILE:
            _kept(self.folder / FILE, self.source.read_bytes())

    def file(self, contestant: str, seed: int) -> Path:
        """Where a run is kept."""
        return self.folder / "runs" / f"{slug(contestant)}--{seed}.jsonl"

    def find(self, contestant: Contestant, seed: int, settings: str) -> Finished | None:
        """A run, if it ended. Raises Conflict if it was made by other settings."""
        file = self.file(contestant.name, seed)
        found = _read(file) if file.exists() else None
        if found is not None and found.header.settings != settings:
            raise errors.Conflict(f"{file} was made by other settings of this experiment; remove it, or choose another folder")
        return found

    def keep(self, finished: Finished) -> None:
        """Write a run, whole."""
        _write(self.file(finished.header.contestant, finished.header.seed), [finished.header, *finished.rounds])

    def keep_partition(self, everybody: Sequence[Member], part: Part, seed: int) -> None:
        """Write how many rows of which kind each client has, unless that is there; which ones they are follows from the seed."""
        file = self.folder / "partitions" / f"{seed}.jsonl"
        if not file.exists():
            counts = [dict(sorted(Counter(part.kinds[n] for n in member.rows).items())) for member in everybody]
            shares = [Share(client=m.name, kind=m.kind.name, rank=m.kind.rank, rows=n) for m, n in zip(everybody, counts, strict=True)]
            _write(file, shares)

    def all(self) -> list[Finished]:
        """Every run that ended, by contestant and seed. Raises Conflict for a file that was cut."""
        return sorted(map(_whole, self._files()), key=lambda run: (run.header.contestant, run.header.seed))

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("runs/*.jsonl"))


def _whole(file: Path) -> Finished:
    found = _read(file)
    if found is None:
        raise errors.Conflict(f"{file} is cut: its end is missing; `run` does it anew, or remove it")
    return found


def _read(file: Path) -> Finished | None:
    """The run of a file; none if the file was cut. Raises Conflict for whole lines that are no records of a run."""
    lines = [line for line in file.read_bytes().split(b"\n") if line]
    try:
        json.loads(lines[-1])
    except (IndexError, ValueError):
        return None
    try:
        header, rounds = Header.model_validate_json(lines[0]), [RoundRecord.model_validate_json(line) for line in lines[1:]]
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise errors.Conflict(f"{file} is no run that this version can read ({what}); remove it, or choose another folder") from None
    wanted = 1 if header.rounds is None else header.rounds + 1  # round 0 among them
    return Finished(header, rounds) if header.failed is not None or len(rounds) >= wanted else None


def _write(file: Path, records: Iterable[Record]) -> None:
    _kept(file, "".join(record.model_dump_json() + "\n" for record in records).encode())


def _kept(file: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    growing = file.with_suffix(".part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        growing.write_bytes(content)
        os.replace(growing, file)
    except OSError as error:
        raise errors.Conflict(f"{file} cannot be written: {error.strerror}; mend that, or choose another folder") from None


def software() -> dict[str, str]:
    """Versions of what computes."""
    return {"hlora": VERSION, "python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def commit(root: Path = ROOT) -> str | None:
    """What the project's checkout stands at; none where this is no checkout, or git is not there."""
    if not (root / ".git").exists():  # an installed copy may lie within a checkout of something else
        return None
    # No lock is taken: somebody may work in the checkout.
    asked = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        told = subprocess.run(asked, cwd=root, capture_output=True, text=True)  # noqa: S603  constants, and the git of whoever runs this
    except OSError:
        return None
    return told.stdout.strip() or None


def machine() -> dict[str, str]:
    """What the numbers of seconds belong to."""
    return {"system": platform.system(), "processor": platform.machine(), "cores": str(os.cpu_count())}


def rounded(value: float) -> float:
    """Six digits: more than any difference here means, and fewer bytes."""
    return float(f"{value:.6g}")
