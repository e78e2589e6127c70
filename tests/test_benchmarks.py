"""Benchmarks say what they measured, where, and that what they measured is right."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.merge import Size, measure


def test_a_merge_is_measured_beside_the_dense_form_and_is_right() -> None:
    found = measure(Size("small", modules=2, side=48, clients=4, ladder=(1, 2, 4)))
    assert found.relative_error < 1e-5
    assert found.ratio == found.dense_seconds / found.seconds
    assert found.machine.threads == 1
    assert found.machine.processor


def test_a_measurement_is_told_in_words() -> None:
    told = CliRunner().invoke(app, ["merge", "--quick"]).output
    assert "10 clients" in told
    assert "relative error" in told


def test_the_quick_benchmark_prints_one_json_line() -> None:
    (line,) = CliRunner().invoke(app, ["merge", "--quick", "--json"]).output.splitlines()
    assert json.loads(line)["clients"] == 10
