"""Immutable bytes named by their SHA-256, in a store that is a URL.

    file:///var/lib/hlora/blobs     a folder        memory://NAME     this process, for tests and simulations
    s3://bucket/prefix              object storage, credentials as the AWS tools find them

A blob appears only whole, and is durable when `put` returns, because a row that names it follows. Writing a blob twice
is writing it once; the second time still renews its age, so that a sweep does not take what is about to be named.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, Self
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import MemoryStore, ObjectStore, S3Store

from protocol import errors
from protocol.messages import BlobRef

CHUNK = 1 << 20  # bytes
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_KEY = re.compile(r"sha256/([0-9a-f]{64})")


@dataclass(frozen=True)
class StoredBlob:
    """A blob as the store lists it."""

    digest: str
    bytes: int
    modified: datetime


class Store(Protocol):
    """What a store must do; keys are `sha256/<64 hex>`, an unknown one is a FileNotFoundError."""

    def write(self, key: str, chunks: Iterable[bytes]) -> None: ...
    def read(self, key: str, start: int, stop: int) -> bytes: ...
    def stream(self, key: str, start: int, stop: int, size: int) -> Iterator[bytes]: ...
    def size(self, key: str) -> int: ...
    def delete(self, key: str) -> None: ...
    def entries(self) -> Iterator[tuple[str, int, datetime]]: ...


class Blobs:
    """Put and read blobs. Safe to share among threads; pickled as its URL."""

    def __init__(self, url: str, store: Store) -> None:
        self.url = url
        self._store = store

    @classmethod
    def open(cls, url: str) -> Self:
        """The store at a URL; a folder that is not there is made. Raises InvalidRequest for any other kind of URL."""
        return cls(url, _open(url))

    def __reduce__(self) -> tuple[object, ...]:
        return type(self).open, (self.url,)

    def put(self, data: bytes) -> BlobRef:
        """Keep some bytes."""
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        with _translated(digest):
            self._store.write(_key(digest), [data])
        return BlobRef(digest=digest, bytes=len(data))

    def put_file(self, path: Path, digest: str | None = None) -> BlobRef:
        """Keep a file's bytes, a chunk in memory at a time. The digest is trusted where the caller has computed it."""
        digest = digest or file_digest(path)
        with _translated(digest):
            self._store.write(_key(digest), _file_chunks(path, 0, None, CHUNK))
        return BlobRef(digest=digest, bytes=path.stat().st_size)

    def read(self, digest: str) -> bytes:
        """A whole blob."""
        return self.read_range(digest, 0, self.size(digest))

    def read_range(self, digest: str, start: int, stop: int) -> bytes:
        """Bytes start … stop − 1 of a blob. Raises NotFound; TruncatedBody where the blob ends before."""
        if start >= stop:
            return b""
        with _translated(digest):
            data = self._store.read(_key(digest), start, stop)
        if len(data) < stop - start:
            raise errors.TruncatedBody(f"bytes {start} to {stop} of {digest} were wanted; it ends at {start + len(data)}")
        return data

    def chunks(self, digest: str, start: int = 0, stop: int | None = None, size: int = CHUNK) -> Iterator[bytes]:
        """A blob's bytes in pieces of about that size. Raises NotFound at once, not at the first piece."""
        end = self.size(digest)
        return self._chunks(digest, start, end if stop is None else min(stop, end), size)

    def _chunks(self, digest: str, start: int, stop: int, size: int) -> Iterator[bytes]:
        if start < stop:
            with _translated(digest):
                yield from self._store.stream(_key(digest), start, stop, size)

    def size(self, digest: str) -> int:
        """A blob's length in bytes."""
        with _translated(digest):
            return self._store.size(_key(digest))

    def exists(self, digest: str) -> bool:
        """Whether the blob is here."""
        try:
            self.size(digest)
        except errors.NotFound:
            return False
        return True

    def delete(self, digest: str) -> None:
        """Forget a blob; one that is not here is forgotten already."""
        with suppress(errors.NotFound), _translated(digest):
            self._store.delete(_key(digest))

    def digests(self) -> Iterator[StoredBlob]:
        """Every blob, in no order."""
        with _translated("the list of blobs"):
            for key, size, modified in self._store.entries():
                if match := _KEY.fullmatch(key):
                    yield StoredBlob(f"sha256:{match[1]}", size, modified)


