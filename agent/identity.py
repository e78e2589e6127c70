"""Who this agent is to its coordinator, kept in one file that only its owner may read."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import ValidationError

from protocol import errors
from protocol.strict import Strict

FILE = "credential.json"


class Identity(Strict):
    """What enrolment gave."""

    url: str
    id: str
    name: str
    credential: str


def load(home: Path) -> Identity:
    """The identity in a home folder. Raises Unauthenticated if there is none, or none that can be read."""
    try:
        return Identity.model_validate_json((home / FILE).read_bytes())
    except FileNotFoundError:
        raise errors.Unauthenticated(f"there is no {FILE} in {home}; enrol first: python -m agent enrol URL --name NAME") from None
    except (OSError, ValidationError) as error:
        raise errors.Unauthenticated(f"{home / FILE} cannot be read ({type(error).__name__}); mend it or enrol again") from None


def save(identity: Identity, home: Path) -> None:
    """Write the identity so that it is whole at every instant and readable by its owner only."""
    home.mkdir(parents=True, exist_ok=True)
    new = home / f"{FILE}.new"
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(identity.model_dump_json(indent=2))
    new.replace(home / FILE)
