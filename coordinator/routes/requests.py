"""What the routes share in reading a request: the caller behind its credential, and the coordinator's parts."""

from __future__ import annotations

import re
import time
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
FRESH = 1.0  # seconds for which it is known who called; a body may take longer, and its sender be revoked meanwhile


def parts(request: Request) -> Context:
    """The coordinator's parts."""
    found = request.app.state.context
    assert isinstance(found, Context)
    return found


async def context(request: Request) -> Context:
    """The coordinator's parts, put on the application when it was made: no lifespan is needed to find them."""
    return parts(request)


Parts = Annotated[Context, Depends(context)]


@dataclass(frozen=True)
class Visitor:
    """A client that asks."""

    client: str
    work: bool  # there may be a job for it
    rings: int  # of the bell before this was looked up
    job: Planned | None = None  # that the path names, if it was looked up at once


class Bearer(HTTPBearer):
    """Who sends a request, by its credential, and nobody else's: one step of FastAPI's instead of one for each question."""

    def __init__(self) -> None:
        about = "admin or viewer token, enrolment token, or client credential"
        super().__init__(scheme_name="HTTPBearer", description=about, auto_error=False)

    async def __call__(self, request: Request) -> Caller | Visitor:  # type: ignore[override]  # what it finds is what a route wants
        """Raises Unauthenticated, Forbidden. The look-up blocks no event loop."""
        known: _Known | None = getattr(request.state, "known", None)
        if known is not None and known.door is self and time.monotonic() - known.at <= FRESH:
            return known.caller
        return await self._look(request)

    async def before_the_body(self, request: Request) -> None:
        """Look now, for the route that asks when the body is read. Raises Unauthenticated, Forbidden."""
        at = time.monotonic()
        request.state.known = _Known(self, await self._look(request), at)

    async def _look(self, request: Request) -> Caller | Visitor:
        raise NotImplementedError

    async def _secret(self, request: Request) -> str | None:
        """The secret that came, not looked up yet."""
        found = await super().__call__(request)
        return found.credentials if found else None


@dataclass(frozen=True)
class _Known:
    """Who called, and who said so when."""

    door: Bearer
    caller: Caller | Visitor
    at: float  # of the monotonic clock


class Only(Bearer):
    """Lets these kinds of credentials pass."""

    def __init__(self, *kinds: Kind) -> None:
        super().__init__()
        self._kinds = kinds

    async def _look(self, request: Request) -> Caller:
        return await run_in_threadpool(_identified, parts(request), await self._secret(request), self._kinds)


class Clients(Bearer):
    """Lets clients pass; those who ask at the same moment are looked up together, with the jobs of their paths where it is wanted."""

    def __init__(self, *, job: bool = False) -> None:
        super().__init__()
        self._job = job

    async def _look(self, request: Request) -> Visitor:
        context, secret = parts(request), await self._secret(request)
        rings = context.bell.rings
        named = request.path_params["job"] if self._job else ""
        # What comes before the path was checked must not spoil the look of others.
        job = named if re.fullmatch(ID, named) else None
        found = await context.desk.look(access.digest(secret), job) if secret else None
        if found is not None:
            return Visitor(found.client, found.work, rings, found.job)
        # That says why not; or it has become a client at this moment.
        caller = await run_in_threadpool(_identified, context, secret, (Kind.client,))
        return Visitor(caller.id, work=False, rings=rings)


def _identified(context: Context, secret: str | None, kinds: Collection[Kind]) -> Caller:
    with context.database.read() as session:
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
READ = (*COMMON, errors.TooLarge, errors.StalledBody)  # of routes that take JSON
