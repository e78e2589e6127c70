"""Slices that lie: each is an honest one with a single thing changed, by the problem that it must be answered with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from protocol import errors, slices
from protocol.messages import Job
from protocol.slices import Factors, Slice

JSON = dict[str, Any]
FIRST = "factors/attention.key/a"
LAST = "full/head.weight"


@dataclass(frozen=True)
class Parts:
    """An honest slice taken apart."""

    table: JSON
    numbers: bytes

    @classmethod
    def of(cls, data: bytes) -> Parts:
        size = int.from_bytes(data[:8], "little")
        return cls(json.loads(data[8 : 8 + size]), data[8 + size :])

    def entry(self, name: str, **changes: Any) -> bytes:
        """The file with one entry changed."""
        return pack(self.table | {name: self.table[name] | changes}, self.numbers)

    def label(self, **changes: Any) -> bytes:
        """The file with another label."""
        label = json.loads(self.table["__metadata__"]["hlora"]) | changes
        return pack(self.table | {"__metadata__": {"hlora": json.dumps(label)}}, self.numbers)

    def text(self, old: str, new: str) -> bytes:
        """The file with a piece of its header's text replaced."""
        text = json.dumps(self.table)
        assert old in text
        return raw(text.replace(old, new, 1).encode(), self.numbers)

    def renamed(self, name: str, other: str) -> bytes:
        """The file with one tensor under another name."""
        return pack({other if key == name else key: value for key, value in self.table.items()}, self.numbers)


def pack(table: object, numbers: bytes) -> bytes:
    """A file with any header at all."""
    return raw(json.dumps(table).encode(), numbers)


def raw(text: bytes, numbers: bytes) -> bytes:
    """A file with any text at all for a header."""
    return len(text).to_bytes(8, "little") + text + numbers


def without(table: JSON, *names: str) -> JSON:
    return {name: entry for name, entry in table.items() if name not in names}


Lie = Callable[[Parts], bytes]

