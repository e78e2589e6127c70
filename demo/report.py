"""What came of it, for a program (summary.json) and for a person (tables)."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version

import psutil
from pydantic import JsonValue
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from admin import words
from demo.departments import Department, majority
from demo.federation import Outcome
from demo.trial import Trial
from protocol.states import JobKind
from protocol.views import JobView, RankView, RoundView

METRIC = "accuracy"


@dataclass(frozen=True)
class Report:
    """Everything that is told of a finished demonstration."""

    departments: Sequence[Department]
    outcome: Outcome
    trial: Trial
    seconds: Mapping[str, float]  # part of the work → seconds; `whole` is all of it

    @property
    def majority(self) -> float:
        """What the best single guess gets right of the held-out rows."""
        return majority(self.departments)

    @property
    def accuracies(self) -> list[float]:
        """The federation's own evaluation of each published round, from the untrained start."""
        return [found.metrics[METRIC] for found in self.outcome.rounds]


def ranks(found: RoundView) -> dict[str, RankView]:
    """Each department's rank in a round, and why."""
    return {job.client_name: job.rank for job in _training(found)}


def measured_ranks(found: RoundView) -> dict[str, int]:
    """The rank at which each department measured what the round published."""
    return {job.client_name: job.rank.rank for job in found.jobs if job.kind is JobKind.evaluate}


def _training(found: RoundView) -> list[JobView]:
    return [job for job in found.jobs if job.kind is JobKind.train and job.slice is not None]


# --- for a program -------------------------------------------------------------------------------------------------------


def summary(report: Report) -> dict[str, JsonValue]:
    """summary.json."""
    run, rounds = report.outcome.run, report.outcome.rounds
    return {
        "accuracy_majority": report.majority,
        "accuracy_before": report.accuracies[0],
        "accuracy_after": report.accuracies[-1],
        "accuracy_pulled_adapter": report.trial.accuracy,
        "accuracy_pulled_adapter_own_rank": report.trial.accuracy_own_rank,
        "rounds": run.round,
        "clients": [_client(department, report) for department in report.departments],
        "bytes_up": run.bytes_up,
        "bytes_down": run.bytes_down,
        "seconds": report.seconds["whole"],
        "seconds_by_part": {part: seconds for part, seconds in report.seconds.items() if part != "whole"},
        "rows": {
            "train": sum(len(department.train) for department in report.departments),
            "held_out": sum(len(department.held_out) for department in report.departments),
        },
        "by_round": [_round(found) for found in rounds],
        "predictions": [asdict(prediction) for prediction in report.trial.predictions],
        "model": run.plan.model.model_dump(mode="json"),
        "plan_digest": run.plan_digest,
        "machine": machine(),
    }


def _client(department: Department, report: Report) -> dict[str, JsonValue]:
    last = ranks(report.outcome.rounds[-1]).get(department.name)
    return {
        "name": department.name,
        "rank": last.rank if last else None,
        "reason": last.reason if last else "took no part in the last round",
        "ranks": [ranks(found)[department.name].rank if department.name in ranks(found) else None for found in report.outcome.rounds[1:]],
        "train": len(department.train),
        "held_out": len(department.held_out),
    }


def _round(found: RoundView) -> dict[str, JsonValue]:
    return {
        "round": found.number,
        "metrics": dict(found.metrics),
        "ranks": {name: view.rank for name, view in sorted(ranks(found).items())},
        "contributions": found.contributions,
        "bytes_up": found.bytes_up,
        "bytes_down": found.bytes_down,
        "train_seconds": found.train_seconds,
        "merge_seconds": found.merge_seconds,
        "kept_energy": {str(rank): share for rank, share in found.kept_energy.items()},
        "seconds": (found.ended_at - found.opened_at).total_seconds() if found.ended_at else None,
    }


def machine() -> dict[str, JsonValue]:
    """Where the figures come from."""
    names = ("torch", "transformers", "peft", "numpy")
    return {
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "load_at_end": list(psutil.getloadavg()),
        "versions": {name: version(name) for name in names},
    }


# --- for a person --------------------------------------------------------------------------------------------------------


def tables(report: Report) -> RenderableType:
    """Rounds, clients, predictions, and the outcome."""
    return Group(_rounds(report), "", _clients(report), "", _predictions(report.trial), "", _outcome(report))


def _rounds(report: Report) -> Table:
    ladder = report.outcome.run.plan.ranks.ladder
    table = _table(
        "By round", "round", "before", "after", "ranks", "up", "down", "training", "merging", *(f"kept at {r}" for r in ladder[:-1])
    )
    for before, after, found in zip(report.accuracies, report.accuracies[1:], report.outcome.rounds[1:], strict=False):
        table.add_row(
            str(found.number),
            words.share(before),
            words.share(after),
            words.ranks(found.ranks),
            words.size(found.bytes_up),
            words.size(found.bytes_down),
            words.duration(found.train_seconds),
            words.duration(found.merge_seconds),
            *(words.share(found.kept_energy.get(rank)) for rank in ladder[:-1]),
        )
    return table


def _clients(report: Report) -> Table:
    table = _table("Departments", "department", "rows", "held out", "rank", "why")
    last = ranks(report.outcome.rounds[-1])
    for department in report.departments:
        view = last.get(department.name)
        rank, why = (str(view.rank), view.reason.partition(": ")[2]) if view else ("–", "took no part in the last round")
        table.add_row(department.name, f"{len(department.train):,}", f"{len(department.held_out):,}", rank, why)
    return table


def _predictions(trial: Trial) -> Table:
    table = _table("Held-out texts, with and without the adapter", "text", "it is", "without", "with", "")
    for found in trial.predictions:
        style = "green" if found.guess == found.truth else "red"
        table.add_row(_cut(found.text), found.truth, found.without, Text(found.guess, style), words.share(found.confidence))
    return table


def _outcome(report: Report) -> Text:
    run, trial = report.outcome.run, report.trial
    return Text.assemble(
        ("Held-out accuracy ", ""),
        (f"{words.share(report.accuracies[0])} → {words.share(report.accuracies[-1])}", "bold green"),
        f" after round {run.round}; the best single guess gets {words.share(report.majority)}.\n",
        f"The pulled adapter in PEFT: {words.share(trial.accuracy)} at rank {run.plan.global_rank}, "
        f"{words.share(trial.accuracy_own_rank)} at the departments' own ranks.\n",
        f"{words.size(run.bytes_up)} up, {words.size(run.bytes_down)} down, {words.duration(report.seconds['whole'])} in all.",
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        text = column in ("text", "why", "department", "ranks", "it is", "without", "with")
        table.add_column(column, justify="left" if text else "right", overflow="fold")
    return table


def _cut(text: str, length: int = 100) -> str:
    return text if len(text) <= length else text[: length - 1].rsplit(" ", 1)[0] + " …"
