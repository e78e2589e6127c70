"""Who this agent is to its coordinator, kept in one file that only its owner may read."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from pydantic import ValidationError

from protocol import errors
from protocol.strict import Strict

FILE = "credential.json"
ASKED = "enrolling.json"


class Identity(Strict):
    """What enrolment gave."""

    url: str
    id: str
    name: str
    credential: str


class _Asked(Strict):
    """An enrolment that was asked for."""

    url: str
    name: str
    key: str


def load(home: Path) -> Identity:
    """The identity in a home folder. Raises Unauthenticated if there is none, or none that can be read."""
    try:
        return Identity.model_validate_json((home / FILE).read_bytes())
    except FileNotFoundError:
        raise errors.Unauthenticated(f"there is no {FILE} in {home}; enrol first: python -m agent enrol URL --name NAME") from None
    except (OSError, ValidationError) as error:
        raise errors.Unauthenticated(
            f"{home / FILE} cannot be read ({type(error).__name__}); mend it, or enrol under another name"
        ) from None


def key(home: Path, url: str, name: str) -> str:
    """The credential with which this home asks to become that client: the same however often it asks, for an answer may be lost.

    Raises InvalidRequest where the home cannot be written to: before anything is asked for.
    """
    try:
        before = _Asked.model_validate_json((home / ASKED).read_bytes())
        if (before.url, before.name) == (url, name):
            return before.key
    except (OSError, ValidationError):
        pass  # nobody asked, or nothing of it is left
    asked = _Asked(url=url, name=name, key=f"hlc_{secrets.token_urlsafe(32)}")
    _write(home / ASKED, asked)
    return asked.key


def save(identity: Identity, home: Path) -> None:
    """Write the identity so that it is whole at every instant and readable by its owner only. Raises InvalidRequest."""
    _write(home / FILE, identity)
    (home / ASKED).unlink(missing_ok=True)


def _write(path: Path, content: Strict) -> None:
    new = path.with_suffix(".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(content.model_dump_json(indent=2))
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        raise errors.InvalidRequest(
            f"{path} cannot be written ({error.strerror}): name another home folder by --home or HLORA_AGENT_HOME, or mend its permissions"
        ) from None
