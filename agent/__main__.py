"""The agent's command. What is heavy is imported when a command needs it, so that --help is instant."""

from __future__ import annotations

import asyncio
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent import refusals

if TYPE_CHECKING:
    from agent.settings import Settings

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="The program on a participating machine."
)
Home = Annotated[Path | None, typer.Option(help="the home folder; or HLORA_AGENT_HOME", show_default="~/.hlora/agent")]


@app.command()
def enrol(
    url: Annotated[str | None, typer.Argument(help="the coordinator's address; or HLORA_AGENT_URL")] = None,
    name: Annotated[str | None, typer.Option(help="the name by which operators will know this machine")] = None,
    token: Annotated[str | None, typer.Option(help="the enrolment token; or HLORA_AGENT_TOKEN; otherwise it is asked for")] = None,
    home: Home = None,
) -> None:
    """Redeem an enrolment token; the credential is kept in the home folder."""
    with refusals.told():
        from pydantic import SecretStr

        from agent import app as agent

        settings = _settings(home)
        where = url or settings.url or typer.prompt("address of the coordinator")
        called = name or typer.prompt("name of this machine")
        secret = SecretStr(token) if token else settings.token or SecretStr(typer.prompt("enrolment token", hide_input=True))
        who = asyncio.run(agent.enrol(settings, where, called, secret))
        started = "python -m agent run" if home is None else shlex.join(["python", "-m", "agent", "run", "--home", str(home)])
        typer.echo(f"enrolled as {who.name} ({who.id}); start the agent with: {started}")


@app.command()
def run(home: Home = None) -> None:
    """Ask for jobs and do them, until SIGTERM or SIGINT. Ends with 78 where starting it again cannot help."""
    with refusals.told(refusals.HOPELESS):
        from agent import app as agent

        asyncio.run(agent.run(_settings(home)))


@app.command()
def doctor(
    model: Annotated[list[str] | None, typer.Option(help="a base model that runs will use; may be repeated")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON list")] = False,
    home: Home = None,
) -> None:
    """Check policy, device, memory, data, models, credential and coordinator, and say what to mend."""
    import json

    from agent import doctor

    with refusals.told():
        findings = asyncio.run(doctor.examine(_settings(home), model or []))
    typer.echo(json.dumps([finding.facts() for finding in findings]) if as_json else "\n".join(finding.line() for finding in findings))
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)


def _settings(home: Path | None) -> Settings:
    from pydantic import ValidationError

    from agent import app as agent
    from agent.settings import Settings
    from protocol import errors

    try:
        settings = Settings() if home is None else Settings(home=home)
    except ValidationError as error:
        first = error.errors()[0]
        raise errors.InvalidRequest(f"HLORA_AGENT_{str(first['loc'][0]).upper()}: {first['msg']}") from None
    agent.configure(settings)
    return settings


if __name__ == "__main__":
    app()
