"""The demonstration's command: one federation of unequal machines, from nothing to an adapter that works."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from pydantic import JsonValue
from rich.console import Console

from demo import corpus, federation, report
from demo import departments as dividing
from demo import plan as plans
from demo.departments import Columns, Department
from demo.processes import processes
from demo.report import Report
from protocol import errors
from protocol.plan import Plan

SEED = 0
PER_FAMILY = 300
PREDICTIONS = 6
PARTS = ("coordinator", "departments", "logs", "adapter")  # of an earlier demonstration; made anew
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="base model: package:NAME, a folder, or a hub id")] = plans.MODEL,
    data: Annotated[Path | None, typer.Option(help="JSON lines of your own: a folder with a file per department, or one file")] = None,
    text: Annotated[str, typer.Option(help="column of the text in your own data")] = "text",
    text_pair: Annotated[str | None, typer.Option(help="column of the second text, for pairs")] = None,
    label: Annotated[str, typer.Option(help="column of the label")] = "label",
    rows: Annotated[int, typer.Option(min=100, help="rows in all, of one file or of the built-in text")] = 2100,
    rounds: Annotated[int, typer.Option(min=1)] = 6,
    minutes: Annotated[float, typer.Option(min=0.1, help="give up after so long")] = 15.0,
    out: Annotated[Path, typer.Option(help="folder for all that is made")] = Path("out/demo"),
    as_json: Annotated[bool, typer.Option("--json", help="print the summary as JSON; everything else goes to stderr")] = False,
) -> None:
    """Fine-tune a pretrained encoder across unequal machines, each a process of its own, and show what came of it."""
    console = Console(stderr=as_json, width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    wishes = _Wishes(model, data, Columns(text, label, text_pair), rows, rounds, minutes, out)
    try:
        summary = _demonstrate(wishes, console)
    except errors.HLoRAError as error:
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"The demonstration failed: {error}")
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(summary, indent=2, ensure_ascii=False))


@dataclass(frozen=True)
class _Wishes:
    model: str
    data: Path | None
    columns: Columns
    rows: int
    rounds: int
    minutes: float
    out: Path


@dataclass
class _Watch:
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


def _demonstrate(wishes: _Wishes, console: Console) -> dict[str, JsonValue]:
    watch, out = _Watch(console), wishes.out
    for part in PARTS:
        shutil.rmtree(out / part, ignore_errors=True)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    offline = {"HF_HUB_OFFLINE": "1"} if wishes.model.startswith("package:") or Path(wishes.model).is_dir() else {}
    with processes(out / "logs", 60 * wishes.minutes, offline) as children, ExitStack() as links:
        with watch.part("data", "collecting texts and dividing them among the departments"):
            departments = _departments(wishes)
        with watch.part("start", "starting the coordinator; looking at the base model"):
            coordinator = federation.start_coordinator(children, out / "coordinator")
            plan = _plan(wishes, departments)
        with watch.part("enrolment", f"enrolling and starting {len(departments)} agents, each a process of its own"):
            federation.start_agents(children, links, coordinator, departments, plan, out / "departments")
        with watch.part("federation", f"{plan.rounds} rounds; the plan is {out / 'plan.toml'}"):
            outcome = federation.carry_out(children, coordinator, plan, sys.stderr if console.stderr else sys.stdout)
        with watch.part("trial", "pulling the adapter, and trying it with PEFT on all held-out rows"):
            from demo.trial import try_out

            pulled = {
                rank: federation.pull(children, coordinator, outcome.run.id, rank, out / "adapter" / f"rank-{rank}")
                for rank in plan.ranks.ladder
            }
            trial = try_out(pulled, report.measured_ranks(outcome.rounds[-1]), departments, plan, PREDICTIONS)
    return _tell(Report(departments, outcome, trial, watch.whole()), out, console)


def _departments(wishes: _Wishes) -> list[Department]:
    if wishes.data is None:
        return dividing.divide(corpus.collect(PER_FAMILY), wishes.rows, SEED)
    return dividing.bring(wishes.data, wishes.columns, wishes.rows, SEED)


def _plan(wishes: _Wishes, departments: Sequence[Department]) -> Plan:
    """The plan, written for the reader and resolved against its base model."""
    from modelling.layout import resolve

    file = wishes.out / "plan.toml"
    asked = plans.Wishes(
        labels=dividing.labels(departments),
        clients=len(departments),
        rounds=wishes.rounds,
        seed=SEED,
        pairs=wishes.columns.text_pair is not None,
        model=wishes.model,
    )
    file.write_text(plans.text(asked), encoding="utf-8")
    return resolve(plans.read(file))


def _tell(found: Report, out: Path, console: Console) -> dict[str, JsonValue]:
    from demo.curves import draw

    summary = report.summary(found)
    (out / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draw(found, out / "curves.png")
    console.print()
    console.print(report.tables(found))
    console.print(f"\n{out / 'summary.json'}, {out / 'curves.png'}, {out / 'adapter'}: the adapter at every rank")
    return summary


if __name__ == "__main__":
    app()
