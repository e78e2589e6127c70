"""Enrolment tokens: how machines come to take part."""

from __future__ import annotations

from typing import Annotated

import typer

from admin import words
from admin.clients import changed
from admin.command import AsJson, answer, asked, connect, group, table
from admin.naming import find
from protocol.views import EnrolmentRequest

app = group("Let machines enrol.")


@app.command()
def create(
    ctx: typer.Context,
    uses: Annotated[int, typer.Option(help="how many machines may enrol with it", min=1, max=100_000)] = 1,
    hours: Annotated[float, typer.Option(help="how long it is valid", min=0.001, max=8760)] = 24.0,
    label: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="given to every machine that enrols with it")] = None,
    as_json: AsJson = False,
) -> None:
    """Make an enrolment token and print it, this once."""
    request = asked(EnrolmentRequest, uses=uses, seconds=hours * 3600, labels=changed({}, label or []))
    with connect(ctx) as client:
        made = client.make_enrolment(request)
    if not as_json:
        typer.echo(
            f"valid until {words.moment(made.expires_at)}; on the machine: python -m agent enrol URL --name NAME --token …", err=True
        )
    answer(made, as_json, made.token)


@app.command("list")
def list_(ctx: typer.Context, as_json: AsJson = False) -> None:
    """Enrolment tokens, newest first, without the tokens."""
    with connect(ctx) as client:
        found = list(client.enrolments())
    rows = [
        (one.id, str(one.uses_left), words.moment(one.expires_at), "yes" if one.revoked else "", words.labels(one.labels)) for one in found
    ]
    answer(found, as_json, table("enrolment", "uses left", "expires", "revoked", "labels", rows=rows, right=["uses left"]))


@app.command()
def revoke(
    ctx: typer.Context,
    enrolment: Annotated[str, typer.Argument(metavar="ENROLMENT", help="id, or beginning of an id")],
    as_json: AsJson = False,
) -> None:
    """Void an enrolment token; machines that enrolled with it stay."""
    with connect(ctx) as client:
        meant = find("enrolment", enrolment, client.enrolments())
        client.revoke_enrolment(meant.id)
    answer(meant.model_copy(update={"revoked": True}), as_json, f"{meant.id} is revoked")
