"""A slice that lies somewhere, read piece by piece: its table of contents first, then only the tensors asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from coordinator.blobs import Blobs
from protocol import errors
from protocol.checks import check_finite
from protocol.slices import Factors, Header, decode, read_header

LARGEST_HEADER = 32 << 20  # bytes; the largest layout that a plan can have needs less
Read = Callable[[int, int], bytes]  # bytes start … stop − 1


@dataclass(frozen=True)
class SliceReader:
    """A slice whose table of contents is known."""

    header: Header
    read: Read

    def factors(self, module: str) -> Factors:
        """One module's factors, in the dtype in which they travelled. Raises MismatchedSlice where there are none."""
        return Factors(b=self._tensor(f"factors/{module}/b"), a=self._tensor(f"factors/{module}/a"))

    def full(self, name: str) -> Tensor:
        """One fully trained tensor, in the dtype in which it travelled. Raises MismatchedSlice where there is none."""
        return self._tensor(f"full/{name}")

    def _tensor(self, name: str) -> Tensor:
        if (entry := self.header.entries.get(name)) is None:
            raise errors.MismatchedSlice(f"the slice has no tensor {name}", tensor=name)
        return decode(self.read(entry.start, entry.stop), entry)


@dataclass(frozen=True)
class StoredFactors:
    """One module's factors of a stored slice, read and checked for NaN when they are needed."""

    reader: SliceReader
    module: str

    @property
    def rank(self) -> int:
        return self.reader.header.label.rank

    def load(self) -> Factors:
        found = self.reader.factors(self.module)
        check_finite(f"factors/{self.module}/b", found.b)
        check_finite(f"factors/{self.module}/a", found.a)
        return found


def open_slice(blobs: Blobs, digest: str) -> SliceReader:
    """A slice in the blob store. Raises NotFound, MalformedSlice."""
    return SliceReader(_header(blobs.url, digest), partial(blobs.read_range, digest))


@contextmanager
def open_file(path: Path, largest_header: int = LARGEST_HEADER) -> Iterator[SliceReader]:
    """A slice in a file that nobody has checked, while the block lasts.

    Raises MalformedSlice, also for a header of more bytes than that: give what an honest one can have.
    """
    with path.open("rb") as file:
        length = path.stat().st_size
        start = file.read(8)
        start += file.read(min(int.from_bytes(start, "little"), largest_header - 8))
        header = read_header(start, length)
        yield SliceReader(header, partial(_read, file))


def _read(file: BinaryIO, start: int, stop: int) -> bytes:
    # Not mapped into memory: what was read of a large slice would count as memory of this process.
    file.seek(start)
    return file.read(stop - start)


# A worker merges module after module of the same contributions; their tables of contents are read once.
@lru_cache(maxsize=1024)
def _header(url: str, digest: str) -> Header:
    blobs = Blobs.open(url)
    length = blobs.size(digest)
    size = int.from_bytes(blobs.read_range(digest, 0, min(8, length)), "little")
    return read_header(blobs.read_range(digest, 0, min(8 + size, length)), length)
