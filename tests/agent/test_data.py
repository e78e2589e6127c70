"""Data sets by alias."""

from __future__ import annotations

import csv
import json
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from agent import data
from agent.data import Catalogue, Part
from protocol import errors
from protocol.messages import Dataset

ROWS = [{"body": f"text {n}", "stars": n % 3} for n in range(20)]


def home(folder: Path, toml: str) -> Catalogue:
    (folder / "datasets.toml").write_text(toml)
    return data.load(folder)


def write(folder: Path, format: str, name: str = "rows", rows: list[dict[str, object]] = ROWS) -> str:
    file = folder / f"{name}.{format}"
    if format == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif format == "csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        parquet.write_table(pa.Table.from_pylist(rows), file)
    return file.name


@pytest.mark.parametrize("format", ["jsonl", "csv", "parquet"])
def test_rows_come_in_order_with_columns_named_as_plans_name_them(tmp_path: Path, format: str) -> None:
    name = write(tmp_path, format)
    catalogue = home(tmp_path, f'[reviews]\nformat = "{format}"\npath = "{name}"\ncolumns = {{ body = "text" }}\n')
    numbers, rows = zip(*catalogue.rows("reviews", Part.train), strict=True)
    assert numbers == tuple(range(1, 21))
    assert [row["text"] for row in rows] == [f"text {n}" for n in range(20)]
    assert [str(row["stars"]) for row in rows] == [str(n % 3) for n in range(20)]


@pytest.mark.parametrize("format", ["jsonl", "csv", "parquet"])
def test_a_held_out_file_is_the_held_out_part(tmp_path: Path, format: str) -> None:
    name, kept = write(tmp_path, format), write(tmp_path, format, "kept", ROWS[:3])
    catalogue = home(tmp_path, f'[reviews]\nformat = "{format}"\npath = "{name}"\nheld_out = "{kept}"\n')
    assert len(list(catalogue.rows("reviews", Part.train))) == 20
    assert len(list(catalogue.rows("reviews", Part.held_out))) == 3
    assert catalogue.describe("reviews") == Dataset(train=20, held_out=3, columns=["body", "stars"])


def parts(catalogue: Catalogue) -> tuple[list[object], list[object]]:
    return tuple([row["body"] for _, row in catalogue.rows("reviews", part)] for part in (Part.train, Part.held_out))  # type: ignore[return-value]  # two parts


def test_a_held_out_share_is_disjoint_and_the_same_every_time(tmp_path: Path) -> None:
    toml = f'[reviews]\nformat = "jsonl"\npath = "{write(tmp_path, "jsonl")}"\nheld_out = 0.25\n'
    catalogue = home(tmp_path, toml)
    train, kept = parts(catalogue)
    assert sorted([*train, *kept], key=str) == sorted((row["body"] for row in ROWS), key=str)
    assert parts(home(tmp_path, toml)) == (train, kept)
    assert parts(home(tmp_path, toml + "seed = 1\n"))[1] != kept
    assert catalogue.describe("reviews") == Dataset(train=len(train), held_out=len(kept), columns=["body", "stars"])


def test_no_row_changes_sides_when_others_come_or_go(tmp_path: Path) -> None:
    """What was kept back is never trained on later: whatever is added, removed or put in another order."""
    rows: list[dict[str, object]] = [{"body": f"text {n}"} for n in range(2000)]
    toml = '[reviews]\nformat = "jsonl"\npath = "{}"\nheld_out = 0.2\n'
    train, kept = parts(home(tmp_path, toml.format(write(tmp_path, "jsonl", "few", rows[:1000]))))
    later, kept_later = parts(home(tmp_path, toml.format(write(tmp_path, "jsonl", "many", [*rows[1000:], *reversed(rows[100:1000])]))))
    assert 150 < len(kept) < 250
    assert not set(kept) & set(later)
    assert not set(train) & set(kept_later)


def test_equal_rows_are_on_the_same_side(tmp_path: Path) -> None:
    train, kept = parts(
        home(tmp_path, f'[reviews]\nformat = "jsonl"\npath = "{write(tmp_path, "jsonl", rows=[*ROWS, *ROWS])}"\nheld_out = 0.3\n')
    )
    assert not set(train) & set(kept)
    assert len(train) + len(kept) == 2 * len(ROWS)


