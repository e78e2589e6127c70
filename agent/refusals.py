"""What a command does with a refusal. The simulation's and the experiments' commands do the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from protocol import errors


@contextmanager
def told() -> Iterator[None]:
    """A refusal ends the command with one line on stderr, not with a trace."""
    try:
        yield
    except errors.HLoRAError as error:
        typer.echo(f"error: {error.detail}", err=True)
        raise typer.Exit(1) from None
