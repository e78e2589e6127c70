"""Coordinators as processes of their own, started in a tenth of a second: each is forked from a process that has imported all.

Service        one coordinator, which may be away, at one address
Persistent     a transport that repeats every request until it is answered, as an agent does
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from threading import Lock

import httpx

_forks = multiprocessing.get_context("forkserver")
_parts = ("__main__", "app", "server", "schema", "aggregation.delta", "ranks.fixed")
_forks.set_forkserver_preload([*(f"coordinator.{part}" for part in _parts), __name__])
# Any start looks after all processes, and of two threads that ask after one only the first is told how it ended.
_bookkeeping = Lock()


def _command(arguments: Sequence[str], settings: dict[str, str], log: str) -> None:
    """What `python -m coordinator` does, in a process that exists for it."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, sys.stdout.fileno())
    os.dup2(out, sys.stderr.fileno())
    os.environ.update(settings)
    sys.argv = ["coordinator", *arguments]
    from coordinator.__main__ import main

    main()


@dataclass
class Service:
    """One coordinator, which may be away, at one address."""

    name: str
    folder: Path
    settings: dict[str, str]  # without their prefix
    port: int = 0
    deaths: int = 0
    _process: ForkServerProcess | None = field(default=None, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    def said(self) -> str:
        """The log of the last start."""
        log = self.folder / f"{self.name}.log"
        return log.read_text() if log.exists() else ""

    def start(self, **settings: str) -> None:
        """Start, and return when it listens or has died; `settings` are for this start only."""
        log = self.folder / f"{self.name}.log"
        log.unlink(missing_ok=True)
        environment = {f"HLORA_COORDINATOR_{name.upper()}": value for name, value in (self.settings | settings).items()}
        arguments = ["serve", "--port", str(self.port)]
        self._process = _forks.Process(target=_command, args=(arguments, environment, str(log)), daemon=True)
        with _bookkeeping:
            self._process.start()
        self._until(lambda: self._address() is not None or not self.alive)
        self.port = self._address() or self.port

    def _address(self) -> int | None:
        found = re.search(r"http://127\.0\.0\.1:(\d+)", self.said())
        return None if found is None else int(found[1])

    def _until(self, true: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not true():
            assert time.monotonic() < end, self.said()
            time.sleep(0.005)

    @property
    def alive(self) -> bool:
        return self._process is not None and self._exit_code() is None

    def _exit_code(self) -> int | None:
        assert self._process is not None
        with _bookkeeping:
            return self._process.exitcode

    def end(self, how: signal.Signals = signal.SIGKILL) -> int | None:
        """Send it a signal if it lives; gives the exit code."""
        assert self._process is not None
        if self.alive and self._process.pid is not None:
            os.kill(self._process.pid, how)
        self._until(lambda: not self.alive)
        return self._exit_code()

    def revive(self) -> None:
        """Start it again if it was killed, however many notice."""
        with self._lock:
            if not self.alive:
                assert self.end() == -signal.SIGKILL, self.said()
                self.deaths += 1
                self.start()


class Persistent(httpx.AsyncBaseTransport):
    """Sends each request to the service that `choose` names, and repeats it until one has answered in full.

    `lost` is called with a service that did not.
    """

    def __init__(self, choose: Callable[[], Service], lost: Callable[[Service], object]) -> None:
        self._choose, self._lost = choose, lost
        self._inner = httpx.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        while True:
            service = self._choose()
            request.url = request.url.copy_with(port=service.port)
            try:
                response = await self._inner.handle_async_request(request)
                await response.aread()
            except httpx.TransportError:
                await asyncio.to_thread(self._lost, service)
            else:
                return response

    async def aclose(self) -> None:
        await self._inner.aclose()
