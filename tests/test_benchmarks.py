"""Benchmarks say what they measured, where, and that what they measured is right."""

from __future__ import annotations

import asyncio
import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from benchmarks import fleet, rounds
from benchmarks.__main__ import BENCHMARKS, app
from benchmarks.alone import Method, methods
from benchmarks.crowd import Size
from benchmarks.dense import Dense
from benchmarks.machine import this_machine
from benchmarks.merge import Merge, measure
from benchmarks.service import database, file_system, serving
from protocol.plan import Dtype, Float


@pytest.mark.parametrize("wire", get_args(Float))
@pytest.mark.parametrize("clients", [4, 40])
def test_a_merge_is_measured_beside_the_dense_form_and_is_right(wire: Dtype, clients: int) -> None:
    found = measure(Size("small", ((48, 40), (40, 48)), clients, wire, copies=3, ladder=(1, 2, 4)), Dense(), workers=1)
    assert found.relative_excess < 1e-7
    assert found.certificate_error < 0.01
    assert found.ratio == found.dense_seconds / found.seconds
    assert found.extrapolated
    assert found.machine.threads == 1
    assert found.machine.processor
    assert "extrapolated" in found.report()


def test_both_methods_are_measured_on_one_module() -> None:
    exact, quick = methods(Size("small", ((300, 280),), 20, ladder=(4, 8)), Dense(), repeats=1)
    assert (exact.method, quick.method) == ("exact", "quick")
    assert exact.dense_seconds == quick.dense_seconds
    assert exact.relative_excess < 1e-8
    assert max(exact.certificate_error, quick.certificate_error) < 0.01
    assert "one thread, quick" in quick.report()


def test_a_fleet_waits_picks_up_its_work_and_contributes(tmp_path: Path) -> None:
    with database("sqlite", tmp_path) as (url, server), serving(tmp_path, url, server) as service:
        waiting, picking_up, contributing = asyncio.run(fleet.measure(service, agents=5, seconds=1, megabytes=0.1, wait=1))
    assert waiting.polls_per_second > 0
    assert 0 < picking_up.p50 <= picking_up.p99 <= picking_up.longest
    assert contributing.per_second == pytest.approx(5 / contributing.seconds)
    parts = {"waiting": waiting, "picking_up": picking_up, "contributing": contributing}
    found = fleet.Fleet(agents=5, database="sqlite", **parts, file_system=file_system(tmp_path), machine=this_machine())
    assert "5 agents, sqlite" in fleet.report(found)


def test_whole_rounds_are_measured_with_real_agents(tmp_path: Path) -> None:
    shown = CliRunner().invoke(
        rounds.app, ["--agents", "2", "--mb", "0.1", "--rounds", "3", "--folder", str(tmp_path), "--json"], catch_exceptions=False
    )
    found = rounds.Rounds.model_validate_json(shown.output)
    assert (found.agents, found.rounds) == (2, 3)
    assert 0 < found.shortest <= found.median <= found.longest
    assert found.coordinator_seconds > 0
    assert "2 agents × 0.1 MB" in rounds.report(found)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_every_benchmark_is_a_command_of_its_own(benchmark: str) -> None:
    own = CliRunner().invoke(import_module(f"benchmarks.{benchmark}").app, ["--help"])
    listed = CliRunner().invoke(app, [benchmark, "--help"])
    assert (own.exit_code, listed.exit_code) == (0, 0)
    assert "--json" in own.output
    assert "--json" in listed.output


@pytest.mark.slow
def test_the_quick_benchmark_prints_json_lines() -> None:
    lines = CliRunner().invoke(app, ["merge", "--quick", "--json"]).output.splitlines()
    merges = [Merge.model_validate(json.loads(line)) for line in lines if "copies" in line]
    assert [found.clients for found in merges] == [10, 20, 100, 20, 20]
    assert {Method.model_validate(json.loads(line)).method for line in lines if "copies" not in line} == {"exact", "quick"}
    assert all(found.certificate_error < 0.01 and found.error_ratio < 1.005 for found in merges)
    assert len(lines) == 9


def test_the_fuzzer_finds_nothing_in_a_short_run_or_says_what_it_needs() -> None:
    told = CliRunner().invoke(app, ["fuzz", "--runs", "500", "--json"])
    if find_spec("atheris") is None:
        assert told.exit_code == 2
        assert "extras" in told.output
    else:
        assert told.exit_code == 0, told.output
        assert json.loads(told.output)["executions"] >= 500
