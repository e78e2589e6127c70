"""Immutable bytes named by their SHA-256, in a store that is a URL.

    file:///var/lib/hlora/blobs     a folder        memory://NAME     this process, for tests and simulations
    s3://bucket/prefix              object storage, credentials as the AWS tools find them

A blob appears only whole, and is durable when `put` returns, because a row that names it follows. Writing a blob twice
is writing it once; the second time still renews its age, so that a sweep does not take what is about to be named.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

from obstore.exceptions import BaseError

from coordinator.stores import Store, open_store, room
from protocol import errors
from protocol.messages import BlobRef

CHUNK = 1 << 20  # bytes
GROWING = "hlora-merge-"  # so begin the names of temporary folders where files grow that become blobs
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
QUESTIONS = 16  # asked of a far store at a time
_KEY = re.compile(r"sha256/([0-9a-f]{64})")


@dataclass(frozen=True)
class StoredBlob:
    """A blob as the store lists it."""

    digest: str
    bytes: int
    modified: datetime


class Blobs:
    """Put and read blobs. Safe to share among threads; pickled as its URL."""

    def __init__(self, url: str, store: Store) -> None:
        self.url = url
        self._store = store

    @classmethod
    def open(cls, url: str) -> Self:
        """The store at a URL; a folder that is not there is made. Raises InvalidRequest for any other kind of URL."""
        return cls(url, open_store(url))

    def __reduce__(self) -> tuple[object, ...]:
        return type(self).open, (self.url,)

    def put(self, data: bytes) -> BlobRef:
        """Keep some bytes."""
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        with translated(digest):
            self._store.write(_key(digest), data)
        return BlobRef(digest=digest, bytes=len(data))

    def put_file(self, path: Path, digest: str | None = None) -> BlobRef:
        """Keep a file's bytes, a chunk in memory at a time. The digest is trusted where the caller has computed it.

        Where it can, the store takes the very file under the blob's name too: nobody may write to it any more.
        """
        digest = digest or file_digest(path)
        with translated(digest):
            self._store.write(_key(digest), path)
        return BlobRef(digest=digest, bytes=path.stat().st_size)

    def read(self, digest: str) -> bytes:
        """A whole blob."""
        return bytes(self.read_range(digest, 0, self.size(digest)))

    def read_range(self, digest: str, start: int, stop: int) -> bytearray:
        """Bytes start … stop − 1 of a blob, in memory that is the caller's. Raises NotFound; TruncatedBody where the blob ends before."""
        if start >= stop:
            return bytearray()
        with translated(digest):
            data = self._store.read(_key(digest), start, stop)
        if len(data) < stop - start:
            raise errors.TruncatedBody(f"bytes {start} to {stop} of {digest} were wanted; it ends at {start + len(data)}")
        return data

    def begin(self, digest: str, count: int) -> tuple[bytearray, int]:
        """A blob's first bytes, so many or all of them, and its length, in one request. Raises NotFound."""
        with translated(digest):
            return self._store.begin(_key(digest), count)

    @property
    def far(self) -> bool:
        """Whether every request waits for another machine, so that several at once take no longer than one."""
        return self._store.far

    def chunks(self, digest: str, start: int = 0, stop: int | None = None, size: int = CHUNK) -> Iterator[bytes]:
        """A blob's bytes in pieces of about that size. Raises NotFound at once, not at the first piece."""
        end = self.size(digest)
        return self._chunks(digest, start, end if stop is None else min(stop, end), size)

    def _chunks(self, digest: str, start: int, stop: int, size: int) -> Iterator[bytes]:
        if start < stop:
            with translated(digest):
                yield from self._store.stream(_key(digest), start, stop, size)

    def address(self, digest: str, seconds: float) -> str | None:
        """Where anybody may fetch the blob for so long, without a credential; none where the store cannot sign."""
        with translated(digest):
            return self._store.address("GET", _key(digest), seconds)

    def size(self, digest: str) -> int:
        """A blob's length in bytes."""
        with translated(digest):
            return self._store.size(_key(digest))

    def exists(self, digest: str) -> bool:
        """Whether the blob is here."""
        try:
            self.size(digest)
        except errors.NotFound:
            return False
        return True

    def missing(self, digests: Collection[str]) -> set[str]:
        """Those of the blobs that are not here; asked all at once where each question waits for another machine."""
        if not self.far:
            return {digest for digest in digests if not self.exists(digest)}
        with ThreadPoolExecutor(QUESTIONS) as pool:
            return {digest for digest, here in zip(digests, pool.map(self.exists, digests), strict=True) if not here}

    def delete(self, digest: str) -> None:
        """Forget a blob; one that is not here is forgotten already."""
        with suppress(errors.NotFound), translated(digest):
            self._store.delete(_key(digest))

    def digests(self) -> Iterator[StoredBlob]:
        """Every blob, in no order."""
        with translated("the list of blobs"):
            for key, size, modified in self._store.entries():
                if match := _KEY.fullmatch(key):
                    yield StoredBlob(f"sha256:{match[1]}", size, modified)

    def unfinished(self) -> Iterator[Path]:
        """The files of puts that are under way or were cut off."""
        return self._store.unfinished()


def file_digest(path: Path) -> str:
    """The name of a file's bytes."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def _key(digest: str) -> str:
    if not (match := _DIGEST.fullmatch(digest)):
        raise errors.NotFound(f"a blob's name is sha256:<64 hexadecimal digits>; {digest[:100]!r} is none")
    return f"sha256/{match[1]}"


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Foreign errors of a store as ours: NotFound, InsufficientStorage, Unavailable."""
    try:
        with room():
            yield
    except FileNotFoundError:
        raise errors.NotFound(f"there is no blob {what}", digest=what) from None
    except (OSError, BaseError) as error:
        raise errors.Unavailable(f"the blob store failed over {what}: {str(error).partition(chr(10))[0]}") from error
