"""A link that fails on purpose: connections through it are cut at any byte, reset, held up, delayed, slowed or half closed.

What shall happen to a connection is drawn when it comes, by a seeded generator: the same seed draws the same misfortunes.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Self

BLOCK = 1 << 14  # bytes passed on at a time
Address = tuple[str, int]
Sleep = Callable[[float], Awaitable[None]]


class Fault(StrEnum):
    """What can go wrong with a connection."""

    cut = "cut"  # both ends see the end of the other, in the middle of whatever it was
    reset = "reset"  # both ends get a reset, and what was under way is lost
    half_close = "half_close"  # one direction ends, the other goes on
    stall = "stall"  # nothing comes for a while, then all goes on
    delay = "delay"  # every block is late
    throttle = "throttle"  # few bytes a second


@dataclass(frozen=True)
class Misfortune:
    """One fault, the direction that it strikes, and the byte at which it does."""

    fault: Fault
    upward: bool  # what the one who connected sends
    after: int  # bytes that pass in that direction before
    seconds: float = 0.0  # how long a stall or a delay is
    bytes_per_second: float = float("inf")  # what a throttle leaves


@dataclass
class Fate:
    """Draws what happens to each connection: nothing to most of them."""

    chance: random.Random
    share: float = 0.3  # of the connections that something happens to
    longest: int = 1 << 20  # bytes; the logarithm of the byte at which it happens is uniform up to this

    def __call__(self) -> Misfortune | None:
        """The misfortune of the next connection, if it has one."""
        unhappy, fault, upward = self.chance.random() < self.share, self.chance.choice(list(Fault)), self.chance.random() < 0.5
        after, seconds = int(self.longest ** self.chance.random()) - 1, self.chance.uniform(0.05, 3.0)
        late = seconds if fault is Fault.stall else seconds / 20
        return Misfortune(fault, upward, after, late, self.chance.uniform(2e5, 2e6)) if unhappy else None


@dataclass
class Link:
    """A relay to one of several servers, drawn for each connection; an asynchronous context."""

    servers: Sequence[Address]
    fate: Callable[[], Misfortune | None]
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    sleep: Sleep = asyncio.sleep
    struck: Counter[Fault] = field(default_factory=Counter)  # what happened, not what was drawn: many connections end before
    connections: int = 0
    port: int = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        self._open: set[asyncio.Task[None]] = set()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.close()
        for connection in self._open:
            connection.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    @property
    def url(self) -> str:
        """Where to connect."""
        return f"http://127.0.0.1:{self.port}"

    def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.ensure_future(self._relay(reader, writer))
        self._open.add(connection)
        connection.add_done_callback(self._open.discard)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until both directions have ended."""
        self.connections += 1
        misfortune, server = self.fate(), self.chance.choice(self.servers)
        ends = [writer]
        try:
            there, back = await asyncio.open_connection(*server)
            ends.append(back)
            up = _Way(reader, back, self, misfortune if misfortune and misfortune.upward else None, ends)
            down = _Way(there, writer, self, misfortune if misfortune and not misfortune.upward else None, ends)
            await asyncio.gather(up.carry(), down.carry())
        except OSError:  # nobody listens there, or one of them went away
            pass
        finally:
            for end in ends:
                end.close()


@dataclass
class _Way:
    """One direction of a connection."""

    source: asyncio.StreamReader
    sink: asyncio.StreamWriter
    link: Link
    misfortune: Misfortune | None
    ends: Sequence[asyncio.StreamWriter]

    async def carry(self) -> None:
        """Pass on what comes; at its byte the misfortune happens."""
        passed = 0
        late = self.misfortune
        while block := await self.source.read(BLOCK):
            if late is not None and passed + len(block) > late.after:
                await self._pass_on(block[: late.after - passed])
                block, passed, late = block[late.after - passed :], late.after, None
                if not await self._strike():
                    return
            passed += len(block)
            await self._wait(len(block), struck=late is None)
            await self._pass_on(block)
        with suppress(OSError):
            self.sink.write_eof()

    async def _pass_on(self, block: bytes) -> None:
        self.sink.write(block)
        await self.sink.drain()

    async def _wait(self, count: int, struck: bool) -> None:
        """What a delay or a throttle costs every block after it began."""
        if self.misfortune is None or not struck:
            return
        if self.misfortune.fault is Fault.delay:
            await self.link.sleep(self.misfortune.seconds)
        elif self.misfortune.fault is Fault.throttle:
            await self.link.sleep(count / self.misfortune.bytes_per_second)

    async def _strike(self) -> bool:
        """Let it happen; says whether this direction goes on."""
        assert self.misfortune is not None, "only a misfortune strikes"
        self.link.struck[self.misfortune.fault] += 1
        match self.misfortune.fault:
            case Fault.cut:
                for end in self.ends:
                    end.close()
            case Fault.reset:
                for end in self.ends:
                    _reset(end)
            case Fault.half_close:
                self.sink.write_eof()
                while await self.source.read(BLOCK):  # is sent, and never comes
                    pass
            case Fault.stall:
                await self.link.sleep(self.misfortune.seconds)
                return True
            case _:
                return True
        return False


def _reset(end: asyncio.StreamWriter) -> None:
    """End a connection with a reset instead of the usual goodbye."""
    end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.transport.abort()