def test_rows_of_both_parts_have_the_numbers_that_they_have_in_the_file(tmp_path: Path) -> None:
    catalogue = home(tmp_path, f'[reviews]\nformat = "jsonl"\npath = "{write(tmp_path, "jsonl")}"\nheld_out = 0.25\n')
    found = [(n, row) for part in Part for n, row in catalogue.rows("reviews", part)]
    assert sorted(found, key=lambda numbered: numbered[0]) == list(enumerate(ROWS, start=1))


@pytest.mark.parametrize(("share", "kept"), [(0.001, 1), (0.999, 19)])
def test_a_share_keeps_back_at_least_one_row_and_never_all(tmp_path: Path, share: float, kept: int) -> None:
    catalogue = home(tmp_path, f'[reviews]\nformat = "jsonl"\npath = "{write(tmp_path, "jsonl")}"\nheld_out = {share}\n')
    assert catalogue.describe("reviews").held_out == len(parts(catalogue)[1]) == kept


def test_no_more_than_max_rows_are_read(tmp_path: Path) -> None:
    catalogue = home(tmp_path, f'[reviews]\nformat = "jsonl"\npath = "{write(tmp_path, "jsonl")}"\nmax_rows = 6\nheld_out = 0.5\n')
    found = catalogue.describe("reviews")
    assert (found.train + found.held_out, found.columns) == (6, ["body", "stars"])
    assert {row["body"] for part in Part for _, row in catalogue.rows("reviews", part)} == {f"text {n}" for n in range(6)}


def test_rows_are_read_one_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"body": "first"}\nthis is no JSON\n')
    catalogue = home(tmp_path, '[reviews]\nformat = "jsonl"\npath = "rows.jsonl"\n')
    rows = catalogue.rows("reviews", Part.train)
    assert next(rows) == (1, {"body": "first"})
    with pytest.raises(errors.DataRefusal):
        next(rows)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"body": "a secret"\n', "row 1 is no JSON object (JSONDecodeError); mend it"),
        (b'{"body": "fine"}\n\n{"body": "a secret}\n', "row 2 is no JSON object (JSONDecodeError); mend it"),
        (b'{"body": "fine"}\n["a secret"]\n', "row 2 is no JSON object, which begins with a brace; mend it"),
        (b'{"a secret": ' + b"[" * 100_000, "row 1 is no JSON object (RecursionError); mend it"),
        (b'{"body": "\xff a secret"}\n', "cannot be read as jsonl (UnicodeDecodeError)"),
        (b"", "has no rows"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_refused_without_quoting_it(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(errors.DataRefusal) as refused:
        home(tmp_path, '[reviews]\nformat = "jsonl"\npath = "rows.jsonl"\n').describe("reviews")
    assert words in refused.value.detail
    assert "secret" not in refused.value.detail


def test_empty_lines_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"body": "one"}\n\n{"body": "two"}\n')
    assert home(tmp_path, '[reviews]\nformat = "jsonl"\npath = "rows.jsonl"\n').describe("reviews").train == 2


@pytest.mark.skipif(find_spec("datasets") is not None, reason="the package is there")
def test_a_format_whose_package_is_missing_says_which(tmp_path: Path) -> None:
    with pytest.raises(errors.DataRefusal, match="needs the package datasets; pip install it"):
        home(tmp_path, '[reviews]\nformat = "hub"\npath = "someone/reviews"\n').describe("reviews")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.DataRefusal, match=r"rows\.csv is not there"):
        home(tmp_path, '[reviews]\nformat = "csv"\npath = "rows.csv"\n').describe("reviews")


def test_an_alias_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(errors.DataRefusal, match="only reviews; add it to"):
        home(tmp_path, '[reviews]\nformat = "csv"\npath = "rows.csv"\n').rows("news", Part.train)


def test_a_set_that_keeps_nothing_back_has_nothing_to_evaluate_on(tmp_path: Path) -> None:
    catalogue = home(tmp_path, f'[reviews]\nformat = "jsonl"\npath = "{write(tmp_path, "jsonl")}"\n')
    with pytest.raises(errors.DataRefusal, match="set held_out"):
        catalogue.rows("reviews", Part.held_out)


