"""A slow link: everything passes, unharmed, in its time."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest

from demo.link import Pace, slow_link


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what comes, until the other side says that it has no more."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_serve, args=(server,), daemon=True).start()
        yield server.getsockname()[1]


def _serve(server: socket.socket) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:  # the test is over
            return
        threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    with connection:
        while block := connection.recv(1000):
            connection.sendall(block)


def _open(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=30)


def test_bytes_arrive_as_they_were_sent_on_every_connection(echo: int) -> None:
    with slow_link("127.0.0.1", echo, 10**8) as url, _open(url) as one, _open(url) as two:
        for connection, sent in ((one, bytes(range(256)) * 200), (two, b"another" * 1000), (one, b"again")):
            connection.sendall(sent)
            came = b""
            while len(came) < len(sent):
                came += connection.recv(len(sent))
            assert came == sent


def test_the_end_of_the_link_ends_its_connections(echo: int) -> None:
    with slow_link("127.0.0.1", echo, 10**8) as url:
        connection = _open(url)
        connection.sendall(b"hello")
        assert connection.recv(5) == b"hello"
    with connection:
        assert connection.recv(1) == b""


def test_a_server_that_is_not_there_is_a_closed_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with slow_link("127.0.0.1", port, 10**8) as url, _open(url) as connection:
        assert connection.recv(1) == b""


class Time:
    """A clock that moves when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += max(0.0, seconds)


def test_bytes_take_their_time() -> None:
    time = Time()
    pace = Pace(1000, time.clock, time.sleep)

    async def send() -> None:
        for count in (500, 2000, 500):
            await pace.wait_for(count)

    asyncio.run(send())
    assert time.now == pytest.approx(103.0)


def test_a_rest_saves_up_nothing() -> None:
    time = Time()
    pace = Pace(1000, time.clock, time.sleep)
    asyncio.run(pace.wait_for(1000))
    time.now += 60
    asyncio.run(pace.wait_for(1000))
    assert time.now == pytest.approx(100 + 1 + 60 + 1)
