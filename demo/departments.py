"""Departments and their rows: dividing one body of text unequally, or taking what each department brings."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from protocol import errors

ALIAS = "texts"  # the data set's name in every datasets.toml and in the plan
SHARES: Mapping[str, int] = {
    "research": 420,
    "platform": 340,
    "finance": 260,
    "design": 200,
    "support": 180,
    "field office": 140,
    "legal": 100,
    "archive": 60,
}
MIXTURE = 1.0  # Dirichlet's parameter for each department's mixture of labels; smaller is more one-sided
HELD_OUT = 0.2  # share of one's own rows that is held out


@dataclass(frozen=True)
class Row:
    """A labelled text, or pair of texts."""

    text: str
    label: str
    text_pair: str | None = None
    held_out: bool = False
    source: str = ""  # the file that it comes from

    def line(self) -> str:
        """The row as a line of JSON, as far as an agent needs it."""
        columns = {"text": self.text, "text_pair": self.text_pair, "label": self.label}
        return json.dumps({name: value for name, value in columns.items() if value is not None}, ensure_ascii=False)


@dataclass
class Department:
    """Who takes part, with the rows that never leave it."""

    name: str
    train: list[Row] = field(default_factory=list)
    held_out: list[Row] = field(default_factory=list)

    def write(self, home: Path) -> None:
        """Put the rows and their description where the department's agent looks for them."""
        home.mkdir(parents=True, exist_ok=True)
        for name, rows in (("train", self.train), ("held_out", self.held_out)):
            (home / f"{name}.jsonl").write_text("".join(row.line() + "\n" for row in rows), encoding="utf-8")
        (home / "datasets.toml").write_text(f'[{ALIAS}]\nformat = "jsonl"\npath = "train.jsonl"\nheld_out = "held_out.jsonl"\n')


def divide(rows: Sequence[Row], total: int, seed: int) -> list[Department]:
    """Departments of very different sizes, each with its own mixture of labels, drawn from a Dirichlet distribution.

    They have `total` rows together, or as many as there are. A department's held-out rows have the mixture of its
    training rows, as far as there are enough of each label.
    """
    chance = random.Random(seed)
    labels = sorted({row.label for row in rows})
    piles = {part: _piles([row for row in rows if row.held_out is part], chance) for part in (False, True)}
    total = min(total, len(rows))
    apart = min(sum(row.held_out for row in rows), round(HELD_OUT * total))
    budget = {True: apart, False: min(total - apart, sum(not row.held_out for row in rows))}
    counts = {part: _apportion(budget[part], list(SHARES.values())) for part in (False, True)}
    departments = []
    for n, name in enumerate(SHARES):
        mixture = {label: chance.gammavariate(MIXTURE, 1.0) for label in labels}
        took = {part: _take(piles[part], mixture, counts[part][n]) for part in (False, True)}
        departments.append(Department(name, train=took[False], held_out=took[True]))
    return _whole(departments)


def _piles(rows: Iterable[Row], chance: random.Random) -> dict[str, list[Row]]:
    piles: dict[str, list[Row]] = {}
    for row in rows:
        piles.setdefault(row.label, []).append(row)
    for label in sorted(piles):
        chance.shuffle(piles[label])
    return piles


def _apportion(whole: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers in about these shares, that sum to the whole."""
    marks = [round(whole * part / sum(shares)) for part in itertools.accumulate(shares, initial=0)]
    return [stop - start for start, stop in itertools.pairwise(marks)]


def _take(piles: Mapping[str, list[Row]], mixture: Mapping[str, float], count: int) -> list[Row]:
    """So many rows in these proportions, taken off the piles; what one pile lacks comes from the largest others."""
    wanted = zip(mixture, _apportion(count, list(mixture.values())), strict=True)
    took = [piles[label].pop() for label, n in wanted for _ in range(min(n, len(piles.get(label, ()))))]
    while len(took) < count and any(piles.values()):
        took.append(max(piles.values(), key=len).pop())
    return took


def _whole(departments: list[Department]) -> list[Department]:
    for department in departments:
        if not department.train or not department.held_out:
            raise errors.DataRefusal(
                f"{department.name} has {len(department.train)} rows to train on and {len(department.held_out)} held out; "
                "each department needs some of both, so bring more rows"
            )
    return departments


# --- one's own data ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """The columns of one's own files."""

    text: str = "text"
    label: str = "label"
    text_pair: str | None = None


def bring(place: Path, columns: Columns, total: int, seed: int) -> list[Department]:
    """Departments from a folder of JSON-lines files, one for each, or from one such file, which is divided.

    A row that occurs again, in whatever file, is left out, and a fifth of the rows are held out by their digest, so that
    the two parts share none. Raises DataRefusal where there is nothing to use.
    """
    if place.is_file():
        return divide(_distinct(_read(place, columns), set()), total, seed)
    files = sorted(place.glob("*.jsonl"))
    if len(files) < 2:
        raise errors.DataRefusal(f"{place} has {len(files)} .jsonl files; give a folder with one for each department, or one file")
    seen: set[str] = set()
    departments = []
    for file in files:
        rows = _distinct(_read(file, columns), seen)
        departments.append(Department(file.stem, [r for r in rows if not r.held_out], [r for r in rows if r.held_out]))
    return sorted(_whole(departments), key=lambda department: -len(department.train))


def _read(file: Path, columns: Columns) -> Iterable[Row]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            text, label = str(found[columns.text]), str(found[columns.label])
            pair = str(found[columns.text_pair]) if columns.text_pair else None
        except (ValueError, KeyError, TypeError):
            wanted = ", ".join(name for name in (columns.text, columns.text_pair, columns.label) if name)
            raise errors.DataRefusal(f"{file}:{number} is no JSON object with the columns {wanted}") from None
        yield Row(text, label, pair, source=file.name)


def _distinct(rows: Iterable[Row], seen: set[str]) -> list[Row]:
    kept = []
    for row in rows:
        digest = hashlib.sha256(f"{row.text}\0{row.text_pair}".encode()).hexdigest()
        if digest not in seen:
            seen.add(digest)
            kept.append(replace(row, held_out=int(digest[:8], 16) < HELD_OUT * 2**32))
    return kept


# --- what is told of them ------------------------------------------------------------------------------------------------


def labels(departments: Iterable[Department]) -> list[str]:
    """All labels, sorted."""
    return sorted({row.label for department in departments for row in (*department.train, *department.held_out)})


def majority(departments: Iterable[Department]) -> float:
    """The share of the held-out rows that the best single guess gets right."""
    counts = Counter(row.label for department in departments for row in department.held_out)
    return max(counts.values()) / counts.total()
