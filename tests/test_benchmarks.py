"""Benchmarks say what they measured, where, and that what they measured is right."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.crowd import Size
from benchmarks.merge import Merge, measure, methods, report
from protocol.plan import Dtype


@pytest.mark.parametrize("wire", Dtype)
@pytest.mark.parametrize("clients", [4, 40])
def test_a_merge_is_measured_beside_the_dense_form_and_is_right(wire: Dtype, clients: int) -> None:
    found = measure(Size("small", ((48, 40), (40, 48)), clients, wire, copies=3, ladder=(1, 2, 4)), {}, workers=1)
    assert found.relative_excess < 1e-7
    assert found.certificate_error < 0.01
    assert found.ratio == found.dense_seconds / found.seconds
    assert found.extrapolated
    assert found.machine.threads == 1
    assert found.machine.processor
    assert "extrapolated" in report(found)


def test_both_methods_are_measured_on_one_module() -> None:
    exact, quick = methods(Size("small", ((300, 280),), 20, ladder=(4, 8)), {}, repeats=1)
    assert (exact.method, quick.method) == ("exact", "quick")
    assert exact.dense_seconds == quick.dense_seconds
    assert "one thread, quick" in report(quick)


@pytest.mark.slow
def test_the_quick_benchmark_prints_json_lines() -> None:
    lines = CliRunner().invoke(app, ["merge", "--quick", "--json"]).output.splitlines()
    merges = [Merge.model_validate(json.loads(line)) for line in lines if "copies" in line]
    assert [found.clients for found in merges] == [20, 20, 100]
    assert all(found.certificate_error < 0.01 and found.error_ratio < 1.005 for found in merges)
    assert len(lines) == 5
