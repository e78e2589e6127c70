"""What all commands share: where they connect to, how they answer as JSON or in words, and how a refusal is told."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, SecretStr, ValidationError
from rich.console import Console, RenderableType
from rich.table import Table
from typer.core import TyperGroup

from admin.client import Client
from admin.settings import Settings
from admin.words import json_text, printable
from protocol import errors
from protocol.strict import mistakes

M = TypeVar("M", bound=BaseModel)
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


class Commands(TyperGroup):
    """The outermost group: a refusal of whatever kind is one line on stderr and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except errors.HLoRAError as error:
            typer.echo(f"error: {printable(' '.join(str(error).split()))}", err=True)
            raise typer.Exit(1) from None


def group(help: str) -> typer.Typer:
    """A group of commands."""
    return typer.Typer(help=help, no_args_is_help=True)


def configure(ctx: typer.Context, url: str | None, token: str | None) -> None:
    """Keep for the command what the environment says, with the options over it. Raises InvalidRequest for a wrong variable."""
    try:
        settings = Settings()
    except ValidationError as error:
        first = error.errors()[0]
        raise errors.InvalidRequest(f"HLORA_{str(first['loc'][0]).upper()}: {first['msg']}") from None
    chosen = {"url": url, "token": SecretStr(token) if token else None}
    ctx.obj = settings.model_copy(update={name: value for name, value in chosen.items() if value is not None})


def connect(ctx: typer.Context) -> Client:
    """The coordinator that the command is for. Raises Unauthenticated where nobody said who asks."""
    settings: Settings = ctx.obj
    if settings.token is None:
        raise errors.Unauthenticated(
            "no token is set; put an operator's token into HLORA_TOKEN (the first one is made by `python -m coordinator token NAME`)"
        )
    return Client(settings.url, settings.token, insecure=settings.insecure, ca_file=settings.ca_file)


def connect_openly(ctx: typer.Context) -> Client:
    """The coordinator, for what it tells everybody."""
    settings: Settings = ctx.obj
    return Client(settings.url, None, insecure=True, ca_file=settings.ca_file)


def asked(kind: type[M], **said: object) -> M:
    """A request of what was said on the command line. Raises InvalidRequest where it cannot be asked for."""
    try:
        return kind.model_validate(said)
    except ValidationError as error:
        raise errors.InvalidRequest("; ".join(mistakes(error, kind))) from None


def console() -> Console:
    """Where words go: as wide as the terminal, or wide enough for tables where there is none."""
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)


def answer(value: BaseModel | Sequence[BaseModel], as_json: bool, words: RenderableType) -> None:
    """Print a command's result: an object or a list as JSON, or its words."""
    if as_json:
        plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else [item.model_dump(mode="json") for item in value]
        typer.echo(json_text(json.dumps(plain, indent=2, ensure_ascii=False)))
    else:
        console().print("\n".join(map(printable, words.split("\n"))) if isinstance(words, str) else words)


def table(*columns: str, rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> Table:
    """A plain table; what does not fit is folded and never cut off."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(printable(column), justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(printable, row))
    return made


def facts(pairs: Iterable[tuple[str, str]]) -> Table:
    """Names and values, one pair a line; pairs without a value are left out."""
    made = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    made.add_column(style="bold")
    made.add_column(overflow="fold")
    for name, value in pairs:
        if value:
            made.add_row(printable(name), printable(value))
    return made
