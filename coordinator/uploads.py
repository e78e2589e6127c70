"""A slice on its way in: spooled to disk while it is counted and hashed, then checked before it may count.

Nothing of it is believed: its length is bounded by what the job asked for, its header is read with limits, and its
numbers are looked at a block at a time. A body that ends early is not lost: what came of it is there, with the reason.

However many send at once, a few are hashed, written and checked at a time. Of the others the next bytes wait, not a slice.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import math
import os
import re
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, TypeVar

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar
from starlette.requests import ClientDisconnect

from coordinator.blobs import Blobs
from coordinator.jobs import Upload
from coordinator.reading import open_file, open_slice
from coordinator.stores import room
from protocol import checks, errors
from protocol.slices import Factors

T = TypeVar("T")
BATCH = 1 << 17  # bytes of a body that are collected in memory before they are written
_hands: RunVar[CapacityLimiter] = RunVar("hands")


@dataclass(frozen=True)
class Spooled:
    """Bytes that came, in a file."""

    path: Path
    length: int
    digest: str


class _Spool:
    """A file that knows the digest of what was written to it, made when the first of it is: files are no work for an event loop."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._hash, self._length = hashlib.sha256(), 0

    def write(self, chunks: Iterable[bytes]) -> None:
        """Raises InsufficientStorage where there is no room."""
        with room():
            file = self._file = self._file or self._made()
            for chunk in chunks:
                self._hash.update(chunk)
                self._length += file.write(chunk)

    def end(self, chunks: Iterable[bytes] = ()) -> Spooled:
        """All that was written, and these last. Raises InsufficientStorage."""
        self.write(chunks)
        assert self._file is not None, "it is made by the first write"
        with room():
            self._file.flush()
        return Spooled(Path(self._file.name), self._length, f"sha256:{self._hash.hexdigest()}")

    def _made(self) -> IO[bytes]:
        self._folder.mkdir(parents=True, exist_ok=True)
        return tempfile.NamedTemporaryFile(dir=self._folder, prefix="upload-", delete=False)  # `drop` closes it

    def drop(self) -> None:
        """Delete it, if it is there."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # what could not be written is not wanted any more
                file.close()
            Path(file.name).unlink(missing_ok=True)


@dataclass(frozen=True)
class Body:
    """A request's body as far as it came. The last of it is written by whoever reads the file, in one turn."""

    length: int  # bytes
    fault: errors.HLoRAError | None  # why no more came, though more was announced
    _spool: _Spool
    _last: Sequence[bytes]

    @contextmanager
    def spooled(self) -> Iterator[Spooled]:
        """All of it in a file, which is gone when the block ends. Raises InsufficientStorage where there is no room for it."""
        try:
            yield self._spool.end(self._last)
        finally:
            self._spool.drop()


async def in_turn(work: Callable[[], T]) -> T:
    """What the work gives, done in a thread when it is its turn: two at a time for each core, one of which may wait for the disk."""
    try:
        hands = _hands.get()
    except LookupError:
        _hands.set(hands := CapacityLimiter(2 * (os.cpu_count() or 1)))
    return await to_thread.run_sync(work, limiter=hands)


@asynccontextmanager
async def receive(stream: AsyncIterator[bytes], folder: Path, *, largest: int, announced: int | None, stall: float) -> AsyncIterator[Body]:
    """Spool a request's body; what was spooled is gone when the block ends.

    A body that ends before its announced end, or of which no byte comes for `stall` seconds, is given as far as it came,
    with TruncatedBody or StalledBody as its fault. Raises TooLarge as soon as more comes, or is announced, than may;
    InsufficientStorage.
    """
    if announced is not None and announced > largest:
        raise errors.TooLarge(f"the body is announced with {announced} bytes; at most {largest} may come", largest=largest)
    spool = _Spool(folder)
    try:
        yield await _fill(spool, stream, largest, announced, stall)
    finally:
        spool.drop()


async def _fill(spool: _Spool, stream: AsyncIterator[bytes], largest: int, announced: int | None, stall: float) -> Body:
    """Write a body as it comes, but for the last of it."""
    batch, size, came = list[bytes](), 0, 0
    fault: errors.HLoRAError | None = None
    try:
        async for chunk in _flowing(stream, stall):
            came += len(chunk)
            if came > largest:
                raise errors.TooLarge(f"more than {largest} bytes came; no more may", largest=largest)
            batch.append(chunk)
            size += len(chunk)
            if size >= BATCH:
                await in_turn(partial(spool.write, batch))
                batch, size = [], 0
    except TimeoutError:
        fault = errors.StalledBody(f"no byte came for {stall:g} seconds, after {came}; send the rest, or all of it again")
    except ClientDisconnect:
        fault = errors.TruncatedBody(f"the connection ended after {came} bytes; send the rest, or all of it again")
    if fault is None and announced is not None and came != announced:
        fault = errors.TruncatedBody(f"{came} bytes came, {announced} were announced; send the rest, or all of it again")
    return Body(came, fault, spool, batch)


