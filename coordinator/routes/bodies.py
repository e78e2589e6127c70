"""What is read of a JSON body: little before its sender is known, no more than an honest one has, and not for ever.

It is counted before it is checked: checking makes a mistake of each wrong entry, and would tell of a million when one says as much.

A framework reads the body first and asks for the credential then. Routes of this kind ask first where the body is long, or may be.
What has no JSON body is left as it is: of most requests nothing is read, and slices have bounds of their own, which depend on the job.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import Message, Receive

from coordinator.routes.requests import Bearer, parts
from coordinator.settings import Settings
from protocol import errors
from protocol.messages import Enrol, Profile
from protocol.plan import Plan


@dataclass(frozen=True)
class Bounds:
    """How much an honest message of a kind has at most."""

    bytes: int
    entries: int  # names and items, at any depth


MESSAGE = Bounds(1 << 16, 1 << 10)  # a result with all its metrics has a fifth of both
# A profile may hold 64 KiB of text, and as much again goes into the quotes, names and numbers around it.
PROFILE = Bounds(1 << 18, 1 << 13)
PLANS_ENTRIES = 1 << 17  # the 20,000 modules that a layout may have are half of it


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
            # A short one costs nothing: it is read at once, and counts also where its sender, who is done, has gone meanwhile.
            for door in () if _announced(request) <= MESSAGE.bytes else doors:
                await door.before_the_body(request)
            return await handle(_Bounded(request, bounds(kind, settings), settings.stall_seconds))

        return bounded


def bounds(kind: object, settings: Settings) -> Bounds:
    """Of messages of this kind."""
    if kind is Plan:
        return Bounds(settings.json_limit_bytes, PLANS_ENTRIES)
    return PROFILE if kind in (Profile, Enrol) else MESSAGE


class _Bounded(Request):
    """A request whose body is read within bounds. Raises TooLarge, StalledBody."""

    def __init__(self, request: Request, bounds: Bounds, stall: float) -> None:
        super().__init__(request.scope, _coming(request, bounds.bytes, stall))
        self._most = bounds.entries

    async def json(self) -> object:
        found: object = await super().json()
        if _count(found, self._most) > self._most:
            raise errors.TooLarge(f"the body has more than {self._most} names and items; this route takes no more", most=self._most)
        return found


def _count(found: object, most: int) -> int:
    """How many names and items there are in it, at any depth; it may stop as soon as there are more than so many."""
    count, unseen = 0, [found]
    while unseen and count <= most:
        each = unseen.pop()
        if isinstance(each, dict | list):
            count += len(each)
            unseen.extend(each.values() if isinstance(each, dict) else each)
    return count


def _announced(request: Request) -> float:
    """The body's length, or infinity where none is told."""
    told = request.headers.get("content-length", "")
    return float(told[:20]) if told.isascii() and told.isdecimal() else math.inf


def _coming(request: Request, limit: int, stall: float) -> Receive:
    """The body's pieces. Raises TooLarge as soon as more comes, or is announced, than may; StalledBody where none comes."""
    announced = _announced(request)
    if limit < announced < math.inf:
        raise errors.TooLarge(f"the body is announced with {announced:.0f} bytes; this route takes {limit}", largest=limit)
    came, now = 0, asyncio.get_running_loop().time
    last = now() + (2 * stall if announced <= MESSAGE.bytes else math.inf)  # nobody knows yet whose a short one is

    async def piece() -> Message:
        nonlocal came
        try:
            async with asyncio.timeout_at(min(last, now() + stall)):
                message = await request.receive()
        except TimeoutError:
            raise errors.StalledBody(f"no byte came for {stall:g} seconds, or few, after {came}; send all of it again") from None
        came += len(message.get("body", b""))
        if came > limit:
            raise errors.TooLarge(f"more than {limit} bytes came; this route takes no more", largest=limit)
        return message

    return piece
