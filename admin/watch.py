"""Follow a run until it ends: drawn live on a terminal, as lines elsewhere, as JSON lines for programs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Annotated

import typer
from rich.live import Live

from admin.client import Client
from admin.command import connect, console
from admin.following import Change, Snapshot, changes, look, settled
from admin.naming import Run, run_id
from admin.screen import line, screen
from admin.words import json_text, printable
from protocol import errors
from protocol.states import RunState

EXIT_CODES: Mapping[RunState, int] = {RunState.finished: 0, RunState.failed: 1, RunState.stopped: 1, RunState.paused: 2}
PATIENCE_SECONDS = 300.0  # how long a coordinator that does not answer is waited for

Show = Callable[[Snapshot, str | None], None]


def watch(
    ctx: typer.Context,
    run: Run,
    interval: Annotated[float, typer.Option(help="seconds between two looks", min=0.05, max=3600)] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON line for each change")] = False,
) -> None:
    """Follow a run until it ends. Exit code 0: finished; 1: failed or stopped; 2: paused."""
    with connect(ctx) as client:
        id = run_id(client, run)
        if as_json:
            last = follow(client, id, Lines(lambda change: json_text(change.model_dump_json(exclude_none=True))), interval)
        elif sys.stdout.isatty():
            with Live(console=console(), auto_refresh=False, vertical_overflow="crop") as live:
                last = follow(client, id, lambda now, trouble: live.update(screen(now, trouble), refresh=True), interval)
        else:
            last = follow(client, id, Lines(line, settled), interval)
    raise typer.Exit(EXIT_CODES[last.run.state])


class Lines:
    """Prints what changed since it was last called, one line each; trouble goes to the standard error, when it begins and ends."""

    def __init__(self, words: Callable[[Change], str | None], told: Callable[[Snapshot], Snapshot] = lambda now: now) -> None:
        self._words, self._told = words, told
        self._before: Snapshot | None = None
        self._troubled = False

    def __call__(self, now: Snapshot, trouble: str | None) -> None:
        now = self._told(now)
        for change in changes(self._before, now):
            said = self._words(change)
            if said is not None:
                typer.echo(said)
        self._before = now
        if self._troubled != (trouble is not None):
            self._troubled = not self._troubled
            typer.echo("the coordinator answers again" if trouble is None else printable(trouble), err=True)


def follow(client: Client, run: str, show: Show, interval: float, sleep: Callable[[float], None] = time.sleep) -> Snapshot:
    """Look and show until the run is no longer running; gives the last look.

    A coordinator that does not answer is waited for, five minutes long; then Unavailable is raised.
    """
    now: Snapshot | None = None
    silent = 0.0
    while True:
        try:
            now = look(client, run, now)
        except errors.Unavailable as error:
            silent += interval
            if now is None or silent > PATIENCE_SECONDS:
                raise
            show(now, f"{error}; trying again")
        else:
            silent = 0.0
            show(now, None)
            if now.run.state in EXIT_CODES:
                return now
        sleep(interval)
