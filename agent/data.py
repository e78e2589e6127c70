"""The device's own data sets, by alias. Rows are read here and go to training; nothing else of them leaves this module
than counts and column names, and no message quotes a value.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from agent.readers import READERS, Row, Unreadable, semicolons
from protocol import errors, texts
from protocol.messages import Dataset
from protocol.strict import Strict, mistakes

FILE = "datasets.toml"
LONGEST_NAME = 64  # characters, in the first line of a CSV file
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
NUMBER = re.compile(r"[+-]?[0-9]+([.,][0-9]+)?")
Numbered = tuple[int, Row]  # a row and its number: the first that is read of a file is 1


class Part(StrEnum):
    """Which rows of a data set."""

    train = "train"
    held_out = "held_out"


class Source(Strict):
    """One data set as datasets.toml describes it."""

    format: Literal["jsonl", "csv", "parquet", "hub"]
    path: str = Field(min_length=1, description="file, relative to datasets.toml; or the name on the hub")
    columns: dict[str, str] = Field(default={}, description="column as it is here → column as plans call it")
    held_out: str | float | None = Field(
        default=None, description="rows kept back for evaluation: a file (on the hub: a split), or a share of the rows"
    )
    max_rows: int | None = Field(default=None, ge=1, description="no more than the first so many rows are read")
    seed: int = Field(default=0, description="which rows a share holds back")
    subset: str | None = Field(default=None, description="hub only: the data set's configuration")
    split: str = Field(default="train", description="hub only")

    @model_validator(mode="after")
    def _share(self) -> Source:
        if isinstance(self.held_out, float) and not 0 < self.held_out < 1:
            raise ValueError(f"held_out = {self.held_out:g} is no share between 0 and 1; a file is named in quotes")
        return self

    @model_validator(mode="after")
    def _distinct(self) -> Source:
        if len(set(self.columns.values())) < len(self.columns):
            raise ValueError("columns gives two columns the same name")
        return self

    def named(self, row: Row) -> Row:
        """A row with its columns as plans call them. What only happens to have the name of a mapped column is left out."""
        taken = self.columns.values()
        return {self.columns.get(name, name): value for name, value in row.items() if name in self.columns or name not in taken}


SOURCES = TypeAdapter(dict[Annotated[str, Field(max_length=128)], Source])


@dataclass(frozen=True)
class Catalogue:
    """All data sets of a device. Knows files and columns; knows nothing of models."""

    sources: Mapping[str, Source] = field(default_factory=dict)
    folder: Path = Path()

    def rows(self, alias: str, part: Part) -> Iterator[Numbered]:
        """One part's rows and their numbers, one at a time, with the columns named as plans name them. The two parts share no row.

        Raises DataRefusal if there is no such data set or it cannot be read.
        """
        source = self.source(alias)
        rows: Iterable[Numbered]
        if isinstance(source.held_out, float):
            below, _ = _divided(alias, source, self._read(alias, source, source.path, source.split))
            every = self._read(alias, source, source.path, source.split)
            rows = ((n, row) for n, row in every if (_lot(source, row) < below) == (part is Part.held_out))
        elif part is Part.train:
            rows = self._read(alias, source, source.path, source.split)
        elif source.held_out is None:
            raise errors.DataRefusal(f"{alias!r} keeps no rows back for evaluation; set held_out in {FILE}", alias=alias)
        else:
            rows = self._read(alias, source, source.path if source.format == "hub" else source.held_out, source.held_out)
        return ((n, source.named(row)) for n, row in rows)

    def source(self, alias: str) -> Source:
        """A data set's description. Raises DataRefusal, naming those that there are."""
        try:
            return self.sources[alias]
        except KeyError:
            raise errors.DataRefusal(
                f"there is no data set {alias!r} here, only {', '.join(sorted(self.sources)) or 'none'}; add it to {FILE}",
                alias=alias,
                known=sorted(self.sources),
            ) from None

    def version(self, alias: str, part: Part) -> tuple[object, ...] | None:
        """What stays the same for as long as a part's rows do; None where that cannot be told without reading them."""
        source = self.source(alias)
        if source.format == "hub":
            return None
        try:
            found = self._file(source.held_out if part is Part.held_out and isinstance(source.held_out, str) else source.path).stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def describe(self, alias: str) -> Dataset:
        """Counts and column names: all that the coordinator is told. Reads the whole data set once. Raises DataRefusal."""
        source = self.source(alias)
        count, kept, columns = 0, 0, dict[str, None]()

        def counted() -> Iterator[Numbered]:
            nonlocal count
            for count, row in self._read(alias, source, source.path, source.split):
                columns.update(dict.fromkeys(source.named(row)))
                yield count, row

        if isinstance(source.held_out, float):
            _, kept = _divided(alias, source, counted())
        else:
            deque(counted(), maxlen=0)
        if not count:
            raise errors.DataRefusal(f"{alias!r} has no rows", alias=alias)
        if isinstance(source.held_out, float):
            count -= kept
        elif source.held_out is not None:
            kept = sum(1 for _ in self.rows(alias, Part.held_out))
        for n, name in enumerate(columns, start=1):  # which may be a text by itself, where a file has no line of names
            if texts.ODD.search(name):
                raise errors.DataRefusal(f"{alias!r}: column {n} needs another name: {texts.REASON}", alias=alias)
        try:
            return Dataset(train=count, held_out=kept, columns=list(columns))
        except ValidationError:
            raise errors.DataRefusal(
                f"{alias!r} has {len(columns)} columns; no more than 1,000 can be told, with names in Unicode of at most 256 characters",
                alias=alias,
            ) from None

    def _file(self, path: str) -> Path:
        return self.folder / Path(path).expanduser()

    def _read(self, alias: str, source: Source, path: str, split: str) -> Iterator[Numbered]:
        n = 0
        row: Row = {}
        missing = list(source.columns)
        try:
            rows = _hub(source, split) if source.format == "hub" else READERS[source.format](self._file(path))
            for n, row in enumerate(islice(rows, source.max_rows), start=1):
                if n == 1 and source.format == "csv" and any(map(_no_name, row.keys() - source.columns.keys())):
                    raise Unreadable(
                        "its first line has to name the columns, with commas between them, but what stands there is a number, has "
                        f"more than {LONGEST_NAME} characters, or a line break or tab; add a line of names, or map it in columns"
                    )
                missing = [name for name in missing if name not in row]
                if missing and source.format != "jsonl":  # whose rows need not be alike
                    break
                yield n, row
        except Unreadable as error:
            raise errors.DataRefusal(f"{alias!r}: {path}: {error}", alias=alias) from error
        except (OSError, ValueError, ArithmeticError, TypeError, RecursionError) as error:
            # The reader's own words may quote a row, so only the kind of the error is told.
            why = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read as {source.format} ({type(error).__name__})"
            raise errors.DataRefusal(f"{alias!r}: {path} {why}; mend the file or its entry in {FILE}", alias=alias) from error
        except ImportError as error:
            raise errors.DataRefusal(f"{alias!r} needs the package {error.name}; pip install it", alias=alias) from error
        if missing and n:
            raise errors.DataRefusal(
                f"{alias!r}: {path} has no column {missing[0]!r}, only {', '.join(list(row)[:20])}"
                + (semicolons(row) or f"; mend columns in {FILE}"),
                alias=alias,
                column=missing[0],
                known=list(row)[:20],
            )


