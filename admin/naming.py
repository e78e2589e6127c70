"""Which run, client, enrolment or token an operator means: its id, the beginning of its id, or its name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Protocol, TypeVar

import typer

from admin import words
from admin.client import Client
from protocol import errors
from protocol.views import RunView

Run = Annotated[str, typer.Argument(metavar="RUN", help="id, beginning of an id, or name")]
Which = Annotated[str, typer.Argument(metavar="CLIENT", help="id, beginning of an id, or name")]
WHOLE_ID = re.compile(r"[a-z]+-[0-9a-f]{16}")


class Identified(Protocol):
    """What has an id."""

    @property
    def id(self) -> str: ...


Thing = TypeVar("Thing", bound=Identified)


def find(
    noun: str,
    text: str,
    things: Iterable[Thing],
    name: Callable[[Thing], str] = lambda _: "",
    about: Callable[[Thing], str] = lambda _: "",
) -> Thing:
    """The one thing that is meant. Raises NotFound if there is none, InvalidRequest if there are several.

    about: what tells one thing from another of the same name, beside its id.
    """
    known = list(things)
    for found in (
        [thing for thing in known if thing.id == text],
        [thing for thing in known if name(thing) == text],
        [thing for thing in known if text and (thing.id.startswith(text) or thing.id.partition("-")[2].startswith(text))],
    ):
        if len(found) == 1:
            return found[0]
        if found:
            raise errors.InvalidRequest(f"{len(found)} {noun}s are called {text!r}; say which by its id: {_ids(found, about)}")
    raise errors.NotFound(f"there is no {noun} {text!r}; there are {_names(known, name) or 'none'}")


def run_id(client: Client, text: str) -> str:
    """The id of the run that is meant."""
    return text if WHOLE_ID.fullmatch(text) else find("run", text, client.runs(), lambda run: run.name, _standing).id


def _standing(run: RunView) -> str:
    return f" ({run.state}, made {words.moment(run.created_at)})"


def client_id(client: Client, text: str) -> str:
    """The id of the client that is meant."""
    return text if WHOLE_ID.fullmatch(text) else find("client", text, client.clients(), lambda found: found.name).id


def _ids(things: Sequence[Thing], about: Callable[[Thing], str]) -> str:
    return ", ".join(thing.id + about(thing) for thing in things[:5]) + (", …" if len(things) > 5 else "")


def _names(things: Sequence[Thing], name: Callable[[Thing], str]) -> str:
    return ", ".join(name(thing) or thing.id for thing in things[:5]) + (", …" if len(things) > 5 else "")
