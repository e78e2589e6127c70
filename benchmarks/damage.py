"""Damaged slices: mutations that know a slice's form, so that they get past the first check.

A slice is a length, a JSON header, and numbers. A mutation takes it apart, changes one thing, and most of the time puts it
together so that length and ranges agree again: only then is what follows them looked at.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Self

import torch

from protocol.checks import Expected
from protocol.compact import trained_parts
from protocol.contents import LABEL_KEY, Label, largest_length
from protocol.plan import BaseFacts, Dtype, Layout
from protocol.slices import Factors, Slice

LAYOUT = Layout(
    modules={"attention.key": (3, 5), "attention.query": (4, 2)},
    full={"head.bias": (2,)},
    base=BaseFacts(parameters=100, layers=1, hidden=4, vocabulary=10),
)
BASE = f"sha256:{0:064}"
EXPECTED = Expected(layout=LAYOUT, rank=2, scale=2.0, dtype=Dtype.float32, base=BASE, round=1)
COMPACT = replace(EXPECTED, dtype=Dtype.int8)  # the same of a plan whose uploads are int8
LARGEST = max(largest_length(LAYOUT, EXPECTED.rank, job.dtype) for job in (EXPECTED, COMPACT))


def seeds() -> list[bytes]:
    """Real slices: those that the jobs asked for first, then others that are sound but not them."""
    return [
        _real(EXPECTED.rank, Dtype.float32, base=BASE),
        _real(EXPECTED.rank, Dtype.int8, base=BASE),
        _real(EXPECTED.rank, Dtype.bfloat16, base=BASE),
        _real(EXPECTED.rank, Dtype.float16),
        _real(1, Dtype.float32, base=BASE),
        _real(3, Dtype.float32),
    ]


def _real(rank: int, dtype: Dtype, base: str | None = None) -> bytes:
    generator = torch.Generator().manual_seed(rank)
    factors = {
        module: Factors(b=torch.randn(n_out, rank, generator=generator), a=torch.randn(rank, n_in, generator=generator))
        for module, (n_out, n_in) in LAYOUT.modules.items()
    }
    full = {name: torch.randn(shape, generator=generator) for name, shape in LAYOUT.full.items()}
    label = Label(rank=rank, scale=EXPECTED.scale, round=EXPECTED.round, base=base, examples=5)
    return b"".join(trained_parts(Slice(label, factors, full), _start(rank), LAYOUT, dtype))


def _start(rank: int) -> Slice:
    """What the real slices began with: zeros."""
    factors = {m: Factors(b=torch.zeros(n_out, rank), a=torch.zeros(rank, n_in)) for m, (n_out, n_in) in LAYOUT.modules.items()}
    full = {name: torch.zeros(shape) for name, shape in LAYOUT.full.items()}
    return Slice(Label(rank=rank, scale=EXPECTED.scale, round=EXPECTED.round - 1), factors, full)


def given(module: str) -> Factors:
    """One module of what the slices that count began with."""
    return _start(EXPECTED.rank).factors[module]


# --- what is changed ---------------------------------------------------------------------------------------------------

SIZES = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1}
DTYPES: tuple[Any, ...] = (*SIZES, "F64", "U8", "BOOL", "", "f32", 4, None)
WHOLES: tuple[Any, ...] = (0, 1, 2, 3, -1, 2**31, 2**39, 2**40, 2**63, 2**64, 10**400, True, 1.0, 1e300, None, "2", [])
NAMES = (
    "",
    "/",
    "full/",
    "full/x",
    "factors/x/a",
    "factors/attention.key/c",
    "factors/attention.key/a/scales",
    "__metadata__",
    "\0",
    "\ud800",
    "\u202e",
    "é" * 300,
)
LABELS: tuple[Any, ...] = (0, -1, 1, 2, 3, 1.5, 1e300, float("nan"), float("inf"), None, "", BASE, "sha256:", [], {}, True, 2**70, "\0")
FLOATS = (float("nan"), float("inf"), float("-inf"), 3.4e38, -3.4e38, 1e-45, -1e-3, 0.0)
TEXTS = (b"[" * 2000, b"NaN", b"\xff", b"\\ud800", b"\\u0000", b'"a":1,', b"9" * 5000, b"{}", b" " * 64, b"\xef\xbb\xbf", b"1e999")


@dataclass
class Parts:
    """A slice taken apart: the header's pairs in their order, so that a key may stand there twice, and the numbers."""

    pairs: list[tuple[str, Any]]
    numbers: bytearray

    @classmethod
    def of(cls, data: bytes) -> Self:
        """Raises ValueError for what cannot be taken apart."""
        size = int.from_bytes(data[:8], "little")
        table = json.loads(data[8 : 8 + size].decode())
        if not isinstance(table, dict) or not table:
            raise ValueError("no table")
        return cls(list(table.items()), bytearray(data[8 + size :]))

    def put_together(self) -> bytes:
        text = ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in self.pairs)
        return _framed(f"{{{text}}}".encode()) + bytes(self.numbers)

    def agree(self) -> None:
        """Ranges that follow each other in the sizes of their shapes, as far as these have any; numbers of that length."""
        offset = 0
        for _, entry in self.pairs:
            size = _size(entry)
            if size is not None:
                entry["data_offsets"] = [offset, offset + size]
                offset += size
        self.numbers = self.numbers[:offset] + bytes(max(0, offset - len(self.numbers)))


