"""Operators' tokens."""

from __future__ import annotations

from typing import Annotated

import typer
from pydantic import ValidationError

from admin import words
from admin.command import AsJson, answer, connect, group, table
from admin.naming import find
from protocol import errors
from protocol.states import Role
from protocol.views import TokenRequest

app = group("Give other operators access, and take it away.")


@app.command()
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="whose token it is")],
    role: Annotated[Role, typer.Option(help="viewer may read, admin may do everything")] = Role.viewer,
    as_json: AsJson = False,
) -> None:
    """Make an operator's token and print it, this once."""
    try:
        request = TokenRequest(name=name, role=role)
    except ValidationError:
        raise errors.InvalidRequest(f"{name!r} is no name; 1 to 64 letters, digits, . _ - or blank were expected") from None
    with connect(ctx) as client:
        made = client.make_token(request)
    answer(made, as_json, made.token)


@app.command("list")
def list_(ctx: typer.Context, as_json: AsJson = False) -> None:
    """Operators' tokens, newest first, without the tokens."""
    with connect(ctx) as client:
        found = list(client.tokens())
    rows = [(one.id, one.name, one.role, words.moment(one.created_at), "yes" if one.revoked else "") for one in found]
    answer(found, as_json, table("token", "name", "role", "created", "revoked", rows=rows))


@app.command()
def revoke(
    ctx: typer.Context,
    token: Annotated[str, typer.Argument(metavar="TOKEN", help="id, beginning of an id, or name")],
    as_json: AsJson = False,
) -> None:
    """Void an operator's token at once."""
    with connect(ctx) as client:
        meant = find("token", token, [one for one in client.tokens() if not one.revoked], lambda one: one.name)
        client.revoke_token(meant.id)
    answer(meant.model_copy(update={"revoked": True}), as_json, f"{meant.id} ({meant.name}) is revoked")
