"""Files that are whole or not there, whatever becomes of the process or the machine, and that only their owner may read."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

from protocol import errors
from protocol.messages import BlobRef

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


def opened(file: Path, mode: Literal["wb", "ab"]) -> BinaryIO:
    """A file for its owner alone, open for writing."""
    return open(file, mode, opener=lambda path, flags: os.open(path, flags, 0o600))


def folder(parent: Path, name: str) -> Path:
    """A folder of its own for a name that came over the network: one that could lead elsewhere is replaced by its digest."""
    return parent / (name if PLAIN.fullmatch(name) else hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest())


@contextmanager
def room_for(file: Path) -> Iterator[None]:
    """Make the file's folder; a disk that is full becomes InsufficientStorage."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise errors.InsufficientStorage(
            f"there is no room for {file} ({os.strerror(error.errno or 0)}); make room on this disk, or move the agent's home folder",
            retryable=False,
        ) from error


@contextmanager
def writing(file: Path) -> Iterator[BinaryIO]:
    """A stream whose bytes have the file's name once the block has ended well. Raises InsufficientStorage.

    A machine that loses its power then has them, or what had the name before, and no mixture; until `settle` nobody knows which.
    """
    new = file.with_name(file.name + ".new")
    with room_for(file):
        try:
            with opened(new, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            new.replace(file)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


def write(file: Path, blocks: Iterable[bytes]) -> None:
    """Write a file, as `writing` does. Raises InsufficientStorage."""
    with writing(file) as stream:
        for block in blocks:
            stream.write(block)


def settle(folder: Path) -> None:
    """Make the names of a folder's files last, and its own, which may be new too."""
    for place in (folder, folder.parent):
        _sync(place)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def holds(file: Path, ref: BlobRef) -> bool:
    """Whether a file is there and holds exactly these bytes."""
    if not file.is_file() or file.stat().st_size != ref.bytes:
        return False
    with file.open("rb") as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}" == ref.digest