MALFORMED: dict[str, Lie] = {
    "nothing": lambda p: b"",
    "seven bytes": lambda p: b"\0" * 7,
    "a header longer than the file": lambda p: (10**6).to_bytes(8, "little") + b"{}",
    "a header longer than any memory": lambda p: (2**64 - 1).to_bytes(8, "little") + b"{}",
    "an empty header": lambda p: raw(b"", p.numbers),
    "no JSON": lambda p: raw(b"\x80\x04pickle", p.numbers),
    "half of the JSON": lambda p: raw(json.dumps(p.table).encode()[:-1], p.numbers),
    "two JSON objects": lambda p: raw(b"{}{}", p.numbers),
    "a list": lambda p: pack([], p.numbers),
    "JSON without end": lambda p: raw(b"[" * 3000, b""),
    "a number without end": lambda p: raw(b'{"__metadata__": ' + b"9" * 4500 + b"}", b""),
    "a header in UTF-16": lambda p: raw(json.dumps(p.table).encode("utf-16"), p.numbers),
    "a key twice": lambda p: p.text(f'"{FIRST}"', f'"{FIRST}": {json.dumps(p.table[FIRST])}, "{FIRST}"'),
    "a member twice": lambda p: p.text('"dtype": ', '"dtype": "F32", "dtype": '),
    "no metadata": lambda p: pack(without(p.table, "__metadata__"), p.numbers),
    "metadata that are a list": lambda p: pack(p.table | {"__metadata__": []}, p.numbers),
    "metadata of another format": lambda p: pack(p.table | {"__metadata__": {"format": "pt"}}, p.numbers),
    "a label that is no text": lambda p: pack(p.table | {"__metadata__": {"hlora": {}}}, p.numbers),
    "a label that is no JSON": lambda p: pack(p.table | {"__metadata__": {"hlora": "rank 4"}}, p.numbers),
    "half a character in the label": lambda p: pack(p.table | {"__metadata__": {"hlora": '"\ud800"'}}, p.numbers),
    "a label that says more": lambda p: p.label(weight=10**9),
    "a label with a NUL for a name": lambda p: p.label(**{"\0": 1}),
    "a label with a name that turns the text round": lambda p: p.label(**{"\u202e": 1}),
    "a label of rank zero": lambda p: p.label(rank=0),
    "a label with no number for a scale": lambda p: p.label(scale=float("nan")),
    "a label of no examples": lambda p: p.label(examples=-5),
    "a gap before the first": lambda p: p.entry(FIRST, data_offsets=[4, p.table[FIRST]["data_offsets"][1] + 4]),
    "an overlap": lambda p: p.entry(LAST, data_offsets=[0, 32]),
    "bytes that nobody owns": lambda p: pack(p.table, p.numbers + b"\0" * 8),
    "bytes that are not there": lambda p: pack(p.table, p.numbers[:-4]),
    "offsets that run backwards": lambda p: p.entry(FIRST, data_offsets=[240, 0]),
    "a negative offset": lambda p: p.entry(FIRST, data_offsets=[-240, 0]),
    "an offset beyond the file": lambda p: p.entry(LAST, data_offsets=[2**39, 2**39 + 32]),
    "an offset beyond counting": lambda p: p.entry(LAST, data_offsets=[2**70, 2**70 + 32]),
    "an offset that is true": lambda p: p.entry(FIRST, data_offsets=[False, 240]),
    "half an offset": lambda p: p.entry(FIRST, data_offsets=[0.0, 240]),
    "three offsets": lambda p: p.entry(FIRST, data_offsets=[0, 120, 240]),
    "no offsets": lambda p: pack(p.table | {FIRST: without(p.table[FIRST], "data_offsets")}, p.numbers),
    "an entry that says more": lambda p: p.entry(FIRST, weight=1),
    "an entry that is null": lambda p: pack(p.table | {FIRST: None}, p.numbers),
    "a shape of another size": lambda p: p.entry(FIRST, shape=[4, 16]),
    "a negative side": lambda p: p.entry(FIRST, shape=[-4, -15]),
    "a side beyond counting": lambda p: p.entry(FIRST, shape=[2**62, 2**62]),
    "a side of nothing beside sides beyond counting": lambda p: pack(
        p.table | {"more": {"dtype": "F32", "shape": [2**39, 2**39, 0], "data_offsets": [len(p.numbers)] * 2}}, p.numbers
    ),
    "a side that is true": lambda p: p.entry(FIRST, shape=[4, 15, True]),
    "a shape of fifty sides": lambda p: p.entry(FIRST, shape=[4, 15] + [1] * 48),
    "a dtype that is smaller": lambda p: p.entry(FIRST, dtype="F16"),
    "a name with NUL": lambda p: p.renamed(FIRST, "factors/\0/a"),
    "a name of half a character": lambda p: p.renamed(FIRST, "factors/\ud800/a"),
    "a name of half a character, raw": lambda p: raw(
        json.dumps(p.table).encode().replace(b"attention.key/a", b"attention.\xed\xa0\x80/a"), p.numbers
    ),
    "a name without end at the wrong place": lambda p: pack(
        without(p.table, FIRST) | {"x" * 2100: p.table[FIRST] | {"data_offsets": [4, 244]}}, p.numbers
    ),
    "a name with a line break": lambda p: p.renamed(FIRST, "factors/a\nINFO all is well/a"),
}

