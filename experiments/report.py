"""What came of an experiment: tables to look at, and beside the results, if asked for, as a page with pictures."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table as RichTable

from experiments import curves, tuning
from experiments.experiment import Experiment, read
from experiments.records import FILE, Finished, Results
from experiments.tables import Table, tables
from protocol import errors


def opened(folder: Path) -> tuple[Experiment, list[Finished]]:
    """The experiment of some results, and its runs by contestant and seed.

    Raises InvalidRequest where there are none, and Conflict where some were made by other settings than the experiment's file says now.
    """
    if not (folder / FILE).is_file():
        raise errors.InvalidRequest(f"{folder} holds no results: there is no {FILE} in it")
    experiment, runs = read(folder / FILE), Results(folder).all()
    if not runs:
        raise errors.InvalidRequest(f"no run of {experiment.name} has ended in {folder} yet")
    trials = tuned(folder)
    said = {c.name: experiment.digest(tuning.frozen(experiment, c, trials)) for c in experiment.contestants}
    for name, seed, settings in ((run.header.contestant, run.header.seed, run.header.settings) for run in runs):
        if said.get(name, settings) != settings:
            raise errors.Conflict(
                f"{Results(folder).file(name, seed)} was made by other settings than {folder / FILE} says now; "
                "remove it, or bring that file back to what it was"
            )
    return experiment, runs


def tuned(folder: Path) -> list[Finished]:
    """The short runs with which the contestants were tuned; none where they were not."""
    return Results(folder / tuning.FOLDER).all()


def shown(folder: Path) -> RenderableType:
    """The tables for a terminal. Raises InvalidRequest where there are no results."""
    found = tables(*opened(folder), tuned(folder))
    return Group(*(part for table in found for part in (_rich(table), f"{table.note}\n" if table.note else "") if part))


def write(folder: Path) -> None:
    """Write report.md, curves.png and curves.svg beside the results. Raises InvalidRequest where there are none."""
    experiment, runs = opened(folder)
    curves.draw(experiment, runs, folder / "curves.png", folder / "curves.svg")
    text = "\n".join(table.markdown() for table in tables(experiment, runs, tuned(folder)))
    (folder / "report.md").write_text(f"# {experiment.name}\n\n{experiment.question}\n\n![Curves](curves.svg)\n\n{text}", "utf-8")


def _rich(table: Table) -> RichTable:
    shown = RichTable(title=table.title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 1, 0))
    for n, column in enumerate(table.columns):
        shown.add_column(column, justify="right" if n else "left")
    for row in table.rows:
        shown.add_row(*(cell.strip("*") for cell in row))
    return shown
