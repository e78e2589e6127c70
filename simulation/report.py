"""What a simulation tells while it runs: a line, or a JSON object, per round."""

from __future__ import annotations

import json
import time

import typer

from protocol import errors
from protocol.states import RunState
from protocol.views import RoundView, RunDetail
from simulation.federation import Federation


class Report:
    """Follows one run, and tells each round once its measures are in."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._told = -1
        self._began = time.monotonic()

    async def follow(self, federation: Federation, run: RunDetail) -> None:
        """Tell the rounds that are over. Raises Conflict with the run's reason if it does not go on."""
        newest = run.round if run.state is RunState.finished else run.round - 1
        for number in range(self._told + 1, newest + 1):
            self._tell(await federation.round(run.id, number))
            self._told = number
        if run.state not in (RunState.running, RunState.finished):
            raise errors.Conflict(f"the run is {run.state}: {run.reason}")

    def _tell(self, round: RoundView) -> None:
        seconds = time.monotonic() - self._began
        if self._as_json:
            typer.echo(json.dumps(round.model_dump(mode="json", exclude={"jobs"}) | {"wall_seconds": seconds}))
            return
        ranks = " ".join(f"{count}×r{rank}" for rank, count in round.ranks.items()) or "untrained"
        metrics = "  ".join(f"{name} {value:.4f}" for name, value in round.metrics.items())
        adapter = round.adapter.digest.removeprefix("sha256:")[:12] if round.adapter else "none"
        typer.echo(f"round {round.number:3d}  {ranks:24s}  {metrics}  adapter {adapter}  {seconds:.0f} s")
