"""What a command does with a refusal. The simulation's and the experiments' commands do the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from protocol import errors

HOPELESS = 78  # sysexits.h's EX_CONFIG: a service manager need not start what ended so again


@contextmanager
def told(code: int = 1) -> Iterator[None]:
    """A refusal ends the command with one line on stderr and that exit code, not with a trace."""
    try:
        yield
    except errors.HLoRAError as error:
        typer.echo(f"error: {error.detail}", err=True)
        raise typer.Exit(code) from None
