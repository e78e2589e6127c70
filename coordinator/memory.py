"""Memory for large matrices, which the threads of one process share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition

LIMIT = 300_000_000  # bytes in one process; 1,400 directions of 4096 × 4096 fit beside as many others, a dense one does not


class Memory:
    """So many bytes: who would take more than are left waits, unless he is alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._changed = Condition()

    @contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """So many bytes, while the block lasts. Whoever holds some must not ask for more."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + size <= self._limit)
            self._taken += size
        try:
            yield
        finally:
            with self._changed:
                self._taken -= size
                self._changed.notify_all()


SHARED = Memory(LIMIT)
