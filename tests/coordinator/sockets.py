"""The application behind a real socket, in a thread of this process, its conductor running."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from coordinator.app import build, create_app
from coordinator.context import Context
from coordinator.settings import Settings


@dataclass(frozen=True)
class Address:
    """Where the application listens."""

    parts: Context
    server: uvicorn.Server
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        """A connection without any HTTP."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)


@contextmanager
def serving(database_url: str, folder: Path, poll_seconds: float = 20.0, stall_seconds: float = 300.0) -> Iterator[Address]:
    """A server that is stopped, as a signal would stop it, when the block ends."""
    settings = Settings(
        data=folder,
        database_url=database_url,
        executor="threads://1",
        tick_seconds=0.05,
        poll_seconds=poll_seconds,
        stall_seconds=stall_seconds,
    )
    parts = build(settings)
    config = uvicorn.Config(create_app(parts), port=0, log_level="error", access_log=False, timeout_graceful_shutdown=10)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield Address(parts, server, server.servers[0].sockets[0].getsockname()[1])
    finally:
        parts.bell.close()
        server.should_exit = True
        thread.join()
