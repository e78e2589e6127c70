"""The demonstration's command. What is heavy is imported once it is needed, so that --help is instant."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from protocol import errors

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[
        str | None, typer.Option(help="base model: package:NAME, a folder, or a hub id", show_default="MiniLM, from a package")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="JSON lines of your own: a folder with a file per department, or one file")] = None,
    text: Annotated[str, typer.Option(help="column of the text in your own data")] = "text",
    text_pair: Annotated[str | None, typer.Option(help="column of the second text, for pairs")] = None,
    label: Annotated[str, typer.Option(help="column of the label")] = "label",
    rows: Annotated[int, typer.Option(min=100, help="rows in all, of one file or of the built-in text")] = 2100,
    rounds: Annotated[int, typer.Option(min=1)] = 6,
    minutes: Annotated[float, typer.Option(min=0.1, help="give up after so long")] = 30.0,
    out: Annotated[Path, typer.Option(help="folder for all that is made")] = Path("out/demo"),
    as_json: Annotated[bool, typer.Option("--json", help="print the summary as JSON; everything else goes to stderr")] = False,
) -> None:
    """Fine-tune a pretrained encoder across unequal machines, each a process of its own, and show what came of it."""
    console = Console(stderr=as_json, width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    try:
        from demo.demonstration import Demonstration
        from demo.departments import Columns

        summary = Demonstration(model, data, Columns(text, label, text_pair), rows, rounds, minutes, out, console).run()
    except errors.HLoRAError as error:
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"The demonstration failed: {error}")
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(summary, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    app()
