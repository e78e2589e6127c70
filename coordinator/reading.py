"""A slice that lies somewhere, read piece by piece: its table of contents first, then only the tensors asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

from torch import Tensor

from coordinator.blobs import Blobs
from coordinator.stores import read_at
from coordinator.sums import Stored
from protocol import errors
from protocol.checks import check_finite
from protocol.compact import restored
from protocol.contents import SCALES, WIRE_NAMES, Entry, Header, read_header
from protocol.plan import Dtype
from protocol.slices import Factors, decode, seen

LARGEST_HEADER = 32 << 20  # bytes; the largest layout that a plan can have needs less
FIRST = 1 << 16  # bytes of a blob with which its header comes in one request, unless there are hundreds of modules
AHEAD = 8  # contributions that are read at the same time, from far
BLOCK = 1 << 14  # numbers of a tensor that are looked at in one go, twice: as they are and as they were
Read = Callable[[int, int], bytearray]  # bytes start … stop − 1


@dataclass(frozen=True)
class SliceReader:
    """A slice whose table of contents is known."""

    header: Header
    read: Read

    def factors(self, module: str) -> Factors:
        """One module's factors, in the dtype in which they travelled. Raises MismatchedSlice where there are none."""
        a, b = f"factors/{module}/a", f"factors/{module}/b"
        found = self._tensors(a, b)
        return Factors(b=found[b], a=found[a])

    def full(self, name: str) -> Tensor:
        """One fully trained tensor, in the dtype in which it travelled. Raises MismatchedSlice where there is none."""
        return self._tensors(f"full/{name}")[f"full/{name}"]

    def trained_factors(self, module: str, start: Callable[[], Factors]) -> Factors:
        """One module's factors of a trained slice; what did not travel is that of its start, the directions that it trained.

        Raises MismatchedSlice where there are none, and what `compact.restored` raises.
        """
        a, b = f"factors/{module}/a", f"factors/{module}/b"
        sent = self._tensors(*(name for name in (a, b) if name == b or name in self.header.entries))
        if a in sent and a + SCALES not in sent:
            return Factors(b=sent[b], a=sent[a])
        old = start()
        return Factors(b=_restored(sent, b, old.b), a=_restored(sent, a, old.a))

    def trained_full(self, name: str, start: Callable[[], Tensor]) -> Tensor:
        """One fully trained tensor of a trained slice. Raises what `trained_factors` raises."""
        sent = self._tensors(f"full/{name}")
        return sent[f"full/{name}"] if len(sent) == 1 else _restored(sent, f"full/{name}", start())

    def full_blocks(self, name: str, start: SliceReader) -> Iterator[tuple[Tensor, Tensor]]:
        """The same flat, (n,), with what it was in the slice that was handed out, a block at a time; where it came as int8, in one.

        The header was checked. Raises what `trained_factors` raises.
        """
        if self.header.entries[f"full/{name}"].dtype != WIRE_NAMES[Dtype.int8]:
            yield from zip(self._blocks(f"full/{name}"), start._blocks(f"full/{name}"), strict=True)
            return
        old = start.full(name)
        yield self.trained_full(name, lambda: old).reshape(-1), old.reshape(-1)

    def _blocks(self, name: str) -> Iterator[Tensor]:
        entry = self.header.entries[name]
        step = BLOCK * ((entry.stop - entry.start) // math.prod(entry.shape))  # bytes
        for first in range(entry.start, entry.stop, step):
            last = min(first + step, entry.stop)
            yield seen(memoryview(self.read(first, last)), replace(entry, shape=(-1,), start=first, stop=last))

    def _tensors(self, *names: str) -> dict[str, Tensor]:
        """These tensors, and the scales of those that have some; neighbours in one read."""
        known = self.header.entries
        scaled = [name + SCALES for name in names if name in known and known[name].dtype == WIRE_NAMES[Dtype.int8]]
        for name in (*names, *scaled):
            if name not in known:
                raise errors.MismatchedSlice(f"the slice has no tensor {name}", tensor=name)
        wanted = {name: known[name] for name in (*names, *scaled)}
        start, stop = min(e.start for e in wanted.values()), max(e.stop for e in wanted.values())
        if stop - start > sum(e.stop - e.start for e in wanted.values()):
            return {name: decode(self.read(e.start, e.stop), e) for name, e in wanted.items()}
        data = memoryview(self.read(start, stop))
        return {name: _seen(data, e, start) for name, e in wanted.items()}


def _seen(data: memoryview, entry: Entry, start: int) -> Tensor:
    """A tensor of the bytes that begin at `start`; where they are, unless int8 before them moved them."""
    first, last = entry.start - start, entry.stop - start
    return decode(data[first:last], entry) if first % Dtype.float32.size else seen(data[first:last], entry)


def _restored(sent: Mapping[str, Tensor], name: str, old: Tensor) -> Tensor:
    if name not in sent:
        return old
    return restored(name, sent[name], sent[name + SCALES], old) if name + SCALES in sent else sent[name]


@dataclass(frozen=True)
class StoredFactors:
    """One module's factors of a stored slice, read and checked for NaN when they are needed."""

    reader: SliceReader
    module: str

    @property
    def rank(self) -> int:
        return self.reader.header.label.rank

    def load(self) -> Factors:
        return _finite(self.module, self.reader.factors(self.module))


@dataclass(frozen=True)
class TrainedFactors:
    """One module's factors of a trained slice, the same; what did not travel is that of its start, the directions that it trained."""

    reader: SliceReader
    module: str
    start: Callable[[], Factors]

    @property
    def rank(self) -> int:
        return self.reader.header.label.rank

    def load(self) -> Factors:
        return _finite(self.module, self.reader.trained_factors(self.module, self.start))


def _finite(module: str, found: Factors) -> Factors:
    check_finite(f"factors/{module}/b", found.b)
    check_finite(f"factors/{module}/a", found.a)
    return found


def open_slice(blobs: Blobs, digest: str) -> SliceReader:
    """A slice in the blob store. Raises NotFound, MalformedSlice."""
    return SliceReader(_header(blobs.url, digest), partial(blobs.read_range, digest))


@contextmanager
def open_file(path: Path, largest_header: int = LARGEST_HEADER) -> Iterator[SliceReader]:
    """A slice in a file that nobody has checked, while the block lasts.

    Raises MalformedSlice, also for a header of more bytes than that: give what an honest one can have.
    """
    with path.open("rb", buffering=0) as file:
        length = path.stat().st_size
        size = min(int.from_bytes(read_at(file, 0, 8), "little"), largest_header - 8)
        header = read_header(read_at(file, 0, 8 + size), length)
        yield SliceReader(header, partial(read_at, file))


def learn(blobs: Blobs, digests: Iterable[str]) -> None:
    """Read these slices' tables of contents, several at a time where blobs are far. Raises NotFound, MalformedSlice."""
    if blobs.far:
        with ThreadPoolExecutor(AHEAD) as pool:
            for _ in pool.map(partial(_header, blobs.url), digests):
                pass


# A worker merges module after module of the same contributions; their tables of contents are read once.
@lru_cache(maxsize=4096)
def _header(url: str, digest: str) -> Header:
    blobs = Blobs.open(url)
    start, length = blobs.begin(digest, FIRST)
    size = 8 + int.from_bytes(start[:8], "little")
    found = read_header(start if size <= len(start) else blobs.read_range(digest, 0, min(size, length)), length)
    return replace(found, entries=_shared(tuple(found.entries.items())))


# All contributions of a rank have the same few; one for each would be most of a worker's memory.
@lru_cache(maxsize=256)
def _shared(entries: tuple[tuple[str, Entry], ...]) -> Mapping[str, Entry]:
    return dict(entries)


@contextmanager
def ahead(blobs: Blobs, stored: Sequence[TrainedFactors]) -> Iterator[Sequence[Stored]]:
    """The same factors; where blobs are far, each is read while those before it are used, if they are used in order."""
    if not blobs.far:
        yield stored
        return
    pool = ThreadPoolExecutor(AHEAD)
    try:
        queue = _Queue(stored, pool)
        yield [_Queued(queue, place) for place in range(len(stored))]
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass
class _Queue:
    """Factors that are read before they are asked for."""

    stored: Sequence[TrainedFactors]
    pool: ThreadPoolExecutor
    waiting: dict[int, Future[Factors]] = field(default_factory=dict)

    def load(self, place: int) -> Factors:
        for later in range(place, min(place + AHEAD, len(self.stored))):
            if later not in self.waiting:
                self.waiting[later] = self.pool.submit(self.stored[later].load)
        return self.waiting.pop(place).result()


@dataclass(frozen=True)
class _Queued:
    """One of them."""

    queue: _Queue
    place: int

    @property
    def rank(self) -> int:
        return self.queue.stored[self.place].rank

    def load(self) -> Factors:
        return self.queue.load(self.place)
