"""The link that fails on purpose fails as it is told, at the byte that it is told, and counts it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from benchmarks.proxy import Fate, Fault, Link, Misfortune

TEXT = bytes(range(256)) * 300


@dataclass
class Echo:
    """A server that keeps what comes, and sends it back when its first direction has ended."""

    came: bytearray = field(default_factory=bytearray)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    lost: bool = False
    port: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while block := await reader.read(1000):
                self.came += block
                self.begun.set()
            writer.write(self.came)
            await writer.drain()
        except ConnectionResetError:
            self.lost = True
        finally:
            writer.close()
            self.ended.set()


@asynccontextmanager
async def echo() -> AsyncIterator[Echo]:
    found = Echo()
    server = await asyncio.start_server(found.serve, "127.0.0.1", 0)
    found.port = server.sockets[0].getsockname()[1]
    try:
        yield found
    finally:
        server.close()


async def heard(link: Link, said: bytes) -> bytes:
    """What comes back to somebody who says that and no more. Raises ConnectionResetError."""
    reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
    try:
        writer.write(said)
        writer.write_eof()
        return await reader.read()
    finally:
        writer.close()


def always(*misfortune: object) -> Callable[[], Misfortune]:
    return lambda: Misfortune(*misfortune)  # type: ignore[arg-type]  # the test's own order


async def test_a_link_without_misfortune_passes_everything_both_ways() -> None:
    async with echo() as server, Link([("127.0.0.1", server.port)], lambda: None) as link:
        assert await heard(link, TEXT) == TEXT
        assert await heard(link, b"") == TEXT
        assert (link.connections, link.struck.total()) == (2, 0)


@pytest.mark.parametrize("after", [0, 1, 999, 50_000])
async def test_what_is_sent_ends_at_the_byte_where_it_is_cut(after: int) -> None:
    async with echo() as server, Link([("127.0.0.1", server.port)], always(Fault.cut, True, after)) as link:
        assert await heard(link, TEXT) == b""
        await server.ended.wait()
        assert server.came == TEXT[:after]
        assert link.struck == {Fault.cut: 1}


@pytest.mark.parametrize("after", [0, 1, 50_000])
async def test_the_answer_ends_at_the_byte_where_it_is_cut(after: int) -> None:
    async with echo() as server, Link([("127.0.0.1", server.port)], always(Fault.cut, False, after)) as link:
        assert await heard(link, TEXT) == TEXT[:after]
        assert server.came == TEXT
        assert link.struck == {Fault.cut: 1}


async def test_a_misfortune_beyond_the_last_byte_does_not_happen() -> None:
    async with echo() as server, Link([("127.0.0.1", server.port)], always(Fault.cut, True, len(TEXT))) as link:
        assert await heard(link, TEXT) == TEXT
        assert link.struck.total() == 0


async def test_both_ends_get_a_reset() -> None:
    async with echo() as server, Link([("127.0.0.1", server.port)], always(Fault.reset, True, 100)) as link:
        with pytest.raises(ConnectionResetError):
            await heard(link, TEXT)
        await server.ended.wait()
        assert server.lost
        assert link.struck == {Fault.reset: 1}


async def test_a_half_closed_connection_still_answers() -> None:
    async with echo() as server, Link([("127.0.0.1", server.port)], always(Fault.half_close, True, 100)) as link:
        assert await heard(link, TEXT) == TEXT[:100]
        assert link.struck == {Fault.half_close: 1}


async def test_nothing_passes_a_stall_until_it_is_over() -> None:
    over, asked = asyncio.Event(), asyncio.Event()

    async def sleep(seconds: float) -> None:
        assert seconds == 7.0
        asked.set()
        await over.wait()

    async with echo() as server, Link([("127.0.0.1", server.port)], always(Fault.stall, True, 10, 7.0), sleep=sleep) as link:
        call = asyncio.create_task(heard(link, TEXT))
        await asked.wait()
        assert len(server.came) <= 10
        over.set()
        assert await call == TEXT
        assert link.struck == {Fault.stall: 1}


@pytest.mark.parametrize(
    ("misfortune", "slept"),
    [
        (Misfortune(Fault.delay, True, 1, seconds=0.5), lambda naps: set(naps) == {0.5}),
        (Misfortune(Fault.throttle, True, 0, bytes_per_second=1000), lambda naps: sum(naps) == pytest.approx(len(TEXT) / 1000)),
    ],
    ids=["delay", "throttle"],
)
async def test_a_slow_link_loses_nothing(misfortune: Misfortune, slept: Callable[[list[float]], bool]) -> None:
    naps: list[float] = []

    async def sleep(seconds: float) -> None:
        naps.append(seconds)

    async with echo() as server, Link([("127.0.0.1", server.port)], lambda: misfortune, sleep=sleep) as link:
        assert await heard(link, TEXT) == TEXT
        assert slept(naps)
        assert link.struck == {misfortune.fault: 1}


async def test_nobody_behind_the_link_is_an_end_at_once() -> None:
    async with echo() as server:
        pass
    async with Link([("127.0.0.1", server.port)], lambda: None) as link:
        assert await heard(link, b"") == b""


async def test_every_server_behind_the_link_is_used() -> None:
    async with echo() as one, echo() as two, Link([("127.0.0.1", one.port), ("127.0.0.1", two.port)], lambda: None) as link:
        for _ in range(12):
            await heard(link, b"word")
        assert one.came
        assert two.came


async def test_a_link_that_is_closed_closes_its_connections() -> None:
    async with echo() as server, Link([("127.0.0.1", server.port)], lambda: None) as link:
        reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
        writer.write(b"half a word")
        await writer.drain()
        await server.begun.wait()
    assert await reader.read() == b""
    writer.close()


def test_the_same_seed_draws_the_same_misfortunes_and_in_time_all_of_them() -> None:
    one, two = (Fate(random.Random(3), share=0.5) for _ in range(2))
    drawn = [one() for _ in range(300)]
    assert [two() for _ in range(300)] == drawn
    unhappy = [misfortune for misfortune in drawn if misfortune is not None]
    assert 100 < len(unhappy) < 200
    assert {(misfortune.fault, misfortune.upward) for misfortune in unhappy} == {(fault, up) for fault in Fault for up in (True, False)}
    assert all(0 <= misfortune.after < 1 << 20 for misfortune in unhappy)
