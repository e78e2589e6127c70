"""What the routes share in reading a request: the caller behind its credential, and the coordinator's parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import Depends, Path, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from coordinator import access
from coordinator.access import Caller, Kind
from coordinator.context import Context
from protocol import errors

bearer = HTTPBearer(auto_error=False, description="admin or viewer token, enrolment token, or client credential")


async def context(request: Request) -> Context:
    """The coordinator's parts, put on the application when it was made: no lifespan is needed to find them, and, `async`, no thread."""
    found = request.app.state.context
    assert isinstance(found, Context)
    return found


Parts = Annotated[Context, Depends(context)]


async def secret(credential: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> str | None:
    """The secret that came, not looked up yet."""
    return credential.credentials if credential else None


Secret = Annotated[str | None, Depends(secret)]


def only(*kinds: Kind) -> Callable[..., Caller]:
    """A dependency that lets these kinds of credentials pass; plain `def`, so that the look-up blocks no event loop."""

    def caller(parts: Parts, secret: Secret) -> Caller:
        with parts.database.read() as session:
            return access.identify(session, secret, kinds)

    return caller


Device = Annotated[Caller, Depends(only(Kind.client))]
Newcomer = Annotated[Caller, Depends(only(Kind.enrolment))]
READERS = [Depends(only(Kind.admin, Kind.viewer))]
ADMINS = [Depends(only(Kind.admin))]

Id = Annotated[str, Path(pattern=r"^[a-z]+-[0-9a-f]{16}$", description="as the coordinator gave it out")]
Number = Annotated[int, Path(ge=0, le=10**6)]
Limit = Annotated[int, Query(ge=1, le=500, description="rows per page")]
Cursor = Annotated[str | None, Query(max_length=300, description="`next` of the page before")]

KNOWN = (errors.Unauthenticated, errors.Forbidden)
COMMON = (*KNOWN, errors.InvalidRequest)