def _framed(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def _size(entry: Any) -> int | None:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n <= LARGEST for n in shape):
        return None
    size = SIZES.get(entry.get("dtype"), 0) if isinstance(entry.get("dtype"), str) else 0
    for n in shape:
        size *= n
    return size if size <= LARGEST else None


def mutate(data: bytes, chance: Random) -> bytes:
    """The slice with one thing changed, or a few. Equal chances give equal bytes."""
    try:
        parts = Parts.of(data)
    except (ValueError, RecursionError):
        return _scratched(data, chance)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        chance.choice(CHANGES)(parts, chance)
    if chance.random() < 0.7:
        parts.agree()
    whole = parts.put_together()
    return whole if chance.random() < 0.8 else _scratched(whole, chance)


def _scratched(data: bytes, chance: Random) -> bytes:
    """Some bytes set, cut out or put in, anywhere; the length in front is mended or not."""
    at = chance.randrange(len(data) + 1)
    piece = chance.choice((*TEXTS, chance.randbytes(chance.randrange(1, 9)), b""))
    end = min(len(data), at + chance.choice((0, 1, len(piece), 8)))
    scratched = data[:at] + piece + data[end:]
    if chance.random() < 0.5 or len(data) < 8:
        return scratched
    return (int.from_bytes(data[:8], "little") + len(scratched) - len(data)).to_bytes(16, "little", signed=True)[:8] + scratched[8:]


def _entry(parts: Parts, chance: Random) -> dict[str, Any]:
    entries = [value for name, value in parts.pairs if isinstance(value, dict) and name != "__metadata__"]
    return chance.choice(entries) if entries else {}


def _retype(parts: Parts, chance: Random) -> None:
    _entry(parts, chance)["dtype"] = chance.choice(DTYPES)


def _reshape(parts: Parts, chance: Random) -> None:
    entry = _entry(parts, chance)
    shape = entry.get("shape")
    if not isinstance(shape, list) or not shape:
        entry["shape"] = [chance.choice(WHOLES)]
        return
    at = chance.randrange(len(shape))
    entry["shape"] = [*shape[:at], *(chance.choice(WHOLES) for _ in range(chance.choice((0, 1, 1, 2, 9)))), *shape[at + 1 :]]


def _move(parts: Parts, chance: Random) -> None:
    entry = _entry(parts, chance)
    start, stop = (entry["data_offsets"] + [0, 0])[:2] if isinstance(entry.get("data_offsets"), list) else (0, 0)
    entry["data_offsets"] = chance.choice(
        ([stop, start], [start, chance.choice(WHOLES)], [chance.choice(WHOLES), stop], [start], [], [start, stop, 0])
    )


def _rename(parts: Parts, chance: Random) -> None:
    at = chance.randrange(len(parts.pairs))
    other = chance.choice((chance.choice(NAMES), chance.choice(parts.pairs)[0], parts.pairs[at][0] + "x"))
    parts.pairs[at] = (other, parts.pairs[at][1])


def _drop(parts: Parts, chance: Random) -> None:
    parts.pairs.pop(chance.randrange(len(parts.pairs)))
    parts.pairs = parts.pairs or [("__metadata__", {})]


def _double(parts: Parts, chance: Random) -> None:
    name, value = chance.choice(parts.pairs)
    parts.pairs.insert(chance.randrange(len(parts.pairs) + 1), (name + chance.choice(("", "x")), json.loads(json.dumps(value))))


def _empty(parts: Parts, chance: Random) -> None:
    shape = chance.choice(([0], [0, 2**39], [2**39, 2**39, 0], [1, 0, 1], []))
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    parts.pairs.insert(chance.randrange(len(parts.pairs) + 1), (f"full/{chance.randrange(3)}", entry))


def _odd(parts: Parts, chance: Random) -> None:
    """An entry that is something else, or has one key more."""
    at = chance.randrange(len(parts.pairs))
    name, value = parts.pairs[at]
    changed = {**value, chance.choice(NAMES): 1} if isinstance(value, dict) and chance.random() < 0.5 else chance.choice((*WHOLES, {}))
    parts.pairs[at] = (name, changed)


def _relabel(parts: Parts, chance: Random) -> None:
    text = next((value.get(LABEL_KEY) for _, value in parts.pairs if isinstance(value, dict) and LABEL_KEY in value), None)
    try:
        label = json.loads(text) if isinstance(text, str) else {}
    except (ValueError, RecursionError):
        label = {}
    label = label if isinstance(label, dict) else {}
    label[chance.choice((*Label.model_fields, *NAMES))] = chance.choice(LABELS)
    told = chance.choice((json.dumps(label),) * 6 + (label, json.dumps(label)[:-1], json.dumps(text), "\ud800", "[" * 5000, None))
    parts.pairs = [pair for pair in parts.pairs if pair[0] != "__metadata__"]
    parts.pairs.insert(0, ("__metadata__", {LABEL_KEY: told}))


def _renumber(parts: Parts, chance: Random) -> None:
    """One number that is odd, or that was one."""
    if len(parts.numbers) >= 4:
        at = chance.choice((4, 2, 1)) * chance.randrange(len(parts.numbers) // 4)
        new = chance.choice((struct.pack("<f", chance.choice(FLOATS)), chance.randbytes(4), b"\x80"))  # −128 of int8
        parts.numbers[at : at + len(new)] = new


CHANGES: tuple[Callable[[Parts, Random], None], ...] = (
    _retype,
    _reshape,
    _move,
    _rename,
    _drop,
    _double,
    _empty,
    _odd,
    _relabel,
    _relabel,
    _renumber,
    _renumber,
)
