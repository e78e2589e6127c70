"""The coordinator on a port of this machine, and a bad way to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send


class _Server(uvicorn.Server):
    """Leaves signals to whoever runs the tests: as a fixture it begins and ends in two runs of the loop, and would keep the first's."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def served(app: ASGIApp) -> AsyncIterator[str]:
    """The application at an address of this machine."""
    server = _Server(uvicorn.Config(app, port=0, lifespan="off", log_level="critical"))
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110  # it has no event to wait for
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving


@dataclass
class Requests:
    """An application that knows how many requests it is busy with."""

    app: ASGIApp
    running: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.running += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.running -= 1


@dataclass
class Direction:
    """One way through the link: what it carried, and after how many bytes each connection is cut."""

    cuts: Iterator[int] = field(default_factory=lambda: iter(()))
    carried: int = 0

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, budget: int | None) -> None:
        """Carry bytes until one end closes, or so many have passed."""
        while budget is None or budget > 0:
            block = await reader.read(1 << 16 if budget is None else min(budget, 1 << 16))
            if not block:
                return
            writer.write(block)
            self.carried += len(block)
            budget = None if budget is None else budget - len(block)
            await writer.drain()


@dataclass
class Link:
    """A way to a port of this machine that is cut where its directions say; then both ends see the connection close."""

    port: int
    requests: Requests
    up: Direction = field(default_factory=Direction)
    down: Direction = field(default_factory=Direction)
    connections: int = 0
    ways: set[asyncio.Task[None]] = field(default_factory=set)

    async def settle(self, _: float) -> None:
        """Wait until what came before a cut has been stored: it has arrived, for the coordinator hears of a cut first."""
        while self.requests.running:  # noqa: ASYNC110  # no test waits for long
            await asyncio.sleep(0.01)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[str]:
        """The address at which the way begins."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            await asyncio.gather(*self.ways)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.ways.add(way := asyncio.create_task(self._through(reader, writer)))
        way.add_done_callback(self.ways.discard)

    async def _through(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.port)
        up = asyncio.create_task(self.up.carry(reader, back, next(self.up.cuts, None)))
        down = asyncio.create_task(self.down.carry(there, writer, next(self.down.cuts, None)))
        with suppress(ConnectionError):
            await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
        for task in (up, down):
            task.cancel()
        await asyncio.gather(up, down, return_exceptions=True)
        with suppress(ConnectionError):
            back.write_eof()
            while await there.read(1 << 16):  # until the coordinator has taken all that was carried, and closed its end
                pass
        for end in (back, writer):
            with suppress(ConnectionError):
                end.close()
                await end.wait_closed()


@asynccontextmanager
async def linked(app: ASGIApp) -> AsyncIterator[tuple[Link, str]]:
    """A bad way to the application, and its address."""
    requests = Requests(app)
    async with served(requests) as url:
        link = Link(int(url.rpartition(":")[2]), requests)
        async with link.open() as address:
            yield link, address
