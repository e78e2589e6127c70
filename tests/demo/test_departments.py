"""Departments: one body of text divided unequally, or what each brings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import data
from demo import departments
from demo.departments import SHARES, Columns, Department, Row
from protocol import errors

LABELS = ("animal", "plant", "tool")


def body(count: int, every: int = 5) -> list[Row]:
    """Rows of three labels in turn; one in so many is held out."""
    return [Row(f"text {n}", LABELS[n % 3], held_out=n // 3 % every == 0) for n in range(count)]


@settings(deadline=None, max_examples=50)
@given(count=st.integers(300, 1200), total=st.integers(300, 1500), seed=st.integers(0, 1000))
def test_no_row_is_given_twice_and_none_changes_sides(count: int, total: int, seed: int) -> None:
    rows = body(count)
    made = departments.divide(rows, total, seed)
    train = [row for department in made for row in department.train]
    held_out = [row for department in made for row in department.held_out]
    assert len({row.text for row in (*train, *held_out)}) == len(train) + len(held_out) <= min(count, total)
    assert not any(row.held_out for row in train)
    assert all(row.held_out for row in held_out)


def test_departments_have_as_unequal_shares_as_they_are_said_to() -> None:
    made = departments.divide(body(2100), 2100, seed=0)
    sizes = {department.name: len(department.train) for department in made}
    whole = sum(SHARES.values())
    assert sum(sizes.values()) == 1680
    assert sizes == {name: pytest.approx(1680 * share / whole, abs=1) for name, share in SHARES.items()}


def test_mixtures_of_labels_differ_between_departments() -> None:
    made = departments.divide(body(2100), 1000, seed=0)
    shares = [sum(row.label == "tool" for row in department.train) / len(department.train) for department in made]
    assert max(shares) - min(shares) > 0.3


def test_the_same_seed_divides_in_the_same_way() -> None:
    assert departments.divide(body(900), 600, seed=3) == departments.divide(body(900), 600, seed=3)
    assert departments.divide(body(900), 600, seed=3) != departments.divide(body(900), 600, seed=4)


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(errors.DataRefusal, match=r"has \d+ rows to train on and 0 held out; each department needs some of both"):
        departments.divide(body(40), 40, seed=0)


def test_an_agent_reads_what_a_department_writes(tmp_path: Path) -> None:
    mine = Department("legal", [Row("a “quoted” text", "no", "and another"), Row("more", "yes", "still")], [Row("kept back", "yes", "so")])
    mine.write(tmp_path)
    catalogue = data.load(tmp_path)
    described = catalogue.describe(departments.ALIAS)
    assert (described.train, described.held_out, described.columns) == (2, 1, ["text", "text_pair", "label"])
    assert list(catalogue.rows(departments.ALIAS, data.Part.held_out)) == [(1, {"text": "kept back", "text_pair": "so", "label": "yes"})]


def write(file: Path, rows: list[dict[str, object]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")


def test_a_folder_brings_a_department_for_each_file(tmp_path: Path) -> None:
    write(tmp_path / "north.jsonl", [{"say": f"north {n}", "is": n % 2} for n in range(40)])
    write(tmp_path / "south.jsonl", [{"say": f"south {n}", "is": n % 2} for n in range(80)])
    south, north = departments.bring(tmp_path, Columns("say", "is"), 2000, seed=0)
    assert (south.name, north.name) == ("south", "north")  # the largest first
    assert len(south.train) + len(south.held_out) == 80
    assert {row.label for row in south.train} == {"0", "1"}
    assert departments.labels([south, north]) == ["0", "1"]


def test_a_row_that_occurs_again_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "north.jsonl", [{"text": f"text {n % 30}", "label": "a"} for n in range(60)])
    write(tmp_path / "south.jsonl", [{"text": f"text {n}", "label": "a"} for n in range(60)])
    made = departments.bring(tmp_path, Columns(), 2000, seed=0)
    texts = [row.text for department in made for row in (*department.train, *department.held_out)]
    assert sorted(texts) == sorted(f"text {n}" for n in range(60))


def test_one_file_is_divided_among_eight_departments(tmp_path: Path) -> None:
    file = tmp_path / "all.jsonl"
    write(file, [{"a": f"first {n}", "b": f"second {n}", "label": n % 3} for n in range(900)])
    made = departments.bring(file, Columns("a", "label", "b"), 600, seed=0)
    assert [department.name for department in made] == list(SHARES)
    assert made[0].train[0].text_pair is not None


def test_one_file_in_a_folder_is_too_few(tmp_path: Path) -> None:
    write(tmp_path / "north.jsonl", [{"text": "alone", "label": 1}])
    with pytest.raises(errors.DataRefusal, match=r"has 1 \.jsonl files; give a folder"):
        departments.bring(tmp_path, Columns(), 2000, seed=0)


@pytest.mark.parametrize("line", ['{"text": "no label"}', "no JSON", "[1, 2]"])
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "all.jsonl"
    file.write_text('{"text": "good", "label": 1}\n' + line + "\n")
    with pytest.raises(errors.DataRefusal, match=r"all\.jsonl:2 is no JSON object with the columns text, label"):
        departments.bring(file, Columns(), 2000, seed=0)


def test_the_majority_is_the_best_single_guess_on_held_out_rows() -> None:
    one = Department("one", [], [Row("", "a"), Row("", "b"), Row("", "b")])
    two = Department("two", [], [Row("", "b"), Row("", "c")])
    assert departments.majority([one, two]) == pytest.approx(3 / 5)