def file_digest(path: Path) -> str:
    """The name of a file's bytes."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def _key(digest: str) -> str:
    if not (match := _DIGEST.fullmatch(digest)):
        raise errors.NotFound(f"a blob's name is sha256:<64 hexadecimal digits>; {digest[:100]!r} is none")
    return f"sha256/{match[1]}"


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise errors.NotFound(f"there is no blob {what}", digest=what) from None
    except (OSError, BaseError) as error:
        raise errors.Unavailable(f"the blob store failed over {what}: {str(error).splitlines()[0]}") from error


def _open(url: str) -> Store:
    parts = urlsplit(url)
    match parts.scheme:
        case "file" if not parts.netloc and parts.path.startswith("/"):
            return _Folder(Path(unquote(parts.path)))
        case "memory" if parts.netloc and not parts.path:
            # One store per name: whoever opens the URL again in this process finds what was put.
            return _Remote(_memories.setdefault(parts.netloc, MemoryStore()))
        case "s3" if parts.netloc:
            return _Remote(S3Store.from_url(url))
    raise errors.InvalidRequest(f"blobs are kept at file:///FOLDER, s3://BUCKET/PREFIX or memory://NAME; {url!r} came")


_memories: dict[str, MemoryStore] = {}


class _Folder:
    """A folder, written without obstore: its local store never fsyncs, and a blob must outlive a power cut."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._staging = root / "staging"
        for folder in (root / "sha256", self._staging):
            folder.mkdir(parents=True, exist_ok=True)
        _sync(root)

    def write(self, key: str, chunks: Iterable[bytes]) -> None:
        path = self._root / key
        with suppress(FileNotFoundError):
            os.utime(path)
            return
        handle, name = tempfile.mkstemp(dir=self._staging)
        try:
            with os.fdopen(handle, "wb") as file:
                file.writelines(chunks)
                file.flush()
                os.fsync(file.fileno())
            # After the fsync: a name that is there stands for bytes that are there, even after a power cut.
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _sync(path.parent)

    def read(self, key: str, start: int, stop: int) -> bytes:
        with (self._root / key).open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def stream(self, key: str, start: int, stop: int, size: int) -> Iterator[bytes]:
        return _file_chunks(self._root / key, start, stop, size)

    def size(self, key: str) -> int:
        return (self._root / key).stat().st_size

    def delete(self, key: str) -> None:
        (self._root / key).unlink()

    def entries(self) -> Iterator[tuple[str, int, datetime]]:
        for entry in os.scandir(self._root / "sha256"):
            with suppress(FileNotFoundError):  # deleted since the folder was read
                facts = entry.stat()
                yield f"sha256/{entry.name}", facts.st_size, datetime.fromtimestamp(facts.st_mtime, UTC)


class _Remote:
    """An object store: its own puts are atomic and durable."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def write(self, key: str, chunks: Iterable[bytes]) -> None:
        obstore.put(self._store, key, iter(chunks))

    def read(self, key: str, start: int, stop: int) -> bytes:
        return obstore.get_range(self._store, key, start=start, end=stop).to_bytes()

    def stream(self, key: str, start: int, stop: int, size: int) -> Iterator[bytes]:
        for chunk in obstore.get(self._store, key, options={"range": (start, stop)}).stream(min_chunk_size=size):
            yield bytes(chunk)

    def size(self, key: str) -> int:
        return obstore.head(self._store, key)["size"]

    def delete(self, key: str) -> None:
        obstore.delete(self._store, key)

    def entries(self) -> Iterator[tuple[str, int, datetime]]:
        for page in obstore.list(self._store):
            for entry in page:
                yield entry["path"], entry["size"], entry["last_modified"]


def _file_chunks(path: Path, start: int, stop: int | None, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        left = path.stat().st_size - start if stop is None else stop - start
        while left > 0 and (chunk := file.read(min(size, left))):
            left -= len(chunk)
            yield chunk


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
