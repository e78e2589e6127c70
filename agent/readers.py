"""Files of rows, one row at a time."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

Row = Mapping[str, object]


class Unreadable(Exception):
    """A file is not what its format asks for. Its words may be told: they quote nothing of the file."""


def semicolons(names: Collection[str]) -> str:
    """What to say beside a refusal where a file's only name looks like several; nothing elsewhere."""
    several = len(names) == 1 and ";" in next(iter(names))
    return "; semicolons seem to stand between its fields: save the file with commas there" if several else ""


def _jsonl(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig") as lines:
        for n, line in enumerate((line for line in lines if line.strip()), start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # the former's words quote the line
                raise Unreadable(f"row {n} is no JSON object ({type(error).__name__}); mend it, or remove it") from error
            if not isinstance(row, dict):
                raise Unreadable(f"row {n} is no JSON object, which begins with a brace; mend it, or remove it")
            yield row


def _csv(file: Path) -> Iterator[Row]:
    names: list[str] = []
    n = 0
    with file.open(encoding="utf-8-sig", newline="") as lines:
        records = (record for record in csv.reader(lines, strict=True) if record)  # an empty line is no record
        try:
            names = next(records, [])
            named = [name for name in names if name]  # spreadsheets write several columns without a name or a value
            if len(set(named)) < len(named):
                raise Unreadable("two columns have the same name in its first line")
            for n, record in enumerate(records, start=1):
                if len(record) != len(names):
                    fields = f"the fields of row {n} are {len(record)}, those of the first line {len(names)}"
                    raise Unreadable(fields + (semicolons(names) or "; put texts with commas in quotation marks"))
                yield dict(zip(names, record, strict=True))
        except csv.Error as error:  # whose words are about commas and quotation marks, and none from the file
            most = csv.field_size_limit()
            closed = f"; look for a quotation mark that is not closed, and give texts of more than {most:,} characters as jsonl"
            where = f"row {n + 1}" if names else "the first line"
            raise Unreadable(f"{where} cannot be read as csv ({error}){semicolons(names) or closed}") from error


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise Unreadable(f"cannot be read as parquet ({type(error).__name__})") from error


READERS = {"jsonl": _jsonl, "csv": _csv, "parquet": _parquet}
