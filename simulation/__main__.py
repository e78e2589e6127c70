"""The simulation's command: `python -m simulation PLAN FLEET`."""

from __future__ import annotations

import asyncio
import io
import shutil
import tempfile
import tomllib
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent import refusals
from protocol import errors

if TYPE_CHECKING:
    from protocol.plan import Plan
    from protocol.views import RunDetail

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def simulate(
    plan: Annotated[Path, typer.Argument(help="the plan, as TOML", exists=True, dir_okay=False)],
    fleet: Annotated[Path, typer.Argument(help="folder with one agent's home folder per device", exists=True, file_okay=False)],
    out: Annotated[
        Path | None, typer.Option(help="new folder for database, blobs and the last adapter; by default nothing is kept")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="instead of the plan's number of rounds")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="instead of the plan's seed")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object per round")] = False,
) -> None:
    """Carry out a plan with many real agents and the real coordinator in one process.

    Each device is an agent's home folder (datasets.toml, policy.toml) with an optional machine.toml that says what its
    machine can do. Time is simulated, so results repeat: two runs with the same seed publish the same bytes.
    """
    with refusals.told():
        asyncio.run(_simulate(plan, fleet, out, rounds, seed, as_json))


async def _simulate(file: Path, fleet: Path, out: Path | None, rounds: int | None, seed: int | None, as_json: bool) -> None:
    import structlog
    import torch

    from simulation import device
    from simulation.federation import federation
    from simulation.report import Report

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))  # warnings and worse
    torch.set_num_threads(1)  # the same numbers whatever the machine, and one core left for merging
    plan = read_plan(file, {"rounds": rounds, "seed": seed})
    before = None if out is None else _prepare(out)
    latest: RunDetail | None = None
    try:
        with tempfile.TemporaryDirectory(prefix="hlora-") as scratch:
            async with federation(device.fleet(fleet), out or Path(scratch)) as found:
                try:
                    report = Report(as_json)
                    async for latest in found.run(plan):
                        await report.follow(found, latest)
                finally:  # also of a run that does not go on
                    if out is not None and latest is not None and latest.round:
                        _keep(await found.adapter(latest.id, plan.global_rank), out / "adapter")
    except errors.HLoRAError:
        if out is not None and before is not None and latest is None:
            _clear(out, before)
        raise


def _prepare(out: Path) -> set[Path]:
    """Make the folder; gives what is in it already."""
    if (out / "hlora.sqlite").exists():
        raise errors.Conflict(f"{out} holds a federation already; choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.InvalidRequest(f"{out} cannot be made a folder ({error.strerror}); choose another one") from None
    return set(out.iterdir())


def _clear(out: Path, before: set[Path]) -> None:
    """Remove what a simulation that never began has left, so that the same command can be given again."""
    for path in set(out.iterdir()) - before:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _keep(archive: bytes, folder: Path) -> None:
    """Unpack an adapter. Where it is is no part of the output, which may be JSON."""
    with zipfile.ZipFile(io.BytesIO(archive)) as packed:
        packed.extractall(folder)
    typer.echo(f"the last adapter is in {folder}", err=True)


def read_plan(file: Path, instead: dict[str, int | None]) -> Plan:
    """A plan file, with some values replaced and resolved against its base model. Raises InvalidPlan."""
    from pydantic import ValidationError

    from modelling.layout import resolve
    from protocol.plan import Plan
    from protocol.strict import mistakes

    try:
        told = tomllib.loads(file.read_text(encoding="utf-8")) | {name: value for name, value in instead.items() if value is not None}
        return resolve(Plan.model_validate(told))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise errors.InvalidPlan(f"{file} is no TOML: {error}") from None
    except ValidationError as error:
        raise errors.InvalidPlan(f"{file}: {next(mistakes(error, Plan))}") from None


if __name__ == "__main__":
    app()
