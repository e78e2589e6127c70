"""A slice on the wire: one safetensors file that carries its own label, the same bytes for the same content.

    factors/<module>/a   (r, n_in)        factors/<module>/b   (n_out, r)        full/<tensor>   as the model has it

Where a job trains b alone, a does not travel back. Trained slices may travel as int8 (see `compact`): then every tensor is
followed by its scales.

    factors/<module>/a/scales   (r,)      factors/<module>/b/scales   (r,)      full/<tensor>/scales   one for each row
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from protocol import errors
from protocol.contents import WIRE_NAMES, Entry, Label, head, read_header
from protocol.plan import Dtype, Layout, Sides

TORCH_DTYPES: Mapping[Dtype, torch.dtype] = {
    Dtype.float32: torch.float32,
    Dtype.bfloat16: torch.bfloat16,
    Dtype.float16: torch.float16,
    Dtype.int8: torch.int8,
}


@dataclass(frozen=True)
class Factors:
    """A pair of factors, standing for the update `scale · b @ a` of one weight matrix."""

    b: Tensor  # (n_out, r)
    a: Tensor  # (r, n_in)

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def leading(self, rank: int) -> Factors:
        """The first so many directions of them."""
        return Factors(b=self.b[:, :rank], a=self.a[:rank])

    def of(self, directions: Sequence[int] | None) -> Factors:
        """These directions of them, in that order; all if none are named. Raises MismatchedSlice for one that is not there."""
        if directions is None:
            return self
        if not all(0 <= i < self.rank for i in directions):
            raise errors.MismatchedSlice(f"directions {list(directions)[:20]} were named; there are {self.rank}")
        return Factors(b=self.b[:, list(directions)], a=self.a[list(directions)])


@dataclass(frozen=True)
class Slice:
    """The rank-r part of the global adapter, with the fully trained tensors."""

    label: Label
    factors: Mapping[str, Factors]
    full: Mapping[str, Tensor] = field(default_factory=dict)


def numbers(*tensors: Tensor, dtype: Dtype) -> bytes:
    """The tensors' numbers as they travel, one after another: row-major, little-endian."""
    return b"".join(_laid_out(tensor, dtype) for tensor in tensors)


def _laid_out(tensor: Tensor, dtype: Dtype) -> memoryview:
    """The same where they are, if they lie so; nobody may change them meanwhile."""
    found = tensor.detach().to("cpu", TORCH_DTYPES[dtype]).contiguous()
    return found.reshape(-1).view(torch.uint8).numpy().data  # of bytes: numpy knows no bfloat16


def tensors(slice: Slice, layout: Layout, sides: Sides = Sides.both) -> Iterator[Tensor]:
    """A slice's tensors in the order of the file."""
    for module in layout.modules:
        if sides is Sides.both:
            yield slice.factors[module].a
        yield slice.factors[module].b
    for name in layout.full:
        yield slice.full[name]


def parts(slice: Slice, layout: Layout, dtype: Dtype, sides: Sides = Sides.both) -> Iterator[bytes | memoryview]:
    """A slice's file, one tensor at a time, not copied where it lies as it travels. Equal slices give equal bytes."""
    yield head(layout, slice.label, dtype, sides)
    for tensor in tensors(slice, layout, sides):
        yield _laid_out(tensor, dtype)


def pack(slice: Slice, layout: Layout, dtype: Dtype) -> bytes:
    """A slice's file in one piece."""
    return b"".join(parts(slice, layout, dtype))


def digest(data: bytes) -> str:
    """The name of some bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def decode(data: bytes | bytearray | memoryview, entry: Entry) -> Tensor:
    """One tensor from its bytes, in the dtype in which it travelled; shares memory with nothing."""
    return seen(memoryview(bytearray(data)), entry)


def unpack(data: bytes) -> Slice:
    """A slice from its file's bytes. Raises MalformedSlice, or MismatchedSlice for tensors that no slice has."""
    header, view = read_header(data, len(data)), memoryview(data)
    return _assembled(header.label, {name: decode(view[e.start : e.stop], e) for name, e in header.entries.items()})


def read_file(file: Path) -> Slice:
    """A slice whose numbers stay in its file until they are looked at; the file may lose its name meanwhile, but not change.

    Raises MalformedSlice, or MismatchedSlice for tensors that no slice has.
    """
    with file.open("rb") as opened:
        if not (length := file.stat().st_size):
            raise errors.MalformedSlice(f"{file} is empty")
        data = memoryview(mmap.mmap(opened.fileno(), length, access=mmap.ACCESS_COPY))  # torch wants what could be written to
    size = int.from_bytes(data[:8], "little")
    header = read_header(bytes(data[: 8 + min(size, length)]), length)
    return _assembled(header.label, {name: seen(data[e.start : e.stop], e) for name, e in header.entries.items()})


def seen(data: memoryview, entry: Entry) -> Tensor:
    """One tensor where its bytes are; they must be writable, which torch wants, and lie at a multiple of the number's size."""
    dtype = TORCH_DTYPES[next(d for d, name in WIRE_NAMES.items() if name == entry.dtype)]
    return torch.frombuffer(data, dtype=dtype).reshape(entry.shape) if len(data) else torch.empty(entry.shape, dtype=dtype)


def _assembled(label: Label, found: Mapping[str, Tensor]) -> Slice:
    factors: dict[str, Factors] = {}
    full: dict[str, Tensor] = {}
    for name, tensor in found.items():
        if not tensor.is_floating_point():
            raise errors.MismatchedSlice(f"{name[:200]} is int8, which says what was changed of another slice; it is none by itself")
        match name.split("/"):
            case ["factors", module, "a"] if f"factors/{module}/b" in found:
                factors[module] = Factors(b=found[f"factors/{module}/b"], a=tensor)
            case ["factors", module, "b"] if f"factors/{module}/a" in found:
                pass
            case ["full", tensor_name]:
                full[tensor_name] = tensor
            case _:
                raise errors.MismatchedSlice(f"{name[:200]} is no tensor of a slice")
    return Slice(label=label, factors=factors, full=full)