def _no_name(name: str) -> bool:
    """Whether this stands in a first line that rather is a row. Names are told to the coordinator, rows are not."""
    return len(name) > LONGEST_NAME or CONTROL.search(name) is not None or NUMBER.fullmatch(name) is not None


def _divided(alias: str, source: Source, rows: Iterable[Numbered]) -> tuple[float, int]:
    """Rows whose lot is below the first number are kept back; and how many these are: at least one, never all.

    Raises DataRefusal for rows of which no part can be kept back.
    """
    assert isinstance(source.held_out, float), "only a share is drawn"
    share, count, kept = source.held_out, 0, 0
    first, second, last = math.inf, math.inf, -math.inf  # the least two lots and the largest; equal rows have the same
    firsts, lasts = 0, 0
    for lot in (_lot(source, row) for _, row in rows):
        count, kept = count + 1, kept + (lot < share)
        if lot <= first:
            firsts = firsts + 1 if lot == first else 1
            first, second = lot, second if lot == first else first
        elif lot < second:
            second = lot
        if lot >= last:
            lasts = lasts + 1 if lot == last else 1
            last = lot
    if not count:
        raise errors.DataRefusal(f"{alias!r} has no rows", alias=alias)
    if second == math.inf:
        raise errors.DataRefusal(
            f"{alias!r} has {'one row' if count == 1 else f'{count} rows, all alike'}; a share can only be kept back of two or more "
            "unlike ones",
            alias=alias,
        )
    if share <= first:
        return second, firsts
    return (share, kept) if last >= share else (last, count - lasts)


def _lot(source: Source, row: Row) -> float:
    """What a row drew in [0, 1): of its content and the seed alone, so that no other row's coming or going moves it."""
    text = json.dumps(row, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(f"{source.seed}/{text}".encode(), digest_size=7).digest()) / 2**56


def _hub(source: Source, split: str) -> Iterable[Row]:  # pragma: no cover: needs the hub's package and a network
    from datasets import load_dataset

    found: Iterable[Row] = load_dataset(source.path, source.subset, split=split)
    return found


def load(home: Path) -> Catalogue:
    """The data sets of a home folder; none where there is no file. Raises DataRefusal if the file is wrong."""
    try:
        return Catalogue(SOURCES.validate_python(tomllib.loads((home / FILE).read_text("utf-8"))), home)
    except FileNotFoundError:
        return Catalogue()
    except (OSError, UnicodeDecodeError) as error:
        raise errors.DataRefusal(f"{home / FILE} cannot be read as UTF-8 ({type(error).__name__}); mend it or its permissions") from None
    except tomllib.TOMLDecodeError as error:
        raise errors.DataRefusal(f"{home / FILE} is no TOML: {error}") from None
    except ValidationError as error:
        raise errors.DataRefusal(f"{home / FILE}: {next(mistakes(error, Source, entries=1))}") from None
