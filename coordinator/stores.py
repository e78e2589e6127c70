"""Where blobs lie: a folder or an object store, behind a few verbs. Keys come from `blobs.py` and are safe as paths."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Literal, Protocol
from urllib.parse import unquote

import obstore
from obstore.store import MemoryStore, ObjectStore, S3Store

from protocol import errors

Method = Literal["GET", "PUT"]
COPY = 1 << 20  # bytes copied at a time


class Store(Protocol):
    """What a store must do; keys are `sha256/<64 hex>`, an unknown one is a FileNotFoundError."""

    far: bool  # each request waits for another machine, and many wait no longer than one

    def write(self, key: str, content: bytes | Path) -> None: ...
    def read(self, key: str, start: int, stop: int) -> bytearray: ...
    def begin(self, key: str, count: int) -> tuple[bytearray, int]: ...
    def stream(self, key: str, start: int, stop: int, size: int) -> Iterator[bytes]: ...
    def size(self, key: str) -> int: ...
    def delete(self, key: str) -> None: ...
    def entries(self) -> Iterator[tuple[str, int, datetime]]: ...
    def unfinished(self) -> Iterator[Path]: ...
    def address(self, method: Method, key: str, seconds: float) -> str | None: ...


def open_store(url: str) -> Store:
    """The store at a URL. Raises InvalidRequest for a URL that names none."""
    kind, _, place = url.partition("://")
    match kind:
        case "file" if place.startswith("/"):
            return Folder(Path(unquote(place, errors="surrogateescape")))  # a name need not be text
        case "memory" if place:
            # One store per name: whoever opens the URL again in this process finds what was put.
            return Remote(_memories.setdefault(place, MemoryStore()))
        case "s3" if place:
            return _bucket(url)
    raise errors.InvalidRequest(f"blobs are kept at file:///FOLDER, s3://BUCKET/PREFIX or memory://NAME; {url!r} came")


_memories: dict[str, MemoryStore] = {}


@cache
def _bucket(url: str) -> Remote:
    # Once per process: a store keeps its connections.
    return Remote(S3Store.from_url(url))


class Folder:
    """A folder, written without obstore: its local store never fsyncs, and a blob must outlive a power cut."""

    far = False

    def __init__(self, root: Path) -> None:
        self._root = root
        self._staging = root / "staging"
        if not self._staging.is_dir():
            for folder in (root / "sha256", self._staging):
                folder.mkdir(parents=True, exist_ok=True)
            for folder in (root, root.parent):
                _sync(folder)

    def write(self, key: str, content: bytes | Path) -> None:
        path = self._root / key
        try:
            os.utime(path)
        except FileNotFoundError:
            if isinstance(content, bytes):
                self._copy([content], path)
            elif not _linked(content, path):
                self._copy(_file_chunks(content, 0, content.stat().st_size, COPY), path)
        _sync(path.parent)  # also where it was there: whoever put it may not have come as far as this

    def _copy(self, chunks: Iterable[bytes], path: Path) -> None:
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

    def read(self, key: str, start: int, stop: int) -> bytearray:
        with (self._root / key).open("rb", buffering=0) as file:
            return read_at(file, start, stop)

    def begin(self, key: str, count: int) -> tuple[bytearray, int]:
        with (self._root / key).open("rb", buffering=0) as file:
            return read_at(file, 0, count), os.fstat(file.fileno()).st_size

    def stream(self, key: str, start: int, stop: int, size: int) -> Iterator[bytes]:
        return _file_chunks(self._root / key, start, stop, size)

    def size(self, key: str) -> int:
        return (self._root / key).stat().st_size

    def delete(self, key: str) -> None:
        (self._root / key).unlink()

    def entries(self) -> Iterator[tuple[str, int, datetime]]:
        with os.scandir(self._root / "sha256") as files:
            for file in files:
                with suppress(FileNotFoundError):  # deleted since the folder was read
                    facts = file.stat()
                    yield f"sha256/{file.name}", facts.st_size, datetime.fromtimestamp(facts.st_mtime, UTC)

    def unfinished(self) -> Iterator[Path]:
        return self._staging.iterdir()

    def address(self, method: Method, key: str, seconds: float) -> str | None:
        return None  # nobody else can look into it


class Remote:
    """An object store: its own puts are atomic and durable."""

    far = True

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def write(self, key: str, content: bytes | Path) -> None:
        obstore.put(self._store, key, content)

    def read(self, key: str, start: int, stop: int) -> bytearray:
        return bytearray(obstore.get_range(self._store, key, start=start, end=stop))

    def begin(self, key: str, count: int) -> tuple[bytearray, int]:
        found = obstore.get(self._store, key, options={"range": (0, count)})
        return bytearray(found.bytes()), found.meta["size"]

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

    def unfinished(self) -> Iterator[Path]:
        return iter(())  # parts of cut-off puts are the bucket's to expire

    def address(self, method: Method, key: str, seconds: float) -> str | None:
        return obstore.sign(self._store, method, key, timedelta(seconds=seconds)) if isinstance(self._store, S3Store) else None


def read_at(file: FileIO, start: int, stop: int) -> bytearray:
    """Bytes start … stop − 1 of an open file, or as many of them as it has: copied once, into memory that is the caller's."""
    data = bytearray(stop - start)
    size, view = 0, memoryview(data)
    while came := os.preadv(file.fileno(), [view[size:]], start + size):
        size += came
    view.release()
    del data[size:]
    return data


def _file_chunks(path: Path, start: int, stop: int, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        for here in range(start, stop, size):
            yield file.read(min(size, stop - here))


def _linked(file: Path, path: Path) -> bool:
    """Give a file's own bytes the name of the blob, durable first; False where the file system cannot, or is another."""
    _sync(file)
    os.utime(file)  # written long ago or not, as a blob it is young
    try:
        path.hardlink_to(file)
    except OSError:
        return False
    return True


@contextmanager
def room() -> Iterator[None]:
    """Raises InsufficientStorage where a disk, or a share of it, is full; Unavailable where no more files may be open."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise errors.InsufficientStorage("the coordinator's disk is full; try again when there is room") from error
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise errors.Unavailable("the coordinator has as many files and connections open as it may; try again") from error
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
