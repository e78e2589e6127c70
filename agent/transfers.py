"""Trained slices on their way: a connection that is cut at any byte costs no more than the bytes that were on it.

Files are read and written a block at a time, so that memory does not grow with the slice; how large a block and a part are,
the link decides.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import httpx

from agent.answers import read
from agent.connection import ANSWER_SECONDS, Connection
from agent.downloads import Moved, silent
from protocol import errors
from protocol.messages import BlobRef, SliceReceipt, UploadAddress

BLOCK = 64 << 10  # bytes of a file read at a time; few enough for a very slow link to take them before it counts as dead
LARGEST_BLOCK = 1 << 20  # once the link takes them at once: each costs the same, however many bytes it has
PROMPT = 1.0  # seconds in which a block is gone on a link that may get twice as much
PART = 8 << 20  # bytes of a slice sent in one request, where it is not known what the link carries; a smaller slice goes in one piece
PART_SECONDS = 30.0  # that a larger part may take: so much is lost at most when the coordinator dies
SMALLEST_PART, LARGEST_PART = 64 << 10, 256 << 20
CHECKING_SECONDS = 300.0  # the coordinator checks and stores a whole slice, or a large part, before it answers


@dataclass
class Upload:
    """A trained slice on its way to the coordinator: in one piece if it is small, otherwise in parts from an offset.

    A large one goes by way of the object store, if the coordinator has one that takes it; what fails there goes on in parts.
    """

    connection: Connection
    path: str
    epoch: int
    ref: BlobRef
    file: Path
    moved: Moved = silent
    again: bool = False  # something of it may be there already
    size: int = PART  # bytes of the next part: half as many after a failure, twice as many after one that went quickly
    furthest: int = 0  # bytes that the coordinator has acknowledged
    clock: Callable[[], float] = monotonic

    async def run(self) -> SliceReceipt:
        """Send what the coordinator lacks.

        Raises StaleLease, JobOver, NotFound; an InvalidSlice; Unavailable when nothing moves any more.
        """
        return await self.connection.repeat(self._once, moved=lambda: self.furthest)

    async def _once(self) -> SliceReceipt:
        first, self.again = not self.again, True
        if first and self.ref.bytes <= PART:
            return read(await self._send("PUT", 0, self.ref.bytes, {}), SliceReceipt)
        if first and (address := await self._address()) is not None:
            return await self._directly(address)
        at = 0 if first else await self._stands()
        while isinstance(at, int):
            at = await self._part(at)
        return at

    async def _address(self) -> str | None:
        """Where the object store takes the slice; none where the coordinator takes it itself."""
        try:
            return read(await self.connection.once("POST", f"{self.path}/address", headers=self._own), UploadAddress).url
        except errors.HLoRAError as error:  # why not, the first part is told too
            if error.retryable:
                raise
            return None

    async def _directly(self, address: str) -> SliceReceipt:
        """Put the slice where the object store takes it, and let the coordinator look at it."""
        length = {"Content-Length": str(self.ref.bytes)}
        blocks = self._blocks(0, self.ref.bytes)
        async with self.connection.elsewhere("PUT", address, length, blocks, CHECKING_SECONDS):
            pass
        return read(await self.connection.once("POST", self.path, headers=self._own, patience=CHECKING_SECONDS), SliceReceipt)

    @property
    def _own(self) -> dict[str, str]:
        return {"Lease-Epoch": str(self.epoch), "Upload-Length": str(self.ref.bytes), "Repr-Digest": self._digest}

    async def _stands(self) -> int | SliceReceipt:
        """How many bytes the coordinator has; the receipt, if it has them all and has found them good."""
        answer = await self.connection.once("HEAD", self.path, headers={"Lease-Epoch": str(self.epoch)})
        if answer.headers.get("Repr-Digest", self._digest) != self._digest:
            return 0  # of another training; it gives way to this one
        if answer.headers.get("Upload-Complete") == "?1":
            return SliceReceipt(digest=self.ref.digest, bytes=self.ref.bytes)
        self.furthest = max(self.furthest, at := _offset(answer, self.ref.bytes))
        return at

    async def _part(self, start: int) -> int | SliceReceipt:
        count, began = min(self.size, self.ref.bytes - start), self.clock()
        try:
            answer = await self._send("PATCH", start, count, {"Upload-Offset": str(start), "Upload-Length": str(self.ref.bytes)})
        except errors.OffsetMismatch as error:
            return self._elsewhere(error, start)
        except errors.TooLarge as error:  # for a proxy on the way, perhaps; an ordinary part is not
            self.size, much = PART, count > PART
            raise errors.TooLarge(error.detail, retryable=much) from None
        except (errors.HLoRAError, httpx.TransportError):
            self.size = max(SMALLEST_PART, self.size // 2)
            raise
        if self.clock() - began < PART_SECONDS:
            self.size = min(LARGEST_PART, self.size * 2)
        self.furthest = max(self.furthest, start + count)
        return _offset(answer, self.ref.bytes) if answer.status_code == 204 else read(answer, SliceReceipt)

    def _elsewhere(self, error: errors.OffsetMismatch, start: int) -> int:
        """Where to go on: what came before a cut was stored only after it had been asked for. Otherwise it is asked again."""
        offset = error.facts.get("offset")
        if not isinstance(offset, int) or not start < offset < self.ref.bytes:
            raise errors.OffsetMismatch(error.detail, retryable=True)
        self.furthest = max(self.furthest, offset)
        return offset

    async def _send(self, method: str, start: int, count: int, headers: dict[str, str]) -> httpx.Response:
        own = {"Lease-Epoch": str(self.epoch), "Content-Length": str(count), "Content-Type": "application/octet-stream"}
        much = count > PART or start + count == self.ref.bytes
        return await self.connection.once(
            method,
            self.path,
            content=self._blocks(start, count),
            headers={**own, "Repr-Digest": self._digest, **headers},
            patience=CHECKING_SECONDS if much else ANSWER_SECONDS,
        )

    async def _blocks(self, start: int, count: int) -> AsyncIterator[bytes]:
        size = BLOCK
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(start)
            while count and (block := stream.read(min(size, count))):
                count, began = count - len(block), self.clock()
                yield block
                size = min(LARGEST_BLOCK, size * 2) if self.clock() - began < PROMPT else BLOCK
                self.moved(stream.tell())

    @property
    def _digest(self) -> str:
        return f"sha-256=:{base64.b64encode(bytes.fromhex(self.ref.digest.removeprefix('sha256:'))).decode()}:"


def part_bytes(bytes_per_second: float | None) -> int:
    """How large a slice's first part is on a link that is known to carry so much."""
    return PART if bytes_per_second is None else min(LARGEST_PART, max(PART, int(bytes_per_second * PART_SECONDS)))


def _offset(answer: httpx.Response, length: int) -> int:
    """How many bytes the coordinator says that it has. Raises Unavailable if it says nothing that can be."""
    text = answer.headers.get("Upload-Offset", "")
    if not text.isdigit() or int(text) >= length:
        raise errors.Unavailable(f"the coordinator says that it has {text or 'an unknown number of'} bytes of {length}; it is asked again")
    return int(text)