MISMATCHED: dict[str, Lie] = {
    "integers": lambda p: p.entry(FIRST, dtype="I64"),
    "doubles": lambda p: p.entry(FIRST, dtype="F64"),
    "an unknown dtype": lambda p: p.entry(FIRST, dtype="X" * 1000),
    "a dtype in small letters": lambda p: p.entry(FIRST, dtype="f32"),
    "a dtype of half a character": lambda p: p.entry(FIRST, dtype="\ud800"),
    "a shape turned round": lambda p: p.entry(FIRST, shape=[15, 4]),
    "one side more": lambda p: p.entry(FIRST, shape=[4, 15, 1]),
    "a flat tensor": lambda p: p.entry(FIRST, shape=[60]),
    "a tensor under another name": lambda p: p.renamed(FIRST, "factors/attention.value/a"),
    "a tensor under PEFT's name": lambda p: p.renamed(FIRST, "base_model.model.attention.key.lora_A.weight"),
    "a path for a name": lambda p: p.renamed(FIRST, "../../../etc/passwd"),
    "a name without end": lambda p: p.renamed(FIRST, "x" * 2000),
    "an empty name": lambda p: p.renamed(FIRST, ""),
    "a tensor too few": lambda p: pack(without(p.table, LAST), p.numbers[:-32]),
    "a tensor too many": lambda p: pack(
        p.table | {"more": {"dtype": "F32", "shape": [1], "data_offsets": [len(p.numbers), len(p.numbers) + 4]}}, p.numbers + b"\0" * 4
    ),
    "a tensor of nothing too many": lambda p: pack(
        p.table | {"more": {"dtype": "F32", "shape": [0], "data_offsets": [len(p.numbers)] * 2}}, p.numbers
    ),
    "no tensor": lambda p: pack({"__metadata__": p.table["__metadata__"]}, b""),
    "another rank on the label": lambda p: p.label(rank=2),
    "another scale": lambda p: p.label(scale=16.0),
    "a scale beyond any": lambda p: p.label(scale=1e308),
    "another base": lambda p: p.label(base="sha256:" + "0" * 64),
    "no base": lambda p: p.label(base=None),
    "another round": lambda p: p.label(round=7),
}


def _with(start: Slice, job: Job, value: float, *, module: str | None = None, tensor: str | None = None, side: str = "a") -> bytes:
    """The slice with one number changed."""
    factors, full = dict(start.factors), dict(start.full)
    if module is not None:
        pair = {"a": factors[module].a.clone(), "b": factors[module].b.clone()}
        pair[side][-1, -1] = value
        factors[module] = Factors(b=pair["b"], a=pair["a"])
    if tensor is not None:
        full[tensor] = full[tensor].clone()
        full[tensor].view(-1)[-1] = value
    return slices.pack(replace(start, factors=factors, full=full), job.layout, job.wire)


NON_FINITE: dict[str, Callable[[Slice, Job], bytes]] = {
    "NaN in a": lambda s, j: _with(s, j, float("nan"), module="attention.key"),
    "NaN in b": lambda s, j: _with(s, j, float("nan"), module="attention.query", side="b"),
    "infinity in a": lambda s, j: _with(s, j, float("inf"), module="attention.key"),
    "minus infinity in b": lambda s, j: _with(s, j, float("-inf"), module="attention.key", side="b"),
    "NaN in the head": lambda s, j: _with(s, j, float("nan"), tensor="head.bias"),
    "infinity in the head": lambda s, j: _with(s, j, float("inf"), tensor="head.weight"),
}


def of_rank(start: Slice, rank: int) -> Slice:
    """The slice cut to another rank, with a label that says so."""
    factors = {module: Factors(b=pair.b[:, :rank], a=pair.a[:rank]) for module, pair in start.factors.items()}
    return Slice(start.label.model_copy(update={"rank": rank}), factors, start.full)


def grown(start: Slice, size: float) -> Slice:
    """The slice with every number as large as that, or as large as its dtype allows."""

    def full(tensor: Tensor) -> Tensor:
        return torch.full_like(tensor, min(size, torch.finfo(tensor.dtype).max))

    factors = {module: Factors(b=full(pair.b), a=full(pair.a)) for module, pair in start.factors.items()}
    return Slice(start.label, factors, {name: full(tensor) for name, tensor in start.full.items()})


def lies() -> list[tuple[str, type[errors.InvalidSlice], Lie]]:
    """Every lie of a header, with the answer that it must get."""
    found: list[tuple[str, type[errors.InvalidSlice], Lie]] = [(what, errors.MalformedSlice, lie) for what, lie in MALFORMED.items()]
    return found + [(what, errors.MismatchedSlice, lie) for what, lie in MISMATCHED.items()]
