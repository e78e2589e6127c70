"""Files of rows, one row at a time."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

Row = Mapping[str, object]


class Unreadable(Exception):
    """A file is not what its format asks for. Its words may be told: they quote nothing of the file."""


def _jsonl(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig") as lines:
        for line in lines:
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("a line is no JSON object")
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
                    raise Unreadable(f"{fields}; put texts with commas in quotation marks")
                yield dict(zip(names, record, strict=True))
        except csv.Error as error:  # whose words are about commas and quotation marks, and none from the file
            raise Unreadable(
                f"{f'row {n + 1}' if names else 'the first line'} cannot be read as csv ({error}); look for a quotation mark "
                f"that is not closed, and give texts of more than {csv.field_size_limit():,} characters as jsonl"
            ) from error


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
