"""What every message is made of: its base class, and numbers and texts within bounds."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Seconds = Annotated[float, Field(gt=0, le=30 * 86_400, description="seconds")]
Share = Annotated[float, Field(gt=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]{0,63}$", description="1 to 64 letters, digits, . _ - or blank")]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$", description="sha256:<64 hexadecimal digits>")]


class Strict(BaseModel):
    """A frozen message that refuses what it does not know, and numbers that are none."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def mistakes(error: ValidationError, model: type[BaseModel], *, entries: int = 0) -> Iterator[str]:
    """What is wrong with what somebody wrote down, place by place; for a name that is unknown, the one that may have been meant.

    entries: how many names of the writer's own come before those of the model.
    """
    for found in error.errors():
        *above, name = found["loc"] or ("",)
        place = ".".join(map(str, found["loc"])) or "the whole"
        if found["type"] != "extra_forbidden":
            yield f"{place}: {found['msg'].removeprefix('Value error, ')}"
            continue
        known = _fields(model, above[entries:])
        alike = difflib.get_close_matches(str(name), known, n=1)
        yield f"{place} is unknown" + (f"; is {alike[0]} meant?" if alike else f"; there are {', '.join(known)}" if known else "")


def _fields(model: type[BaseModel], path: list[int | str]) -> list[str]:
    """The names that a table within a table may hold; none where that depends on what it is."""
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return []
        model = field.annotation
    return list(model.model_fields)