def test_a_file_without_rows_of_which_a_share_is_kept_back_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    catalogue = home(tmp_path, '[reviews]\nformat = "jsonl"\npath = "rows.jsonl"\nheld_out = 0.2\n')
    for read in (lambda: catalogue.describe("reviews"), lambda: list(catalogue.rows("reviews", Part.train))):
        with pytest.raises(errors.DataRefusal, match=r"^'reviews' has no rows$"):
            read()


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[:1] * 3])
def test_one_row_cannot_be_shared_however_often_it_stands_there(tmp_path: Path, rows: list[dict[str, object]]) -> None:
    name = write(tmp_path, "jsonl", rows=rows)
    with pytest.raises(errors.DataRefusal, match="two or more"):
        home(tmp_path, f'[reviews]\nformat = "jsonl"\npath = "{name}"\nheld_out = 0.5\n').describe("reviews")


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[reviews\n", "is no TOML"),
        ('[reviews]\nformat = "xml"\npath = "x"\n', "reviews.format"),
        ('[reviews]\nformat = "csv"\npath = "x"\nheldout = 0.1\n', "reviews.heldout"),
        ('[reviews]\nformat = "csv"\npath = "x"\nheld_out = 1\n', "no share between 0 and 1"),
        ('[reviews]\nformat = "csv"\npath = "x"\ncolumns = { a = "text", b = "text" }\n', "columns gives two columns the same name"),
    ],
)
def test_a_catalogue_that_makes_no_sense_is_refused_with_the_place(tmp_path: Path, toml: str, words: str) -> None:
    with pytest.raises(errors.DataRefusal) as refused:
        home(tmp_path, toml)
    assert words in refused.value.detail


def columns(folder: Path, format: str, content: str, mapping: str) -> Catalogue:
    (folder / f"rows.{format}").write_text(content)
    return home(folder, f'[reviews]\nformat = "{format}"\npath = "rows.{format}"\ncolumns = {{ {mapping} }}\n')


@pytest.mark.parametrize("header", ["clean,text", "text,clean"])
def test_a_mapped_column_displaces_one_that_has_its_name(tmp_path: Path, header: str) -> None:
    first, second = header.split(",")
    catalogue = columns(tmp_path, "csv", f"{header},label\n{first} words,{second} words,1\n", 'clean = "text"')
    assert list(catalogue.rows("reviews", Part.train)) == [(1, {"text": "clean words", "label": "1"})]
    assert sorted(catalogue.describe("reviews").columns) == ["label", "text"]


def test_columns_may_change_places(tmp_path: Path) -> None:
    catalogue = columns(tmp_path, "csv", "a,b\nfirst,second\n", 'a = "b", b = "a"')
    assert list(catalogue.rows("reviews", Part.train)) == [(1, {"b": "first", "a": "second"})]


@pytest.mark.parametrize(
    ("format", "content"),
    [("csv", "text,clean\na secret,words\n"), ("jsonl", '{"text": "a secret", "clean": "words"}\n{"clean": "words", "text": "more"}\n')],
)
def test_a_mapping_of_a_column_that_is_not_there_is_refused(tmp_path: Path, format: str, content: str) -> None:
    catalogue = columns(tmp_path, format, content, 'claen = "text"')
    for read in (lambda: catalogue.describe("reviews"), lambda: list(catalogue.rows("reviews", Part.train))):
        with pytest.raises(errors.DataRefusal, match=r"has no column 'claen', only (text, clean|clean, text); mend columns in") as refused:
            read()
        assert "secret" not in refused.value.detail


def test_a_row_without_the_mapped_column_does_not_fall_back_to_another(tmp_path: Path) -> None:
    """Rows of JSON need not be alike; but the text of one never stands in for the text that was asked for."""
    content = '{"text": "raw"}\n{"text": "raw", "clean": "words"}\n'
    catalogue = columns(tmp_path, "jsonl", content, 'clean = "text"')
    assert [row for _, row in catalogue.rows("reviews", Part.train)] == [{}, {"text": "words"}]
    assert catalogue.describe("reviews") == Dataset(train=2, columns=["text"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("text,label\nfine,0\na secret, with a comma,1\n", "the fields of row 2 are 3, those of the first line 2"),
        ("text,label\n\na secret\n", "the fields of row 1 are 1, those of the first line 2"),
        ("text,label,text\na secret,1,another\n", "two columns have the same name in its first line"),
        ('text,label\nfine,0\n"a secret,1\n', "row 2 cannot be read as csv (unexpected end of data)"),
        ("text,label\n" + "secret" * 30_000 + ",1\n", "give texts of more than 131,072 characters as jsonl"),
        ('text;label\n"a secret, with a comma";1\n', "semicolons seem to stand between its fields: save the file with commas"),
        ('"a secret', "the first line cannot be read as csv"),
        (
            "text;label\na secret, with a comma;1\n",
            "the first line 1; semicolons seem to stand between its fields: save the file with commas",
        ),
    ],
)
def test_a_csv_file_that_would_lose_text_is_refused_with_the_row(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "rows.csv").write_text(content)
    with pytest.raises(errors.DataRefusal) as refused:
        home(tmp_path, '[reviews]\nformat = "csv"\npath = "rows.csv"\n').describe("reviews")
    assert words in refused.value.detail
    assert "secret" not in refused.value.detail


