"""Contributions that were set apart: who sent them, why they do not count, and their bytes."""

from __future__ import annotations

import hashlib
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from admin import words
from admin.client import Client
from admin.command import AsJson, answer, connect, facts, group, table
from admin.naming import WHOLE_ID, client_id, find, run_id
from protocol import errors
from protocol.views import QuarantineView

app = group("Look at contributions that were rejected, or are suspicious.")
Apart = Annotated[str, typer.Argument(metavar="CONTRIBUTION", help="id, or beginning of an id")]


@app.command("list")
def list_(
    ctx: typer.Context,
    run: Annotated[str | None, typer.Option(metavar="RUN", help="only of this run")] = None,
    client: Annotated[str | None, typer.Option(metavar="CLIENT", help="only of this client")] = None,
    as_json: AsJson = False,
) -> None:
    """What was set apart, newest first."""
    with connect(ctx) as connection:
        of_run = None if run is None else run_id(connection, run)
        of_client = None if client is None else client_id(connection, client)
        found = list(connection.quarantine(of_run, of_client))
    rows = [
        (
            one.id,
            words.moment(one.at),
            one.client_name,
            str(one.round),
            one.problem,
            words.size(one.slice.bytes) if one.slice else "",
            one.reason,
        )
        for one in found
    ]
    answer(found, as_json, table("contribution", "at", "client", "round", "problem", "kept", "reason", rows=rows, right=["round", "kept"]))


@app.command()
def show(ctx: typer.Context, contribution: Apart, as_json: AsJson = False) -> None:
    """One contribution that was set apart, and why."""
    with connect(ctx) as client:
        found = client.quarantined(_id(client, contribution))
    answer(found, as_json, facts(_told(found)))


@app.command()
def pull(
    ctx: typer.Context,
    contribution: Apart,
    out: Annotated[Path, typer.Option(metavar="FILE", help="file to write to; one that is there is replaced")],
    as_json: AsJson = False,
) -> None:
    """Fetch its bytes as they came. Open them as one opens a stranger's file: nothing of them was found good."""
    with connect(ctx) as client:
        found = client.quarantined(_id(client, contribution))
        _write(client, found, out)
    answer(found, as_json, f"{out}  {words.size(out.stat().st_size)}")


@app.command()
def delete(ctx: typer.Context, contribution: Apart, as_json: AsJson = False) -> None:
    """Forget one, with its bytes; its job keeps the reason."""
    with connect(ctx) as client:
        found = client.quarantined(_id(client, contribution))
        client.delete_quarantined(found.id)
    answer(found, as_json, f"{found.id} is deleted")


def _id(client: Client, text: str) -> str:
    return text if WHOLE_ID.fullmatch(text) else find("contribution", text, client.quarantine()).id


def _told(found: QuarantineView) -> list[tuple[str, str]]:
    return [
        ("contribution", found.id),
        ("at", words.moment(found.at)),
        ("client", f"{found.client}  {found.client_name}"),
        ("run", f"{found.run}, round {found.round}"),
        ("job", found.job),
        ("problem", found.problem),
        ("reason", found.reason),
        ("kept", f"{words.size(found.slice.bytes)}, {found.slice.digest}" if found.slice else "no bytes"),
    ]


def _write(client: Client, found: QuarantineView, file: Path) -> None:
    """Raises InvalidRequest where the file cannot be written, DigestMismatch where other bytes came than were set apart."""
    hashed = hashlib.sha256()
    try:
        # Asked for before the file is touched: a refusal leaves what was there.
        pieces = client.quarantined_slice(found.id)
        first = next(pieces, b"")
        with file.open("wb") as stream:
            for piece in chain([first], pieces):
                hashed.update(piece)
                stream.write(piece)
    except OSError as error:
        raise errors.InvalidRequest(f"{file} cannot be written: {error.strerror}") from None
    if found.slice is not None and f"sha256:{hashed.hexdigest()}" != found.slice.digest:
        raise errors.DigestMismatch(f"other bytes came than were set apart; {file} holds them, fetch them again")
