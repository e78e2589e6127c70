"""A slice on the wire: one safetensors file that carries its own label, the same bytes for the same content.

    factors/<module>/a   (r, n_in)        factors/<module>/b   (n_out, r)        full/<tensor>   as the model has it

Where a job trains b alone, a does not travel back. Trained slices may travel as int8 (see `compact`): then every tensor is
followed by its scales.

    factors/<module>/a/scales   (r,)      factors/<module>/b/scales   (r,)      full/<tensor>/scales   one for each row

The label stands in the file's metadata under one key, as JSON: metadata with several keys come out of the safetensors
library in an order that changes from process to process, and a slice's name is the digest of its bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from protocol import errors
from protocol.plan import LARGEST_RANK, Dtype, Layout, Sides
from protocol.strict import Digest, Strict

LABEL_KEY = "hlora"
HEADER_SLACK = 4096  # bytes by which an honest header may differ from ours: other labels, other padding
TORCH_DTYPES: Mapping[Dtype, torch.dtype] = {
    Dtype.float32: torch.float32,
    Dtype.bfloat16: torch.bfloat16,
    Dtype.float16: torch.float16,
    Dtype.int8: torch.int8,
}
WIRE_NAMES: Mapping[Dtype, str] = {Dtype.float32: "F32", Dtype.bfloat16: "BF16", Dtype.float16: "F16", Dtype.int8: "I8"}
SCALES = "/scales"  # behind a tensor's name: the name of its scales


@dataclass(frozen=True)
class Factors:
    """A pair of factors, standing for the update `scale · b @ a` of one weight matrix."""

    b: Tensor  # (n_out, r)
    a: Tensor  # (r, n_in)

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def of(self, directions: Sequence[int] | None) -> Factors:
        """These directions of them, in that order; all if none are named. Raises MismatchedSlice for one that is not there."""
        if directions is None:
            return self
        if not all(0 <= i < self.rank for i in directions):
            raise errors.MismatchedSlice(f"directions {list(directions)[:20]} were named; there are {self.rank}")
        return Factors(b=self.b[:, list(directions)], a=self.a[list(directions)])


class Label(Strict):
    """What a slice says of itself."""

    rank: int = Field(ge=1, le=LARGEST_RANK)
    scale: float = Field(gt=0, description="s in s · b @ a")
    round: int = Field(ge=0, description="the round that published it, or that it was trained in")
    base: Digest | None = Field(default=None, description="a trained slice: the slice that it started from")
    examples: int | None = Field(default=None, ge=1, description="a trained slice: rows that it was trained on")


@dataclass(frozen=True)
class Slice:
    """The rank-r part of the global adapter, with the fully trained tensors."""

    label: Label
    factors: Mapping[str, Factors]
    full: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in a slice's file."""

    dtype: str  # safetensors' name, such as F32
    shape: tuple[int, ...]
    start: int  # first byte, counted from the file's first byte
    stop: int


@dataclass(frozen=True)
class Header:
    """A slice's table of contents."""

    label: Label
    entries: Mapping[str, Entry]
    length: int  # bytes of the whole file


def names(layout: Layout, rank: int, sides: Sides = Sides.both) -> dict[str, tuple[int, ...]]:
    """Every tensor of a slice and its shape, in the order of the file."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module, (n_out, n_in) in layout.modules.items():
        if sides is Sides.both:
            shapes[f"factors/{module}/a"] = (rank, n_in)
        shapes[f"factors/{module}/b"] = (n_out, rank)
    shapes.update({f"full/{name}": tuple(shape) for name, shape in layout.full.items()})
    return shapes


def contents(layout: Layout, rank: int, dtype: Dtype, sides: Sides = Sides.both) -> dict[str, tuple[Dtype, tuple[int, ...]]]:
    """Every tensor of a slice's file with its dtype and shape, in the order of the file."""
    found: dict[str, tuple[Dtype, tuple[int, ...]]] = {}
    for name, shape in names(layout, rank, sides).items():
        found[name] = (dtype, shape)
        if dtype is Dtype.int8:
            found[name + SCALES] = (Dtype.float32, (scales(name, shape),))
    return found


def scales(name: str, shape: tuple[int, ...]) -> int:
    """How many scales an int8 tensor has: one for each direction, or for each row of a fully trained tensor that has rows."""
    if name.startswith("factors/"):
        return shape[1] if name.endswith("/b") else shape[0]
    return shape[0] if len(shape) > 1 else 1


