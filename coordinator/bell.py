"""Wakes whoever waits: the conductor when there is something to look at, a client's poll when it has work.

A bell only saves waiting. Whoever is woken looks in the database, and whoever is not woken looks a little later. Rings for
clients are heard in this process, and in other processes where somebody passes them on; the conductor's are not passed on,
because one conductor is enough to act upon what changed, and the others look within seconds anyway.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Iterable

Waiter = tuple[asyncio.AbstractEventLoop, asyncio.Event]


class Bell:
    """Rung from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiters: dict[str, set[Waiter]] = {}
        self._conductor = threading.Event()
        self._elsewhere: Callable[[Collection[str]], None] | None = None
        self.closed = False
        self.rings = 0  # so far; whoever looked before it rang, and listens only now, looks again

    def close(self) -> None:
        """Nobody shall wait any more: every poll and every stream ends now."""
        self.closed = True
        self.wake_everybody()
        self.ring_conductor()

    def pass_on(self, elsewhere: Callable[[Collection[str]], None] | None) -> None:
        """From now on tell this function, too, for whom the bell rings; or nobody any more. It must not block."""
        self._elsewhere = elsewhere

    def ring_conductor(self) -> None:
        """Something changed that the conductor may act upon."""
        self._conductor.set()

    def await_conductor_call(self, seconds: float) -> None:
        """Block until the conductor is called, or the time is over."""
        self._conductor.wait(seconds)
        self._conductor.clear()

    def ring(self, clients: Iterable[str]) -> None:
        """These clients have work, wherever they wait."""
        called = list(clients)
        self.wake(called)
        if called and self._elsewhere is not None:
            self._elsewhere(called)

    def wake_everybody(self) -> None:
        """All who wait in this process shall look."""
        with self._lock:
            everybody = list(self._waiters)
        self.wake(everybody)

    def wake(self, clients: Iterable[str]) -> None:
        """Those of these clients who wait in this process shall look."""
        with self._lock:
            self.rings += 1
            woken = [waiter for client in clients for waiter in self._waiters.get(client, ())]
        for loop, event in woken:
            loop.call_soon_threadsafe(event.set)

    @property
    def crowd(self) -> int:
        """How many clients wait in this process."""
        return len(self._waiters)

    def listen(self, client: str) -> Listening:
        """Enter before looking in the database, so that no ring is lost between the look and the wait."""
        return Listening(self, client)

    def _join(self, client: str, waiter: Waiter) -> None:
        with self._lock:
            self._waiters.setdefault(client, set()).add(waiter)

    def _leave(self, client: str, waiter: Waiter) -> None:
        with self._lock:
            waiters = self._waiters[client]
            waiters.discard(waiter)
            if not waiters:
                del self._waiters[client]


class Listening:
    """One poll's ear at the bell, a context."""

    def __init__(self, bell: Bell, client: str) -> None:
        self._bell, self._client = bell, client
        self._event = asyncio.Event()
        self._waiter = (asyncio.get_running_loop(), self._event)

    def __enter__(self) -> Listening:
        self._bell._join(self._client, self._waiter)
        return self

    def __exit__(self, *_: object) -> None:
        self._bell._leave(self._client, self._waiter)

    async def rung(self, seconds: float) -> bool:
        """Wait for the bell; false when the time is over, or nobody shall wait any more."""
        if self._bell.closed or seconds <= 0:
            return False
        try:
            await asyncio.wait_for(self._event.wait(), seconds)
        except TimeoutError:
            return False
        self._event.clear()
        return not self._bell.closed
