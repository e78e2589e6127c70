"""Runs: start, look, pause, go on, stop."""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from rich.console import Group

from admin import plans, words
from admin.client import Client
from admin.command import AsJson, answer, connect, facts, group, table
from admin.naming import Run, run_id
from admin.plans import PlanFile
from admin.watch import watch
from protocol import errors
from protocol.views import RunView

app = group("Start runs and follow them.")
app.command()(watch)


@app.command()
def create(
    ctx: typer.Context,
    plan: PlanFile,
    idempotency_key: Annotated[str | None, typer.Option(help="any text; the same key again finds the run that it made")] = None,
    continued: Annotated[
        str | None,
        typer.Option(
            "--continue",
            metavar="RUN",
            help="begin with the adapter that this run published; with an idempotency key name it by its id, and the round",
        ),
    ] = None,
    continued_round: Annotated[
        int | None, typer.Option("--continue-round", min=0, help="with --continue: that of this round, by default of the last one")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Start a run. The plan is resolved against its base model first, unless it is resolved already."""
    if continued is None and continued_round is not None:
        raise errors.InvalidRequest("--continue-round needs --continue: name the run whose round it is")
    found = plans.resolved(plans.read(plan))
    with connect(ctx) as client:
        if continued is not None:
            digest = _published(client, run_id(client, continued), continued_round)
            if found.continues not in (None, digest):
                raise errors.InvalidRequest(
                    f"the plan continues {found.continues} already, and --continue says {digest}; leave one of them out"
                )
            found = found.model_copy(update={"continues": digest})
        made = client.create_run(found, idempotency_key)
    answer(made, as_json, f"{made.id}  {made.name}: follow it with `python -m admin runs watch {made.id}`")


def _published(client: Client, run: str, number: int | None) -> str:
    """The digest of a round's adapter, by default the last one's. Raises InvalidRequest where it has none yet."""
    found = client.round(run, client.run(run).round if number is None else number)
    if found.adapter is None:
        raise errors.InvalidRequest(f"round {found.number} of run {run} is {found.state}; only a published round can be continued")
    return found.adapter.digest


@app.command("list")
def list_(ctx: typer.Context, as_json: AsJson = False) -> None:
    """All runs, newest first."""
    with connect(ctx) as client:
        found = list(client.runs())
    rows = [
        (
            run.id,
            run.name,
            run.state,
            f"{run.round}/{run.rounds}",
            words.metrics(run.metrics),
            words.moment(run.created_at),
            run.reason or "",
        )
        for run in found
    ]
    answer(found, as_json, table("run", "name", "state", "round", "metrics", "created", "reason", rows=rows, right=["round"]))


@app.command()
def show(ctx: typer.Context, run: Run, as_json: AsJson = False) -> None:
    """A run, where it stands, and what its plan says."""
    with connect(ctx) as client:
        found = client.run(run_id(client, run))
    plan = found.plan
    ladder = ", ".join(map(str, plan.ranks.ladder))
    asked = [
        ("model", f"{plan.model.id} {plan.model.revision or ''}".strip()),
        ("task", f"{plan.task.kind} on data {plan.data!r}"),
        ("strategy", f"{plan.strategy.name}, global rank {plan.global_rank}"),
        ("ranks", f"{ladder}, given by {plan.ranks.name}"),
        ("continues", plan.continues or ""),
        ("cohort", f"{plan.cohort.target} contributions a round, {plan.cohort.quorum} suffice at the deadline"),
        ("plan", found.plan_digest),
    ]
    answer(found, as_json, Group(facts(_standing(found)), "", facts(asked)))


def _standing(run: RunView) -> list[tuple[str, str]]:
    return [
        ("run", f"{run.id}  {run.name}"),
        ("state", run.state + (f": {run.reason}" if run.reason else "")),
        ("round", f"{run.round} of {run.rounds} published"),
        ("metrics", words.metrics(run.metrics)),
        ("bytes", f"{words.size(run.bytes_up)} up, {words.size(run.bytes_down)} down"),
        ("created", words.moment(run.created_at)),
        ("ended", words.moment(run.ended_at) if run.ended_at else ""),
    ]


def _change(ctx: typer.Context, run: str, verb: Literal["pause", "resume", "stop"], as_json: bool) -> None:
    with connect(ctx) as client:
        found = client.change_run(run_id(client, run), verb)
    answer(found, as_json, facts(_standing(found)))


@app.command()
def pause(ctx: typer.Context, run: Run, as_json: AsJson = False) -> None:
    """Hand out no more work; what is being worked on is still taken."""
    _change(ctx, run, "pause", as_json)


@app.command()
def resume(ctx: typer.Context, run: Run, as_json: AsJson = False) -> None:
    """Go on with a paused or failed run."""
    _change(ctx, run, "resume", as_json)


@app.command()
def stop(ctx: typer.Context, run: Run, as_json: AsJson = False) -> None:
    """End a run for good; what it published stays."""
    _change(ctx, run, "stop", as_json)