async def _flowing(stream: AsyncIterator[bytes], stall: float) -> AsyncIterator[bytes]:
    """The stream's chunks. Raises TimeoutError when none comes for so many seconds."""
    while True:
        async with asyncio.timeout(stall):
            chunk = await anext(stream, None)
        if chunk is None:
            return
        yield chunk


@contextmanager
def joined(blobs: Blobs, parts: Sequence[str], last: Spooled, folder: Path) -> Iterator[Spooled]:
    """Stored parts and the last one, which is not stored, as one file; it is gone when the block ends.

    Raises DigestMismatch where a part is gone, for the slice cannot be had from what is here.
    """
    if not parts:
        yield last
        return
    with gathered(_pieces(blobs, parts, last), folder) as whole:
        yield whole


def _pieces(blobs: Blobs, parts: Sequence[str], last: Spooled) -> Iterator[bytes]:
    try:
        for part in parts:
            yield from blobs.chunks(part)
    except errors.NotFound as error:
        raise errors.DigestMismatch(f"a part of the slice was lost: {error}; send the slice again") from error
    with last.path.open("rb") as file:
        yield from iter(lambda: file.read(BATCH), b"")


@contextmanager
def gathered(chunks: Iterable[bytes], folder: Path) -> Iterator[Spooled]:
    """Bytes in a file, which is gone when the block ends. Raises InsufficientStorage where there is no room for it."""
    spool = _Spool(folder)
    try:
        yield spool.end(chunks)
    finally:
        spool.drop()


def announced_digest(repr_digest: str | None) -> str | None:
    """The blob name that the sender announced (RFC 9530); other algorithms are passed over. Raises InvalidRequest."""
    found = re.search(r"(?:^|,\s*)sha-256=:([A-Za-z0-9+/=]+):", repr_digest or "")
    if found is None:
        return None
    try:
        digest = base64.b64decode(found.group(1), validate=True)
    except binascii.Error:
        raise errors.InvalidRequest("Repr-Digest is not base64") from None
    if len(digest) != 32:
        raise errors.InvalidRequest(f"a SHA-256 has 32 bytes; that of Repr-Digest has {len(digest)}")
    return f"sha256:{digest.hex()}"


def written_digest(digest: str) -> str:
    """A blob's name as RFC 9530 writes it."""
    return f"sha-256=:{base64.b64encode(bytes.fromhex(digest.removeprefix('sha256:'))).decode()}:"


def check_digest(spooled: Spooled, announced: str | None) -> None:
    """Raises DigestMismatch unless the bytes are those that were announced, if any were."""
    if announced is not None and spooled.digest != announced:
        raise errors.DigestMismatch(f"the bytes are {spooled.digest}, announced was {announced}; send the slice again")


def check(spooled: Spooled, wanted: Upload, blobs: Blobs) -> float:
    """‖change‖_F of a slice that may count, over modules and fully trained tensors.

    Raises the kind of InvalidSlice that says why it may not.
    """
    expected, given = wanted.expected, open_slice(blobs, wanted.expected.base)

    @lru_cache(maxsize=1)  # a module is asked for once as it was and, for what did not travel, once as it is
    def old(module: str) -> Factors:
        return given.factors(module).of(expected.directions)

    with open_file(spooled.path, wanted.largest_head) as trained:

        def new(module: str) -> Factors:
            found = trained.trained_factors(module, partial(old, module))
            checks.check_finite(f"factors/{module}/a", found.a)
            checks.check_finite(f"factors/{module}/b", found.b)
            return found

        checks.check_header(trained.header, expected)
        whole = sum(checks.check_full(name, trained.full_blocks(name, given), expected.wire) for name in expected.layout.full)
        norm = math.hypot(checks.check_change(new, old, expected), math.sqrt(whole))
    if wanted.bound is not None and norm > wanted.bound:
        raise errors.ExcessiveChange(f"the change's norm is {norm:.6g}; the plan allows {wanted.bound:g}", norm=norm, bound=wanted.bound)
    return norm
