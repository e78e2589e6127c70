"""Clients: the machines that take part."""

from __future__ import annotations

import re
from typing import Annotated

import typer
from rich.console import Group

from admin import words
from admin.command import AsJson, answer, asked, connect, facts, group, table
from admin.naming import Which, client_id
from protocol import errors
from protocol.states import ClientState
from protocol.views import ClientChange, ClientView

app = group("Look after the machines that take part.")
PAIR = re.compile(r"([^=\s]+)=(.*)")


@app.command("list")
def list_(ctx: typer.Context, as_json: AsJson = False) -> None:
    """All clients, newest first."""
    with connect(ctx) as client:
        found = list(client.clients())
    rows = [
        (
            one.id,
            one.name,
            one.state,
            "yes" if one.available else "no",
            "" if one.rank is None else str(one.rank.rank),
            words.size(one.profile.memory_bytes),
            words.labels(one.labels),
            words.moment(one.last_seen),
            one.reason or "",
        )
        for one in found
    ]
    answer(
        found,
        as_json,
        table(
            "client", "name", "state", "available", "rank", "memory", "labels", "last seen", "reason", rows=rows, right=["rank", "memory"]
        ),
    )


@app.command()
def show(ctx: typer.Context, client: Which, as_json: AsJson = False) -> None:
    """One client: state, machine, data, limits, last rank and why."""
    with connect(ctx) as connection:
        found = connection.client(client_id(connection, client))
    profile = found.profile
    rows = [(alias, f"{data.train:,}", f"{data.held_out:,}", ", ".join(data.columns)) for alias, data in profile.datasets.items()]
    data = table("data", "train", "held out", "columns", rows=rows, right=["train", "held out"])
    answer(found, as_json, Group(facts([*_standing(found), *_machine(found)]), "", data))


def _standing(found: ClientView) -> list[tuple[str, str]]:
    return [
        ("client", f"{found.id}  {found.name}"),
        ("state", found.state + (f": {found.reason}" if found.reason else "")),
        ("available", "yes" if found.available else "no"),
        ("last seen", words.moment(found.last_seen)),
        ("enrolled", words.moment(found.enrolled_at)),
        ("rejections", str(found.rejections) if found.rejections else ""),
        ("labels", words.labels(found.labels)),
        ("rank", found.rank.reason if found.rank else ""),
    ]


def _machine(found: ClientView) -> list[tuple[str, str]]:
    profile, limits = found.profile, found.profile.limits
    speeds = [(profile.down_bytes_per_second, "down"), (profile.up_bytes_per_second, "up")]
    allowed = [
        (limits.largest_rank, "rank"),
        (limits.max_steps, "steps"),
        (limits.max_bytes, "bytes"),
    ]
    return [
        ("device", f"{profile.device}, {profile.cores} cores, {words.size(profile.memory_bytes)} of memory"),
        ("speed", f"{profile.training_flops:.3g} operations a second"),
        ("link", ", ".join(f"{words.size(speed)}/s {way}" for speed, way in speeds if speed)),
        ("owner's limits", ", ".join(f"{noun} {most:,}" for most, noun in allowed if most is not None)),
        ("software", ", ".join(f"{name} {version}" for name, version in sorted(profile.software.items()))),
    ]


@app.command()
def label(
    ctx: typer.Context,
    client: Which,
    changes: Annotated[list[str], typer.Argument(metavar="KEY=VALUE|KEY-...", help="set a label, or take one away")],
    as_json: AsJson = False,
) -> None:
    """Set labels (class=phone) and take them away (class-); the others stay."""
    with connect(ctx) as connection:
        id = client_id(connection, client)
        labels = changed(connection.client(id).labels, changes)
        found = connection.change_client(id, asked(ClientChange, labels=labels)).client
    answer(found, as_json, facts(_standing(found)))


def changed(labels: dict[str, str], changes: list[str]) -> dict[str, str]:
    """The labels after KEY=VALUE and KEY- in turn. Raises InvalidRequest for anything else."""
    after = dict(labels)
    for change in changes:
        if pair := PAIR.fullmatch(change):
            after[pair[1]] = pair[2]
        elif change.endswith("-") and change[:-1] in after:
            del after[change[:-1]]
        elif change.endswith("-"):
            raise errors.InvalidRequest(f"there is no label {change[:-1]!r} to take away; there are {words.labels(after) or 'none'}")
        else:
            raise errors.InvalidRequest(f"{change!r} is neither KEY=VALUE, which sets a label, nor KEY-, which takes it away")
    return after


def _set(ctx: typer.Context, client: str, state: ClientState, as_json: bool) -> None:
    with connect(ctx) as connection:
        found = connection.change_client(client_id(connection, client), ClientChange(state=state)).client
    answer(found, as_json, facts(_standing(found)))


@app.command()
def pause(ctx: typer.Context, client: Which, as_json: AsJson = False) -> None:
    """Give the client no more work until it is reinstated."""
    _set(ctx, client, ClientState.paused, as_json)


@app.command()
def reinstate(ctx: typer.Context, client: Which, as_json: AsJson = False) -> None:
    """Give a paused client work again and forget its rejections."""
    _set(ctx, client, ClientState.active, as_json)


@app.command()
def revoke(ctx: typer.Context, client: Which, as_json: AsJson = False) -> None:
    """Void the client's credential for good; the machine must enrol anew, under another name."""
    _set(ctx, client, ClientState.revoked, as_json)


@app.command()
def rotate(ctx: typer.Context, client: Which, as_json: AsJson = False) -> None:
    """Issue a new credential and void the old one. The new one is printed, this once."""
    with connect(ctx) as connection:
        made = connection.change_client(client_id(connection, client), ClientChange(rotate=True))
    if not as_json:
        typer.echo(f"the new credential of {made.client.name}; put it into the machine's credential.json:", err=True)
    answer(made, as_json, made.credential or "")
