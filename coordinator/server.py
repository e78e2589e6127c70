"""The HTTP server around the application, and how it stops."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import socket
from collections.abc import Callable
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI

from coordinator.settings import Settings
from protocol import errors

log = structlog.get_logger()
M_ARENA_MAX, POOLS = -8, 2  # of glibc: how many pools of memory its threads share
GRACE = 30  # seconds that requests in flight may take once a signal has come


class _Server(uvicorn.Server):
    """Ends the waiting polls on a signal: they would hold the shutdown up until they are answered."""

    def __init__(self, config: uvicorn.Config, before_exit: Callable[[], None]) -> None:
        super().__init__(config)
        self._before_exit = before_exit
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say where it listens once it does: with port 0 nobody could know before."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        for server in self.servers:
            for listening in server.sockets:
                host, port = listening.getsockname()[:2]
                log.info("listening", url=f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop once, and hurry when told again. The signal is not raised anew: a server that was asked to stop ends with 0."""
        # In the loop, not here: a signal may come while this very thread holds what the callback needs.
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._before_exit)
        self.should_exit, self.force_exit = True, self.should_exit


def check(settings: Settings) -> None:
    """Raises Conflict where nothing can listen at the address: before anything is begun that a server without one had to end."""
    try:
        asyncio.run(_bind(settings.host, settings.port))
    except OSError as error:
        why = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise errors.Conflict(
            f"{settings.host}, port {settings.port}, cannot be listened on ({why}): choose another port by --port or "
            "HLORA_COORDINATOR_PORT, or another address by --host or HLORA_COORDINATOR_HOST"
        ) from None


async def _bind(host: str, port: int) -> None:
    """As uvicorn will do it, which only logs what is wrong; nobody is let in yet."""
    (await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port, start_serving=False)).close()


def serve(app: FastAPI, settings: Settings, before_exit: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT; requests in flight are answered first."""
    _share_pools()
    _open_many()
    gc.freeze()  # what was imported stays; to look through all of it again and again costs more than any request
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=GRACE,
        server_header=False,
    )
    _Server(config, before_exit).run()


def _share_pools() -> None:
    """Let threads share their memory: with pools of their own, each keeps the most that any thread ever needed of it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # where there is none, there are no such pools
    if mallopt is not None:
        mallopt(M_ARENA_MAX, POOLS)


def _open_many() -> None:
    """Open as many files as the system allows at all: every agent that waits holds a connection, and so few are allowed unasked."""
    try:
        import resource
    except ImportError:  # pragma: no cover  # a system without such limits
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft in (hard, resource.RLIM_INFINITY):
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):  # pragma: no cover  # where it must stay below a limit of the kernel's
        log.info("files-limited", most=soft)
    else:
        log.info("files-allowed", most=hard, before=soft)
