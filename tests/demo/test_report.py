"""The report: a federation of two departments and two rounds, small enough to check by hand."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from demo import plan, report
from demo.curves import draw
from demo.departments import Department, Row
from demo.federation import Outcome
from demo.report import Report
from demo.trial import Prediction, Trial
from protocol.messages import BlobRef, Metric
from protocol.states import JobKind, JobState, RoundState, RunState
from protocol.views import JobView, RankView, RoundView, RunDetail

START = datetime(2026, 1, 1, tzinfo=UTC)
BLOB = BlobRef(digest="sha256:" + "0" * 64, bytes=100)


def job(name: str, kind: JobKind, rank: int, reason: str) -> JobView:
    return JobView(
        id=f"job-{name}-{kind}",
        client=f"client-{name}",
        client_name=name,
        kind=kind,
        state=JobState.accepted,
        reason=None,
        rank=RankView(rank=rank, reason=f"{rank}: {reason}", limits={"owner": None, "data": rank}),
        epoch=1,
        progress=None,
        slice=BLOB if kind is JobKind.train else None,
        examples=10,
        weight=0.5,
        change_norm=1.0,
        metrics={"accuracy": Metric(value=0.5, weight=10)},
        usage=None,
    )


def round(number: int, accuracy: float, north: int) -> RoundView:
    trained = [job("north", JobKind.train, north, "its 10 examples"), job("south", JobKind.train, 16, "all fits")] if number else []
    measured = [job("north", JobKind.evaluate, north, "its 10 examples"), job("south", JobKind.evaluate, 16, "all fits")]
    return RoundView(
        number=number,
        attempt=1,
        state=RoundState.published,
        reason=None,
        opened_at=START + timedelta(seconds=30 * number),
        ended_at=START + timedelta(seconds=30 * number + 20),
        cohort=len(trained),
        contributions=len(trained),
        ranks={north: 1, 16: 1} if number else {},
        bytes_up=2000 * bool(number),
        bytes_down=4000,
        train_seconds=12.0,
        merge_seconds=0.25,
        metrics={"accuracy": accuracy, "loss": 1.5},
        train_metrics={},
        kept_energy={2: 0.7, 4: 0.8, 8: 0.9, 16: 1.0} if number else {},
        jobs=trained + measured,
        adapter=BLOB,
        slices={},
        energy={},
    )


@pytest.fixture
def found(tmp_path: Path) -> Report:
    (tmp_path / "plan.toml").write_text(plan.text(plan.Wishes(labels=["hot", "cold"], clients=2, rounds=2, seed=0)))
    run = RunDetail(
        id="run-1",
        name="demo",
        state=RunState.finished,
        reason=None,
        round=2,
        rounds=2,
        created_at=START,
        ended_at=START + timedelta(seconds=100),
        metrics={"accuracy": 0.75},
        bytes_up=4000,
        bytes_down=12_000,
        plan=plan.read(tmp_path / "plan.toml"),
        plan_digest="sha256:" + "1" * 64,
    )
    departments = [
        Department("north", [Row("n", "hot")] * 10, [Row("m", "hot")] * 3 + [Row("m", "cold")]),
        Department("south", [Row("s", "cold")] * 30, [Row("t", "cold")] * 4),
    ]
    trial = Trial(0.8, 0.75, [Prediction("a text " * 30, "hot", "cold", "hot", 0.9), Prediction("snow", "cold", "cold", "hot", 0.6)])
    outcome = Outcome(run, [round(0, 0.25, 2), round(1, 0.5, 2), round(2, 0.75, 4)])
    return Report(departments, outcome, trial, {"data": 1.0, "federation": 90.0, "whole": 100.0})


def test_the_summary_has_what_is_asked_of_it(found: Report) -> None:
    summary = report.summary(found)
    assert summary["accuracy_majority"] == pytest.approx(5 / 8)  # five of eight held-out rows are cold
    assert (summary["accuracy_before"], summary["accuracy_after"]) == (0.25, 0.75)
    assert (summary["accuracy_pulled_adapter"], summary["accuracy_pulled_adapter_own_rank"]) == (0.8, 0.75)
    assert (summary["rounds"], summary["bytes_up"], summary["bytes_down"], summary["seconds"]) == (2, 4000, 12_000, 100.0)
    assert summary["clients"] == [
        {"name": "north", "rank": 4, "reason": "4: its 10 examples", "ranks": [2, 4], "train": 10, "held_out": 4},
        {"name": "south", "rank": 16, "reason": "16: all fits", "ranks": [16, 16], "train": 30, "held_out": 4},
    ]


def test_the_summary_is_json(found: Report) -> None:
    summary = report.summary(found)
    assert json.loads(json.dumps(summary)) == summary


def test_the_tables_tell_rounds_clients_predictions_and_the_outcome(found: Report) -> None:
    paper = io.StringIO()
    Console(file=paper, width=160).print(report.tables(found))
    told = paper.getvalue()
    assert "25 %" in told
    assert "its 10 examples" in told
    assert "a text a text" in told
    assert "25 % → 75 % after round 2; the best single guess gets 62.5 %" in told
    assert "80 % at rank 16, 75 % at the departments' own ranks" in told


def test_a_department_that_missed_the_last_round_is_told_so(found: Report) -> None:
    last = found.outcome.rounds[-1]
    alone = last.model_copy(update={"jobs": [job for job in last.jobs if job.client_name == "north"]})
    missing = Report(found.departments, Outcome(found.outcome.run, [*found.outcome.rounds[:-1], alone]), found.trial, found.seconds)
    paper = io.StringIO()
    Console(file=paper, width=160).print(report.tables(missing))
    assert "took no part in the last round" in paper.getvalue()
    clients = report.summary(missing)["clients"]
    assert isinstance(clients, list)
    assert isinstance(clients[1], dict)
    assert (clients[1]["rank"], clients[1]["ranks"]) == (None, [16, None])


def test_ranks_of_training_and_of_measuring_are_kept_apart(found: Report) -> None:
    assert report.ranks(found.outcome.rounds[0]) == {}
    assert report.measured_ranks(found.outcome.rounds[0]) == {"north": 2, "south": 16}


def test_the_picture_is_a_png(found: Report, tmp_path: Path) -> None:
    draw(found, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