def head(layout: Layout, label: Label, dtype: Dtype, sides: Sides = Sides.both) -> bytes:
    """The first bytes of a slice, up to its first number: length, then header, padded to eight bytes."""
    table: dict[str, object] = {"__metadata__": {LABEL_KEY: label.model_dump_json(exclude_none=True)}}
    offset = 0
    for name, (kind, shape) in contents(layout, label.rank, dtype, sides).items():
        size = kind.size * math.prod(shape)
        table[name] = {"dtype": WIRE_NAMES[kind], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def largest_length(layout: Layout, rank: int, dtype: Dtype, sides: Sides = Sides.both) -> int:
    """The most bytes that an honest slice of this rank can have, known before its first byte comes."""
    label = Label(rank=rank, scale=1.0, round=0)
    return len(head(layout, label, dtype, sides)) + HEADER_SLACK + body_length(layout, rank, dtype, sides)


def body_length(layout: Layout, rank: int, dtype: Dtype, sides: Sides = Sides.both) -> int:
    """The bytes of all numbers of a slice of this rank; counted, for large fleets ask for it many times."""
    size = dtype.size * layout.numbers(rank, sides)
    if dtype is not Dtype.int8:
        return size
    directions = rank * len(layout.modules) * (2 if sides is Sides.both else 1)
    return size + Dtype.float32.size * (directions + sum(scales(f"full/{name}", shape) for name, shape in layout.full.items()))


def numbers(tensor: Tensor, dtype: Dtype) -> bytes:
    """A tensor's numbers as they travel: row-major, little-endian."""
    bits = {4: torch.int32, 2: torch.int16, 1: torch.int8}[dtype.size]  # numpy knows no bfloat16
    return tensor.detach().to("cpu", TORCH_DTYPES[dtype]).view(bits).numpy().tobytes()


def tensors(slice: Slice, layout: Layout, sides: Sides = Sides.both) -> Iterator[Tensor]:
    """A slice's tensors in the order of the file."""
    for module in layout.modules:
        if sides is Sides.both:
            yield slice.factors[module].a
        yield slice.factors[module].b
    for name in layout.full:
        yield slice.full[name]


def parts(slice: Slice, layout: Layout, dtype: Dtype, sides: Sides = Sides.both) -> Iterator[bytes]:
    """A slice's file, one tensor at a time. Equal slices give equal bytes."""
    yield head(layout, slice.label, dtype, sides)
    for tensor in tensors(slice, layout, sides):
        yield numbers(tensor, dtype)


def pack(slice: Slice, layout: Layout, dtype: Dtype) -> bytes:
    """A slice's file in one piece."""
    return b"".join(parts(slice, layout, dtype))


def digest(data: bytes) -> str:
    """The name of some bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def read_header(start: bytes | bytearray, length: int) -> Header:
    """The table of contents, from the file's first bytes and its length.

    Raises MalformedSlice unless it is a well-formed safetensors header with our label: valid JSON without a key twice,
    ranges that begin at zero, follow each other without gap or overlap, end with the file, and have their shape's size.
    """
    if len(start) < 8:
        raise errors.MalformedSlice(f"a slice begins with its header's length in eight bytes; only {len(start)} came")
    size = int.from_bytes(start[:8], "little")
    if size > length - 8:
        raise errors.MalformedSlice(f"the header says it is {size} bytes long, the file has {length}")
    if size > len(start) - 8:
        raise errors.MalformedSlice(f"the header is {size} bytes long; at most {len(start) - 8} were expected")
    try:
        table = json.loads(start[8 : 8 + size].decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise errors.MalformedSlice(f"the header is no JSON object that safetensors allows: {error}") from None
    if not isinstance(table, dict):
        raise errors.MalformedSlice("the header is not a JSON object")
    label = _label(table.pop("__metadata__", None))
    entries = {name: _entry(name, entry, 8 + size) for name, entry in table.items()}
    expected = 8 + size
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != expected:
            raise errors.MalformedSlice(
                f"{name[:200]} begins at byte {entry.start}; {expected} was expected: ranges must neither overlap nor leave gaps"
            )
        expected = entry.stop
    if expected != length:
        raise errors.MalformedSlice(f"the tensors end at byte {expected}, the file at {length}")
    return Header(label=label, entries=entries, length=length)


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _label(metadata: object) -> Label:
    text = metadata.get(LABEL_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise errors.MalformedSlice(f"the metadata have no label under {LABEL_KEY!r}")
    try:
        return Label.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(x) for x in first["loc"])[:200] or "text"
        # A key of the sender's own may be no text: it could neither be told to anybody nor stored.
        raise errors.MalformedSlice(f"the label's {where if where.isprintable() else ascii(where)} is wrong: {first['msg']}") from None


_SIZES = {name: dtype.size for dtype, name in WIRE_NAMES.items()}


def _entry(name: str, entry: object, data: int) -> Entry:
    if not name.isprintable():  # half a character or a NUL could neither be told to anybody nor stored
        raise errors.MalformedSlice(f"the header names a tensor {name[:200]!a}, which is not text")
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)], **rest} if not rest:
            pass
        case _:
            raise errors.MalformedSlice(f"the header's entry of {name[:200]} is not {{dtype, shape, data_offsets}}")
    if dtype not in _SIZES:
        raise errors.MismatchedSlice(f"{name[:200]} is {dtype[:20]!r}; {', '.join(_SIZES)} were expected")
    if not all(type(n) is int and 0 <= n < 2**40 for n in (*shape, start, stop)) or start > stop or len(shape) > 8:
        raise errors.MalformedSlice(f"the header's entry of {name[:200]} has impossible numbers")
    if math.prod(n for n in shape if n) >= 2**40:  # a zero beside it makes it no smaller for torch, which counts its strides
        raise errors.MalformedSlice(f"the header's entry of {name[:200]} has an impossible shape")
    if stop - start != math.prod(shape) * _SIZES[dtype]:
        raise errors.MalformedSlice(f"{name[:200]} has shape {shape} of {dtype} but {stop - start} bytes")
    return Entry(dtype=dtype, shape=tuple(shape), start=data + start, stop=data + stop)


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
