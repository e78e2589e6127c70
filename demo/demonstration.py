"""From nothing to an adapter that works: all parts of a demonstration, in their order."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import JsonValue
from rich.console import Console

from demo import corpus, federation, report
from demo import departments as dividing
from demo import plan as plans
from demo.curves import draw
from demo.departments import Columns, Department
from demo.federation import Outcome
from demo.processes import Processes, processes
from demo.report import Report
from demo.trial import Trial, try_out
from modelling.layout import resolve
from protocol.plan import Plan

SEED = 0
PER_FAMILY = 300  # texts that are collected of each family
PREDICTIONS = 8  # that are shown
PARTS = ("coordinator", "departments", "logs", "adapter")  # of an earlier demonstration; made anew


@dataclass
class Watch:
    """Says what begins, and keeps how long it took."""

    console: Console
    began: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str, words: str) -> Iterator[None]:
        """One part of the work."""
        start = time.monotonic()
        self.console.print(f"{start - self.began:4.0f} s  {words}")
        yield
        self.seconds[name] = time.monotonic() - start

    def whole(self) -> dict[str, float]:
        """Every part's seconds, and those of the whole."""
        return {**self.seconds, "whole": time.monotonic() - self.began}


@dataclass(frozen=True)
class Demonstration:
    """What is wished for, and where it is shown."""

    model: str | None
    data: Path | None
    columns: Columns
    rows: int
    rounds: int
    minutes: float
    out: Path
    console: Console

    def run(self) -> dict[str, JsonValue]:
        """Do it all, show it, and give the summary. Raises HLoRAError, with every process stopped, if anything fails."""
        watch = Watch(self.console)
        for part in PARTS:
            shutil.rmtree(self.out / part, ignore_errors=True)
        (self.out / "logs").mkdir(parents=True)
        model = self.model or plans.MODEL
        offline = {"HF_HUB_OFFLINE": "1"} if model.startswith("package:") or Path(model).is_dir() else {}
        with processes(self.out / "logs", 60 * self.minutes, offline) as children, ExitStack() as links:
            with watch.part("data", "collecting texts and dividing them among the departments"):
                departments = self._departments()
            with watch.part("start", "starting the coordinator; looking at the base model"):
                coordinator = federation.start_coordinator(children, self.out / "coordinator")
                plan = self._plan(model, departments)
            with watch.part("enrolment", f"enrolling and starting {len(departments)} agents, each a process of its own"):
                federation.start_agents(children, links, coordinator, departments, plan, self.out / "departments")
            with watch.part("federation", f"training, merging and measuring, as {self.out / 'plan.toml'} says"):
                outcome = federation.carry_out(children, coordinator, plan, self.console)
            with watch.part("trial", "pulling the adapter and trying it with PEFT on all held-out rows"):
                trial = self._trial(children, coordinator, outcome, departments)
        return self._tell(Report(departments, outcome, trial, watch.whole()))

    def _departments(self) -> list[Department]:
        if self.data is None:
            return dividing.divide(corpus.collect(PER_FAMILY), self.rows, SEED)
        return dividing.bring(self.data, self.columns, self.rows, SEED)

    def _plan(self, model: str, departments: Sequence[Department]) -> Plan:
        """The plan, written for the reader and resolved against its base model."""
        file, pairs = self.out / "plan.toml", self.columns.text_pair is not None
        wishes = plans.Wishes(dividing.labels(departments), len(departments), self.rounds, SEED, pairs, model)
        file.write_text(plans.text(wishes), encoding="utf-8")
        return resolve(plans.read(file))

    def _trial(
        self, children: Processes, coordinator: federation.Coordinator, outcome: Outcome, departments: Sequence[Department]
    ) -> Trial:
        plan = outcome.run.plan
        folders = {rank: self.out / "adapter" / f"rank-{rank}" for rank in plan.ranks.ladder}
        for rank, folder in folders.items():
            federation.pull(children, coordinator, outcome.run.id, rank, folder)
        return try_out(folders, report.measured_ranks(outcome.rounds[-1]), departments, plan, PREDICTIONS)

    def _tell(self, found: Report) -> dict[str, JsonValue]:
        summary, file, picture = report.summary(found), self.out / "summary.json", self.out / "curves.png"
        file.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        draw(found, picture)
        self.console.print()
        self.console.print(report.tables(found))
        self.console.print(f"\n{file}, {picture}, {self.out / 'adapter'}: the adapter at every rank")
        return summary
