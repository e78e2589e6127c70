"""The operator's command: `python -m admin`."""

from __future__ import annotations

from typing import Annotated

import typer

from admin import adapter, catalogue, clients, enrolments, plans, quarantine, rounds, runs, tokens
from admin.command import Commands, configure

app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for name, commands in {
    "runs": runs,
    "rounds": rounds,
    "plans": plans,
    "clients": clients,
    "quarantine": quarantine,
    "enrolments": enrolments,
    "tokens": tokens,
    "adapter": adapter,
}.items():
    app.add_typer(commands.app, name=name)
for command in (catalogue.strategies, catalogue.ranks, catalogue.health):
    app.command()(command)


@app.callback()
def options(
    ctx: typer.Context,
    url: Annotated[str | None, typer.Option(help="the coordinator's address; HLORA_URL")] = None,
    token: Annotated[str | None, typer.Option(help="an operator's token; rather HLORA_TOKEN, which other users cannot see")] = None,
) -> None:
    """Operate a federation: start runs, follow their rounds, look after clients, fetch adapters.

    HLORA_URL and HLORA_TOKEN say which coordinator and who asks. Every command answers as JSON with --json.
    """
    configure(ctx, url, token)


if __name__ == "__main__":
    app()
