"""What the routes share in reading a request: the caller behind its credential, and the coordinator's parts."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Path, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPBearer

from coordinator import access
from coordinator.access import Caller, Kind
from coordinator.context import Context
from coordinator.jobs import Planned
from protocol import errors

ID = r"^[a-z]+-[0-9a-f]{16}$"


def _parts(request: Request) -> Context:
    found = request.app.state.context
    assert isinstance(found, Context)
    return found


async def context(request: Request) -> Context:
    """The coordinator's parts, put on the application when it was made: no lifespan is needed to find them."""
    return _parts(request)


Parts = Annotated[Context, Depends(context)]


class Bearer(HTTPBearer):
    """Who sends a request, by its credential, and nobody else's: one step of FastAPI's instead of one for each question."""

    def __init__(self) -> None:
        about = "admin or viewer token, enrolment token, or client credential"
        super().__init__(scheme_name="HTTPBearer", description=about, auto_error=False)

    async def secret(self, request: Request) -> str | None:
        """The secret that came, not looked up yet."""
        found = await HTTPBearer.__call__(self, request)
        return found.credentials if found else None


class Only(Bearer):
    """Lets these kinds of credentials pass."""

    def __init__(self, *kinds: Kind) -> None:
        super().__init__()
        self._kinds = kinds

    async def __call__(self, request: Request) -> Caller:  # type: ignore[override]  # what it finds is what a route wants
        """Raises Unauthenticated, Forbidden. The look-up blocks no event loop."""
        return await run_in_threadpool(_identified, _parts(request), await self.secret(request), self._kinds)


@dataclass(frozen=True)
class Visitor:
    """A client that asks."""

    client: str
    work: bool  # there may be a job for it
    rings: int  # of the bell before this was looked up
    job: Planned | None = None  # that the path names, if it was looked up at once


class Clients(Bearer):
    """Lets clients pass; those who ask at the same moment are looked up together, with the jobs of their paths where it is wanted."""

    def __init__(self, *, job: bool = False) -> None:
        super().__init__()
        self._job = job

    async def __call__(self, request: Request) -> Visitor:  # type: ignore[override]  # what it finds is what a route wants
        """Raises Unauthenticated, Forbidden."""
        parts, secret = _parts(request), await self.secret(request)
        rings = parts.bell.rings
        named = request.path_params["job"] if self._job else ""
        # What comes before the path was checked must not spoil the look of others.
        job = named if re.fullmatch(ID, named) else None
        found = await parts.desk.look(access.digest(secret), job) if secret else None
        if found is not None:
            return Visitor(found.client, found.work, rings, found.job)
        # That says why not; or it has become a client at this moment.
        caller = await run_in_threadpool(_identified, parts, secret, (Kind.client,))
        return Visitor(caller.id, work=False, rings=rings)


def _identified(parts: Context, secret: str | None, kinds: Collection[Kind]) -> Caller:
    with parts.database.read() as session:
        return access.identify(session, secret, kinds)


Device = Annotated[Visitor, Depends(Clients())]
Bringer = Annotated[Visitor, Depends(Clients(job=True))]
Newcomer = Annotated[Caller, Depends(Only(Kind.enrolment))]
_READER = Depends(Only(Kind.admin, Kind.viewer))
Reader = Annotated[Caller, _READER]
READERS = [_READER]
ADMINS = [Depends(Only(Kind.admin))]

Id = Annotated[str, Path(pattern=ID, description="as the coordinator gave it out")]
Number = Annotated[int, Path(ge=0, le=10**6)]
Limit = Annotated[int, Query(ge=1, le=500, description="rows per page")]
Cursor = Annotated[str | None, Query(max_length=300, description="`next` of the page before")]

KNOWN = (errors.Unauthenticated, errors.Forbidden)
COMMON = (*KNOWN, errors.InvalidRequest)
