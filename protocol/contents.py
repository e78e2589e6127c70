"""A slice's table of contents: the label and what stands where, as it is written, bounded, and read from anybody.

The label stands in the file's metadata under one key, as JSON: metadata with several keys come out of the safetensors
library in an order that changes from process to process, and a slice's name is the digest of its bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import Field, ValidationError

from protocol import errors
from protocol.plan import LARGEST_RANK, Dtype, Layout, Sides
from protocol.strict import Digest, Strict

LABEL_KEY = "hlora"
HEADER_SLACK = 4096  # bytes by which an honest header may differ from ours: other labels, other padding
WIRE_NAMES: Mapping[Dtype, str] = {Dtype.float32: "F32", Dtype.bfloat16: "BF16", Dtype.float16: "F16", Dtype.int8: "I8"}
SCALES = "/scales"  # behind a tensor's name: the name of its scales


class Label(Strict):
    """What a slice says of itself."""

    rank: int = Field(ge=1, le=LARGEST_RANK)
    scale: float = Field(gt=0, description="s in s · b @ a")
    round: int = Field(ge=0, description="the round that published it, or that it was trained in")
    base: Digest | None = Field(default=None, description="a trained slice: the slice that it started from")
    examples: int | None = Field(default=None, ge=1, description="a trained slice: rows that it was trained on")


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