@pytest.mark.parametrize("name", ["te\\ud800xt", "te\\u0000xt"])
def test_a_column_whose_name_nobody_can_be_told_is_counted(tmp_path: Path, name: str) -> None:
    catalogue = columns(tmp_path, "jsonl", f'{{"{name}": "words"}}\n', "")
    with pytest.raises(errors.DataRefusal, match="'reviews': column 1 needs another name: it holds the character NUL or half a character"):
        catalogue.describe("reviews")


def test_semicolons_are_named_where_a_column_is_missing_for_them(tmp_path: Path) -> None:
    catalogue = columns(tmp_path, "csv", "text;label\nwords;1\n", 'text = "clean"')
    with pytest.raises(errors.DataRefusal, match="no column 'text', only text;label; semicolons seem to stand between its fields"):
        catalogue.describe("reviews")


def test_columns_without_a_name_may_be_several(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label,,\nwords,1,,\n")
    catalogue = home(tmp_path, '[reviews]\nformat = "csv"\npath = "rows.csv"\n')
    assert list(catalogue.rows("reviews", Part.train)) == [(1, {"text": "words", "label": "1", "": ""})]


@pytest.mark.parametrize("first", ["a secret,1", "secret " * 10 + ",no", '"a secret\nof two lines",no', "a secret\tno"])
def test_a_csv_file_without_names_tells_no_row_in_their_place(tmp_path: Path, first: str) -> None:
    (tmp_path / "rows.csv").write_text(first + "\n" + first + "\n")
    catalogue = home(tmp_path, '[reviews]\nformat = "csv"\npath = "rows.csv"\n')
    for read in (lambda: catalogue.describe("reviews"), lambda: list(catalogue.rows("reviews", Part.train))):
        with pytest.raises(errors.DataRefusal, match="its first line has to name the columns") as refused:
            read()
        assert "secret" not in refused.value.detail


def test_a_strange_name_is_one_where_the_owner_gives_it_another(tmp_path: Path) -> None:
    asked = "What did you like, and what did you not like, about your stay with us?"
    catalogue = columns(tmp_path, "csv", f'"{asked}",7\nwords,1\n', f'"{asked}" = "text", 7 = "label"')
    assert catalogue.describe("reviews") == Dataset(train=1, columns=["text", "label"])


@pytest.mark.parametrize("row", [{"k" * 257: 1}, {f"k{n}": 1 for n in range(1001)}])
def test_columns_that_cannot_be_told_are_refused(tmp_path: Path, row: dict[str, object]) -> None:
    name = write(tmp_path, "jsonl", rows=[row])
    with pytest.raises(errors.DataRefusal, match=r"has \d+ columns; no more than 1,000 can be told"):
        home(tmp_path, f'[reviews]\nformat = "jsonl"\npath = "{name}"\n').describe("reviews")


@pytest.mark.parametrize("format", ["jsonl", "csv"])
def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path, format: str) -> None:
    name = write(tmp_path, format)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    described = home(tmp_path, f'[reviews]\nformat = "{format}"\npath = "{name}"\n').describe("reviews")
    assert described == Dataset(train=20, columns=["body", "stars"])


@pytest.mark.parametrize(
    ("values", "kind"), [(pa.array([2**60], pa.timestamp("us")), "OverflowError"), (pa.array([1], pa.timestamp("us", "No/Where")), "Arrow")]
)
def test_a_value_that_cannot_be_read_is_a_refusal(tmp_path: Path, values: pa.Array, kind: str) -> None:
    parquet.write_table(pa.table({"text": ["words"], "at": values}), tmp_path / "rows.parquet")
    with pytest.raises(errors.DataRefusal, match=rf"cannot be read as parquet \({kind}"):
        home(tmp_path, '[reviews]\nformat = "parquet"\npath = "rows.parquet"\n').describe("reviews")


def test_a_device_without_a_catalogue_has_no_data(tmp_path: Path) -> None:
    assert data.load(tmp_path).sources == {}
