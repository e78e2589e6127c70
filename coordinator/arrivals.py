"""Slices that agents put into the object store themselves, at signed addresses. Nothing that lies here is believed.

An address is one job's, and stays good after its slice was looked at: whoever has it may put other bytes there, at any time. So what
lies here never counts. It is read once, into a file of the coordinator's own; that file is checked, and stored under its digest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Self

from coordinator.blobs import CHUNK, translated
from coordinator.stores import Store, open_store
from protocol import errors

LARGEST = 5 * 10**9  # bytes of one put that every such store takes


@dataclass(frozen=True)
class Arrivals:
    """Where they lie, by job: one for each, however often it is put."""

    store: Store
    seconds: float | None  # that an address is good for; none where nobody is told any

    @classmethod
    def beside(cls, url: str, seconds: float | None) -> Self:
        """Those of a coordinator, under a prefix of its blob store. Raises InvalidRequest for a URL that names no store."""
        return cls(open_store(url.rstrip("/") + "/incoming"), seconds)

    def address(self, job: str, length: int) -> str:
        """Where the slice of a job may be put. Raises Conflict where it has to be sent to the coordinator."""
        with translated(f"the slice of {job}"):
            found = None if self.seconds is None or length > LARGEST else self.store.address("PUT", job, self.seconds)
        if found is None:
            raise errors.Conflict("this slice goes through the coordinator: send it in parts")
        return found

    def chunks(self, job: str, length: int) -> Iterator[bytes]:
        """The bytes that were put for a job, once. Raises TruncatedBody unless there are so many, at the first of them."""
        try:
            with translated(f"the slice of {job}"):
                size = self.store.size(job)
                if size == length:
                    yield from self.store.stream(job, 0, length, CHUNK)
                    return
        except errors.NotFound:  # it was taken already, perhaps
            size = 0
        raise errors.TruncatedBody(f"{size} bytes lie in the object store, {length} were announced; send the slice again")

    def drop(self, job: str) -> None:
        """Delete what was put for a job, if anything was. Raises Unavailable."""
        with suppress(errors.NotFound), translated(f"the slice of {job}"):
            self.store.delete(job)

    def sweep(self, before: datetime) -> int:
        """Delete what was put before a time, and to an address that is good no more since; gives how many. Raises Unavailable."""
        still = before - timedelta(seconds=self.seconds or 0)
        with translated("the list of slices in the object store"):
            old = [job for job, _, modified in self.store.entries() if modified < still]
        for job in old:
            self.drop(job)
        return len(old)
