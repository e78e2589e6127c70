"""What is read of a JSON body: nothing before its sender is known, no more than an honest one has, and not for ever.

A framework reads the body first and asks for the credential then. Routes of this kind ask first. What has no JSON body is left as it
is: of most requests nothing is read, and slices have bounds of their own, which depend on the job.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import Message, Receive

from coordinator.routes.requests import Bearer, parts
from coordinator.settings import Settings
from protocol import errors
from protocol.messages import Enrol, Profile
from protocol.plan import Plan

LONGEST = 1 << 16  # bytes; a result with all its metrics has a sixth of it
# A profile may hold 64 KiB of text, and as much again goes into the quotes, names and numbers around it.
LONGEST_OF: Mapping[object, int] = {Profile: 1 << 18, Enrol: 1 << 18}


class Bounded(APIRoute):
    """A route that knows its caller before it reads the body, and bounds the body's length and the waits for it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Handle a request whose body, if the route takes one, comes within bounds. Raises Unauthenticated, Forbidden, TooLarge."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        kind = self.body_field.field_info.annotation
        doors = [each.call for each in self.dependant.dependencies if isinstance(each.call, Bearer)]

        async def bounded(request: Request) -> Response:
            settings = parts(request).settings
            for door in doors:
                await door.before_the_body(request)
            return await handle(Request(request.scope, _coming(request, longest(kind, settings), settings.stall_seconds)))

        return bounded


def longest(kind: object, settings: Settings) -> int:
    """Bytes that a message of this kind may have as JSON."""
    return settings.json_limit_bytes if kind is Plan else LONGEST_OF.get(kind, LONGEST)


def _coming(request: Request, limit: int, stall: float) -> Receive:
    """The body's pieces. Raises TooLarge as soon as more comes, or is announced, than may; StalledBody where none comes."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise errors.TooLarge(f"the body is announced with {announced[:20]} bytes; this route takes {limit}", largest=limit)
    came = 0

    async def piece() -> Message:
        nonlocal came
        try:
            async with asyncio.timeout(stall):
                message = await request.receive()
        except TimeoutError:
            raise errors.StalledBody(f"no byte came for {stall:g} seconds, after {came}; send all of it again") from None
        came += len(message.get("body", b""))
        if came > limit:
            raise errors.TooLarge(f"more than {limit} bytes came; this route takes no more", largest=limit)
        return message

    return piece
