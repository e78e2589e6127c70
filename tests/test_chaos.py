"""Chaos proves something only if it would notice; and a small one passes on both databases."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos import Chaos, report
from benchmarks.ledger import Ledger, acknowledgements
from benchmarks.machine import this_machine
from benchmarks.proxy import Fault
from benchmarks.victims import ACKNOWLEDGED, Acknowledgement
from protocol.states import JobKind, JobState, RoundState
from protocol.views import JobView, RoundView

ROOT = Path(__file__).parents[1]
NOON = datetime(2026, 1, 1, tzinfo=UTC)


def digest(letter: str) -> str:
    return "sha256:" + letter * 64


def job(id: str, **changes: Any) -> JobView:
    """An accepted contribution of the slice `a`."""
    facts = {
        "id": id,
        "client": f"client of {id}",
        "client_name": f"client of {id}",
        "kind": JobKind.train,
        "state": JobState.accepted,
        "reason": None,
        "rank": {"rank": 4, "reason": "fixed"},
        "epoch": 1,
        "progress": None,
        "slice": {"digest": digest("a"), "bytes": 1},
        "examples": 1,
        "weight": 1.0,
        "change_norm": 1.0,
        "metrics": {},
        "usage": None,
    }
    return JobView.model_validate(facts | changes)


def merged(id: str, slice: str = "a", client: str | None = None) -> dict[str, Any]:
    """A line of a manifest."""
    own = {"job": id, "client": client or f"client of {id}", "digest": digest(slice), "base": digest("0")}
    return own | {"rank": 4, "scale": 1.0, "weight": 1.0, "shrink": 1.0}


def round_of(number: int, jobs: list[JobView], inputs: list[dict[str, Any]], **changes: Any) -> RoundView:
    """A published round."""
    adapter = {"digest": digest(str(number)), "bytes": 1}
    manifest = {"plan": digest("f"), "round": number, "previous": None, "earlier": None, "inputs": inputs}
    facts = {
        "number": number,
        "attempt": 1,
        "state": RoundState.published,
        "reason": None,
        "opened_at": NOON,
        "ended_at": NOON,
        "cohort": len(jobs),
        "contributions": len(inputs),
        "ranks": {},
        "bytes_up": 0,
        "bytes_down": 0,
        "train_seconds": 0.0,
        "merge_seconds": None,
        "metrics": {},
        "train_metrics": {},
        "kept_energy": {},
        "jobs": jobs,
        "adapter": adapter,
        "slices": {4: {"digest": digest("b"), "bytes": 1}},
        "energy": {},
        "manifest": manifest | {"adapter": adapter, "slices": {}, "software": {}},
    }
    return RoundView.model_validate(facts | changes)


def acknowledged(*jobs: str, slice: str | None = "a") -> list[Acknowledgement]:
    return [Acknowledgement(job=id, slice=slice and digest(slice), at=number) for number, id in enumerate(jobs)]


def test_what_is_in_a_merged_round_is_not_lost() -> None:
    ledger = Ledger(acknowledged("one", "two"), [[round_of(1, [job("one"), job("two")], [merged("one"), merged("two")])]])
    assert (ledger.lost(), ledger.counted_twice(), ledger.rounds()) == ([], [], 1)


@pytest.mark.parametrize(
    "view",
    [
        round_of(1, [], []),
        round_of(1, [job("one")], []),
        round_of(1, [job("one")], [merged("one", slice="c")]),
        round_of(1, [job("one")], [merged("two")]),
        round_of(1, [job("one", state=JobState.submitted)], []),
        round_of(1, [job("one", state=JobState.expired, reason="the lease was not renewed")], []),
        round_of(1, [job("one", state=JobState.rejected, reason=None)], []),
    ],
    ids=["no such job", "in no sum", "other bytes", "another job", "forgotten", "taken back", "no reason"],
)
def test_what_is_in_no_merged_round_is_lost(view: RoundView) -> None:
    assert Ledger(acknowledged("one"), [[view]]).lost() == ["one"]


@pytest.mark.parametrize(
    "view",
    [
        round_of(1, [job("one", state=JobState.rejected, reason="too far from the others")], []),
        round_of(1, [job("one", state=JobState.submitted)], [], state=RoundState.abandoned, reason="too few"),
    ],
    ids=["rejected", "abandoned"],
)
def test_what_says_why_it_does_not_count_is_not_lost(view: RoundView) -> None:
    assert Ledger(acknowledged("one"), [[view]]).lost() == []


@pytest.mark.parametrize(("state", "lost"), [(JobState.accepted, []), (JobState.expired, ["one"])])
def test_an_acknowledged_measurement_is_accepted_or_lost(state: JobState, lost: list[str]) -> None:
    measured = job("one", kind=JobKind.evaluate, state=state, reason="time")
    assert Ledger(acknowledged("one", slice=None), [[round_of(1, [measured], [])]]).lost() == lost


def test_a_contribution_in_two_rounds_counts_twice() -> None:
    rounds = [round_of(number, [job("one")], [merged("one")]) for number in (1, 2)]
    assert Ledger([], [rounds]).counted_twice() == ["one"]


def test_a_client_that_is_twice_in_one_sum_counts_twice() -> None:
    ledger = Ledger([], [[round_of(1, [job("one"), job("two")], [merged("one", client="c"), merged("two", client="c")])]])
    assert ledger.counted_twice() == ["c"]


def test_other_bytes_and_missing_rounds_differ() -> None:
    expected = [(digest(number), digest("b")) for number in ("0", "1", "2")]
    runs = [[round_of(number, [], []) for number in numbers] for numbers in ((0, 1, 2), (0, 1))]
    assert Ledger([], runs).differing(expected) == ["run 1 round 2"]
    assert Ledger([], runs[:1]).differing([*expected[:2], (digest("2"), digest("c"))]) == ["run 0 round 2"]


def test_recovery_lasts_from_a_blow_to_the_next_acknowledged_result() -> None:
    ledger = Ledger(acknowledged("one", "two", "three"), [])
    assert ledger.longest_recovery([0.5, 0.25, 1.5, 7.0]) == 0.75


def test_a_line_that_a_kill_cut_off_is_no_acknowledgement(tmp_path: Path) -> None:
    (line,) = acknowledged("one")
    (tmp_path / ACKNOWLEDGED).write_text(f"{line.model_dump_json()}\n{line.model_dump_json()[:20]}")
    assert acknowledgements([tmp_path, tmp_path / "never ran"]) == [line]


@pytest.mark.parametrize("bad", ["lost", "counted_twice", "differing_rounds", "died"])
def test_a_chaos_is_good_only_if_nothing_was_that_should_not_be(bad: str) -> None:
    counts = dict.fromkeys(("stopped", "fresh_starts", "connections", "runs", "rounds", "acknowledged", "seed"), 1)
    good = {"lost": 0, "counted_twice": 0, "differing_rounds": 0, "died": 0}
    facts = {"database": "sqlite", "coordinators": 1, "agents": 3, "kills": {"agent": 2}, "faults": {Fault.cut: 3}, "named": ["one"]}
    rest = {"seconds": 1.0, "longest_recovery_seconds": 1.0, "machine": this_machine()}
    assert Chaos.model_validate(counts | good | facts | rest).good
    found = Chaos.model_validate(counts | good | facts | rest | {bad: 1})
    assert not found.good
    assert "2 × agent" in report(found)
    assert "3 × cut" in report(found)
    assert "one" in report(found)


@pytest.mark.slow
def test_a_small_chaos_loses_nothing_and_counts_nothing_twice(database_url: str, tmp_path: Path) -> None:
    kind = "sqlite" if database_url.startswith("sqlite") else "postgresql"
    told = ["--kills", "6", "--rounds", "3", "--databases", kind, "--database-url", database_url, "--folder", tmp_path, "--json"]
    command = [sys.executable, "-m", "benchmarks.chaos", *map(str, told)]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr + done.stdout
    found = Chaos.model_validate(json.loads(done.stdout))
    assert found.good
    assert found.coordinators == (1 if kind == "sqlite" else 2)
    assert sum(found.kills.values()) >= 6
    assert found.rounds % 3 == 0
    assert found.acknowledged >= 3 * found.rounds
