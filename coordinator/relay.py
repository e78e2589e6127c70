"""Carries the bell's rings to all other coordinators of one PostgreSQL, and theirs to this one, by LISTEN and NOTIFY.

One connection of its own, in one thread. What is rung while it is broken is lost, and costs whoever waits the rest of a
poll's time; so everybody looks once when the connection is back.
"""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
import structlog
from sqlalchemy.engine import Engine

from coordinator.bell import Bell
from coordinator.database import ALIVE

log = structlog.get_logger()

CHANNEL = "hlora"
AT_ONCE = 300  # ids of some 23 bytes in one notification, which may have 8,000
PAUSES = (1.0, 30.0)  # seconds between attempts to connect: the first, and the longest after doubling
NAME = "hlora-relay"  # of the connection, in the server's list


@contextmanager
def relaying(engine: Engine, bell: Bell) -> Iterator[None]:
    """While the block lasts, coordinators over this database hear each other's bells. On SQLite there is one coordinator."""
    if engine.dialect.name != "postgresql":
        yield
        return
    relay = Relay(engine, bell)
    thread = threading.Thread(target=relay.run, name="relay", daemon=True)
    thread.start()
    bell.pass_on(relay.send)
    try:
        yield
    finally:
        bell.pass_on(None)
        relay.stop()
        thread.join()


class Relay:
    """The connection between one bell and the others."""

    def __init__(self, engine: Engine, bell: Bell) -> None:
        _, parameters = engine.dialect.create_connect_args(engine.url)
        self._parameters: dict[str, Any] = {**ALIVE, "application_name": NAME, **parameters}
        self._bell = bell
        self._lock = threading.Lock()
        self._outgoing: set[str] = set()
        self._stopped = threading.Event()
        self._wake, self._woken = socket.socketpair()
        for end in (self._wake, self._woken):
            end.setblocking(False)

    def send(self, clients: Collection[str]) -> None:
        """Tell the others that these clients have work; from any thread, at once."""
        with self._lock:
            self._outgoing.update(clients)
        self._nudge()

    def stop(self) -> None:
        """Let `run` return."""
        self._stopped.set()
        self._nudge()

    def _nudge(self) -> None:
        with suppress(OSError):  # it is full: there is more than enough to wake the thread; or closed: there is none any more
            self._wake.send(b"!")

    def run(self) -> None:
        """Carry rings in both directions until stopped; a connection that breaks is made anew."""
        pause, longest = PAUSES
        while not self._stopped.is_set():
            try:
                with self._connected() as connection:
                    pause, _ = PAUSES
                    self._bell.wake_everybody()
                    self._exchange(connection)
            except psycopg.Error as error:
                log.warning("relay-broken", reason=str(error).partition("\n")[0], seconds=pause)
            except Exception:  # whatever it is: without this thread polls would wait longer than they must
                log.exception("relay-failed")
            self._stopped.wait(pause)
            pause = min(longest, 2 * pause)
        self._wake.close()
        self._woken.close()

    @contextmanager
    def _connected(self) -> Iterator[psycopg.Connection[Any]]:
        with psycopg.connect(**self._parameters, autocommit=True) as connection:
            connection.execute(f"listen {CHANNEL}")
            yield connection

    def _exchange(self, connection: psycopg.Connection[Any]) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(connection.fileno(), selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while not self._stopped.is_set():
                selector.select()
                self._give(connection)
                self._take(connection)

    def _give(self, connection: psycopg.Connection[Any]) -> None:
        with suppress(BlockingIOError):
            self._woken.recv(4096)
        with self._lock:
            outgoing, self._outgoing = sorted(self._outgoing), set()
        for start in range(0, len(outgoing), AT_ONCE):
            connection.execute("select pg_notify(%s, %s)", (CHANNEL, ",".join(outgoing[start : start + AT_ONCE])))

    def _take(self, connection: psycopg.Connection[Any]) -> None:
        own = connection.info.backend_pid
        for notification in connection.notifies(timeout=0):
            if notification.pid != own:
                self._bell.wake(notification.payload.split(","))
