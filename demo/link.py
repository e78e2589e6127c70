"""A slow link: what passes between an agent and the coordinator is held to so many bytes per second in each direction."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

BLOCK = 4096  # bytes passed on at a time


@contextmanager
def slow_link(host: str, port: int, bytes_per_second: int) -> Iterator[str]:
    """The address of a relay to the server there, for as long as the context lasts."""
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(_Relay(host, port, bytes_per_second).serve, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, name="slow link", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        loop.run_until_complete(_end(asyncio.all_tasks(loop)))
        loop.close()


async def _end(connections: Iterable[asyncio.Task[None]]) -> None:
    for connection in connections:
        connection.cancel()
    await asyncio.gather(*connections, return_exceptions=True)


class _Relay:
    """Passes bytes both ways; each direction has one budget for all its connections."""

    def __init__(self, host: str, port: int, bytes_per_second: int) -> None:
        self._where = host, port
        self._down, self._up = Pace(bytes_per_second), Pace(bytes_per_second)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until either side ends it."""
        try:
            there, back = await asyncio.open_connection(*self._where)
        except OSError:
            writer.close()
            return
        ways = [asyncio.create_task(_carry(reader, back, self._up)), asyncio.create_task(_carry(there, writer, self._down))]
        with suppress(asyncio.CancelledError):  # the link is closed; asyncio would log it as a failure of ours
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        await _end(ways)
        writer.close()
        back.close()


async def _carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter, pace: Pace) -> None:
    """Pass on what comes until the source ends."""
    with suppress(ConnectionError):
        while block := await source.read(BLOCK):
            await pace.wait_for(len(block))
            sink.write(block)
            await sink.drain()


class Pace:
    """Lets so many bytes pass in a second, over all that share it."""

    def __init__(
        self,
        bytes_per_second: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._speed, self._clock, self._sleep = bytes_per_second, clock, sleep
        self._free_at = 0.0

    async def wait_for(self, count: int) -> None:
        """Return when so many bytes have had their time on the link."""
        self._free_at = max(self._free_at, self._clock()) + count / self._speed
        await self._sleep(self._free_at - self._clock())
