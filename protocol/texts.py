"""What a text may be that is told to others and kept in a database: of whole characters, none of them NUL, and within bounds.

JSON can write half a character (a lone surrogate), which UTF-8 cannot: whoever is told it could not be answered any more. A text
with a bound on its length is refused where it holds one; a bare `str` is not, and `odd` finds it. PostgreSQL keeps no NUL.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

ODD = re.compile("[\\0\ud800-\udfff]")
REASON = "it holds the character NUL or half a character, which no database keeps"


def _storable(text: str) -> str:
    if ODD.search(text):
        raise ValueError(REASON)
    return text


def _tellable(text: object) -> object:
    return text.encode(errors="replace").decode() if isinstance(text, str) else text


Storable = AfterValidator(_storable)  # not of what is read again from a database: an older version may have taken it
LONGEST = 4096  # characters of a text in a plan
Told = Annotated[str, BeforeValidator(_tellable)]  # of a database that an older version wrote: a half character is shown as ?
Key = Annotated[str, Field(min_length=1, max_length=64), Storable]
Value = Annotated[str, Field(max_length=256), Storable]
Labels = Annotated[dict[Key, Value], Field(max_length=64)]  # of a client


def odd(value: object, place: str = "") -> str | None:
    """Where a text is that cannot be told or kept, and why; none where all can. Names in tables are texts too.

    value: what JSON's values are made of.
    """
    match value:
        case str():
            long = f"it has {len(value):,} characters, and may have {LONGEST}" if len(value) > LONGEST else None
            why = REASON if ODD.search(value) else long
            return why and f"{place}: {why}"
        case dict():
            parts = [(f"{place}.{ascii(name)[1:-1][:200]}".lstrip("."), name, part) for name, part in value.items()]
            return next((found for where, name, part in parts if (found := odd(name, where) or odd(part, where)) is not None), None)
        case list() | tuple():
            return next((found for n, part in enumerate(value) if (found := odd(part, f"{place}.{n}")) is not None), None)
    return None
