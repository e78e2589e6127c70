"""The benchmarks' command: `python -m benchmarks merge`."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Measure this machine.")


@app.callback()
def benchmarks() -> None:
    """Measure this machine. Close other programs first; every number is printed with the machine that it comes from."""


@app.command()
def merge(
    quick: Annotated[bool, typer.Option("--quick", help="a part of RoBERTa-large alone, under a minute")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON line for each measurement")] = False,
) -> None:
    """Merge rounds of clients with unequal ranks, beside the dense form."""
    from benchmarks.merge import QUICK, SIZES, measure, methods, report

    decompositions: dict[tuple[int, int], float] = {}
    sizes = QUICK if quick else SIZES
    told = {size.shapes[0]: size for size in sizes if size.clients == 20}
    for one in told.values():
        for method in methods(one, decompositions):
            typer.echo(method.model_dump_json() if as_json else report(method))
    for size in sizes:
        found = measure(size, decompositions)
        typer.echo(found.model_dump_json() if as_json else report(found))


if __name__ == "__main__":
    app()
