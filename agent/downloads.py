"""Slices on their way here: a connection that is cut at any byte costs no more than the bytes that were on it."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from agent import durable
from agent.answers import refusal
from agent.connection import Connection
from protocol import errors
from protocol.messages import BlobRef

Moved = Callable[[int], None]  # hears how many of the slice's bytes have gone or come


def silent(_: int) -> None:
    """Nobody listens."""


@dataclass
class Download:
    """Immutable bytes on their way into a file. What has come stays beside it as `.part`, also when the process ends.

    They come from the coordinator, or from the object store that it names; what that does not give, the coordinator does.
    """

    connection: Connection
    ref: BlobRef
    file: Path
    moved: Moved = silent
    fetched: int = 0  # bytes that came over the network
    direct: bool = True  # the object store may be asked

    async def run(self) -> int:
        """Fetch what is still lacking; gives the bytes that travelled. The file is there only when it is whole and right.

        Raises DigestMismatch, NotFound, InsufficientStorage, Unavailable.
        """
        if self.file.exists() and await self._right(self.file):
            return 0
        await self.connection.repeat(self._once, moved=self._have)
        return self.fetched

    @property
    def part(self) -> Path:
        """What has come so far."""
        return self.file.with_name(self.file.name + ".part")

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    async def _once(self) -> None:
        seen = await self._fetch(self._have()) if self._have() < self.ref.bytes else None
        if seen != self.ref.digest and not await self._right(self.part):
            came = self._have()
            self.part.unlink(missing_ok=True)
            self.direct = False
            raise errors.DigestMismatch(f"{self.ref.digest} should have {self.ref.bytes} bytes; {came} came, or their digest is another")
        # Not made durable: what a power cut spoils is found by its digest, and fetched again.
        self.part.replace(self.file)

    async def _fetch(self, start: int) -> str | None:
        """Fetch the rest; gives the digest of what came if it came in one go: then the file need not be read for it."""
        async with self._source(start) as response:
            if not _continues(response, start):
                start = 0
            seen = None if start else hashlib.sha256()
            with durable.room_for(self.part), durable.opened(self.part, "ab" if start else "wb") as stream:
                async for block in response.aiter_raw():
                    stream.write(block)
                    if seen is not None:
                        seen.update(block)
                    start, self.fetched = start + len(block), self.fetched + len(block)
                    if start > self.ref.bytes:
                        return None
                    self.moved(start)
        return None if seen is None else f"sha256:{seen.hexdigest()}"

    @asynccontextmanager
    async def _source(self, start: int) -> AsyncIterator[httpx.Response]:
        """The answer that has the bytes from there on, or all of them."""
        asked = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        same = {"If-Range": f'"{self.ref.digest}"'} if start else {}  # the store's own mark of it is another
        wish = {"Prefer": "direct"} if self.direct else {}
        async with self.connection.stream(f"/v1/blobs/{self.ref.digest}", asked | same | wish) as response:
            if response.is_success:
                yield response
                return
            await response.aread()
            if not wish or response.status_code != httpx.codes.TEMPORARY_REDIRECT:
                raise refusal(response)
        async with self._stored(response.headers.get("Location", ""), asked) as response:
            yield response

    @asynccontextmanager
    async def _stored(self, address: str, asked: dict[str, str]) -> AsyncIterator[httpx.Response]:
        """The store's answer. A store that brings nothing is not asked again."""
        before, self.direct = self.fetched, False
        try:
            async with self.connection.elsewhere("GET", address, asked) as response:
                yield response
        finally:
            self.direct = self.fetched > before

    async def _right(self, file: Path) -> bool:
        return await asyncio.to_thread(durable.holds, file, self.ref)


def _continues(response: httpx.Response, start: int) -> bool:
    """Whether the body goes on where the file ends; otherwise it begins at the beginning."""
    return response.status_code == 206 and re.match(rf"bytes {start}-", response.headers.get("Content-Range", "")) is not None
