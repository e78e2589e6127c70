"""The experiments' command: `python -m experiments run FILE --out DIR`. What is heavy is imported once it is needed."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protocol import errors

if TYPE_CHECKING:
    from experiments.bench import Ended
    from experiments.material import Places

LATER = 75  # sysexits.h's EX_TEMPFAIL: nothing is wrong, and the same command does the rest

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compare strategies on one task, through real agents and the real application in one process.",
)
File = Annotated[Path, typer.Argument(help="the experiment, as TOML", exists=True, dir_okay=False)]
Folder = Annotated[Path, typer.Argument(help="folder of results", exists=True, file_okay=False)]
Models = Annotated[Path | None, typer.Option(help="folder of model folders; by default that of the experiment's file", file_okay=False)]
Data = Annotated[Path | None, typer.Option(help="folder of data files; by default that of the experiment's file", file_okay=False)]
Only = Annotated[list[str] | None, typer.Option(help="only this contestant; may be repeated")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on standard output, for scripts")]


@app.command()
def run(
    file: File,
    out: Annotated[Path, typer.Option(help="folder for the results; what is there already is not done again", file_okay=False)],
    models: Models = None,
    data: Data = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="how many seeds, instead of the experiment's number")] = None,
    only: Only = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0, help="begin no run once they are over, nor one that would end later at the pace so far; by default the experiment's"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Carry an experiment out, or go on where it was cut; then show what came of it.

    Ends with 75 where the minutes left some runs for later, and with 1 where one failed.
    """
    with _told():
        from rich.console import Console

        from experiments.bench import Bench
        from experiments.experiment import read, some
        from experiments.records import Results

        _quiet()
        experiment = read(file)
        if minutes is not None:
            experiment = experiment.model_copy(update={"budget_minutes": minutes})
        results = Results(out, file)
        console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        bench = Bench(experiment, _places(file, models, data), results, console)
        ended = bench.run(some(experiment, only or ()), experiment.numbers(seeds))
        if runs := results.all():
            from experiments import report as reports

            reports.write(out)
            _show(out, as_json)
        elif as_json:  # the budget was used up in tuning
            from experiments import figures

            typer.echo(figures.report(experiment, runs).model_dump_json())
        options = {"--models": models, "--data": data, "--seeds": seeds, "--minutes": minutes, "--json": as_json}
        _tell(ended, _command(file, out, options, only or ()))


@app.command()
def report(
    folder: Folder,
    as_json: AsJson = False,
    write: Annotated[bool, typer.Option("--write", help="write report.md, curves.png and curves.svg beside the results, too")] = False,
) -> None:
    """Show the tables of some results."""
    with _told():
        if write:
            from experiments import report as reports

            reports.write(folder)
        _show(folder, as_json)


@app.command()
def publish(
    folders: Annotated[list[Path] | None, typer.Argument(help="folders of results to store in the documents", exists=True)] = None,
    docs: Annotated[Path, typer.Option(help="folder of the documents", file_okay=False, exists=True)] = Path("docs"),
) -> None:
    """Store results beside the documents, and write evidence.md and its pictures from all that are stored."""
    with _told():
        from experiments import page

        typer.echo(page.publish(folders or (), docs))


@app.command(name="list")
def experiments(as_json: AsJson = False) -> None:
    """The experiments that come with the project: name, contestants × seeds × rounds, and the question."""
    from experiments.experiment import FOLDER, read

    with _told():
        found = [read(file) for file in sorted(FOLDER.glob("*.toml"))]
        if as_json:
            typer.echo(json.dumps([given.model_dump(mode="json", exclude_unset=True) for given in found], ensure_ascii=False))
            return
        for given in found:
            size = f"{len(given.contestants)} contestants × {given.seeds} seeds × {given.plan.get('rounds')} rounds"
            typer.echo(f"{given.name:14} {size}\n{'':14} {' '.join(given.question.split())}\n")


@app.command()
def overhead(
    file: File,
    models: Models = None,
    data: Data = None,
    only: Only = None,
    rounds: Annotated[int, typer.Option(min=1, help="rounds of the first contestant that are timed")] = 5,
    as_json: AsJson = False,
) -> None:
    """Time the bench itself: what a run costs beside training steps and merging. Close other programs first."""
    with _told():
        from experiments.experiment import read, some
        from experiments.timing import timed

        _quiet()
        experiment = read(file)
        found = timed(experiment, some(experiment, only or ())[0], _places(file, models, data), rounds)
        typer.echo(found.model_dump_json() if as_json else str(found))


def _command(file: Path, out: Path, options: Mapping[str, object], only: Iterable[str]) -> str:
    """The command that was given, to be given again."""
    given = [word for name, value in options.items() if value for word in ([name] if value is True else [name, str(value)])]
    named = [word for name in only for word in ("--only", name)]
    return shlex.join(["python", "-m", "experiments", "run", str(file), "--out", str(out), *given, *named])


def _tell(ended: Ended, command: str) -> None:
    """What is not done, why, and how it will be; ends with a code of its own if there is something."""
    for run, reason in ended.failed.items():
        typer.echo(f"{run} failed: {reason}", err=True)
    if ended.left:
        rounds = sum(run.rounds for run in ended.left)
        typer.echo(
            f"The budget is used up. Runs left: {len(ended.left)}, with {rounds} rounds; the next is {ended.left[0].name}.", err=True
        )
    if not ended.whole:
        typer.echo(f"What ended is kept; this does the rest: {command}", err=True)
        raise typer.Exit(1 if ended.failed else LATER)


@contextmanager
def _told() -> Iterator[None]:
    """What went wrong in one line on stderr, and what to do; no trace."""
    try:
        yield
    except errors.HLoRAError as error:
        where = "; --models names the folder in which models are looked for first" if isinstance(error, errors.ModelRefusal) else ""
        typer.echo(f"{error.detail}{where}", err=True)
        raise typer.Exit(1) from None
    except OSError as error:
        typer.echo(": ".join(str(part) for part in (error.filename, error.strerror) if part), err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("\nStopped. What ended is kept: the same command goes on from there.", err=True)
        raise typer.Exit(130) from None


def _show(folder: Path, as_json: bool) -> None:
    from rich.console import Console

    from experiments import figures
    from experiments import report as reports

    if as_json:
        typer.echo(figures.report(*reports.opened(folder)).model_dump_json())
    else:
        Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(reports.shown(folder))


def _places(file: Path, models: Path | None, data: Path | None) -> Places:
    from experiments.material import Places

    return Places(models or file.parent, data or file.parent)


def _quiet() -> None:
    """Logs of errors only, and one thread: the same numbers on every machine, and no core that waits for another."""
    import structlog
    import torch

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    torch.set_num_threads(1)


if __name__ == "__main__":
    app()
