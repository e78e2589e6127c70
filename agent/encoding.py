"""Rows become token ids, and token ids become batches."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog
import torch
from torch import Tensor

from agent.readers import Row, semicolons
from protocol import errors
from protocol.plan import CausalLM, SequenceClassification, Task

log = structlog.get_logger("agent")

WHOLE = re.compile(r"([+-]?[0-9]+)\.0")  # a whole number as it is written where a column has numbers or nothing
IGNORED = -100  # the label that cross-entropy leaves out
MULTIPLE = 8  # batches are padded to a multiple of this: fewer shapes for the kernels to prepare for


class Tokenizer(Protocol):
    """What is needed of transformers' tokenizers."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text."""
        ...

    def __call__(self, text: str, pair: str | None = None, /, **how: object) -> Mapping[str, list[int]]:
        """Ids, and segments if the model tells texts apart."""
        ...


@dataclass(frozen=True, slots=True)
class Example:
    """One row, ready to be learned."""

    ids: array[int]  # (tokens,)
    segments: array[int] | None  # (tokens,) 0 for the first text, 1 for the second, where the model tells them apart
    target: int  # the label's number; or, for a language model, the first token that is learned

    def weight(self, task: Task) -> int:
        """What the row counts in a mean: one, or the number of its learned tokens."""
        return 1 if task.kind == "sequence-classification" else len(self.ids) - max(1, self.target)


@dataclass(frozen=True)
class Batch:
    """Rows padded to one length."""

    inputs: dict[str, Tensor]  # ids, mask and, if the model has them, segments: (rows, tokens)
    labels: Tensor  # (rows,) classes, or (rows, tokens) ids with −100 where nothing is learned
    weight: int  # rows, or learned tokens


def encode(rows: Iterable[tuple[int, Row]], task: Task, tokenizer: Tokenizer, alias: str) -> list[Example]:
    """All rows of use. Texts longer than the task allows are cut; a row of which nothing remains to be learned is left out.

    rows: with the numbers that refusals name them by.
    Raises DataRefusal for a missing column, a text that is none, a missing or unknown label, or where no row is of use.
    """
    encoded: Callable[[Row, int], Example | None]
    encoded = _Classified(task, tokenizer, alias) if isinstance(task, SequenceClassification) else _Continued(task, tokenizer, alias)
    examples, left_out = list[Example](), 0
    for n, row in rows:
        if (example := encoded(row, n)) is not None:
            examples.append(example)
        else:
            left_out += 1
    if not examples:
        raise errors.DataRefusal(f"{alias!r} has no row of which anything can be learned", alias=alias)
    if left_out:
        log.warning("rows-left-out", data=alias, rows=left_out, kept=len(examples), why="the prompt fills max_length")
    return examples


class _Classified:
    def __init__(self, task: SequenceClassification, tokenizer: Tokenizer, alias: str) -> None:
        self.task, self.tokenizer, self.alias = task, tokenizer, alias
        self.numbers = {label: n for n, label in enumerate(task.labels)}
        self.numbers = {_whole(label): n for label, n in self.numbers.items()} | self.numbers

    def __call__(self, row: Row, n: int) -> Example:
        text = _text(row, self.task.text, n, self.alias)
        pair = None if self.task.text_pair is None else _text(row, self.task.text_pair, n, self.alias)
        label = _label(row, self.task.label, n, self.alias)
        number = self.numbers.get(label, self.numbers.get(_whole(label)))
        if number is None:
            raise errors.DataRefusal(
                f"row {n} of {self.alias!r} has a {self.task.label} that is none of the plan's labels ({', '.join(self.task.labels[:20])})",
                alias=self.alias,
                row=n,
                labels=self.task.labels[:20],
            )
        found = self.tokenizer(text, pair, truncation=True, max_length=self.task.max_length)
        segments = found.get("token_type_ids")
        return Example(array("i", found["input_ids"]), array("i", segments) if segments else None, number)


class _Continued:
    """The prompt is tokenised by itself, as it will be when the model is used, and the text is put after it."""

    def __init__(self, task: CausalLM, tokenizer: Tokenizer, alias: str) -> None:
        self.task, self.tokenizer, self.alias = task, tokenizer, alias

    def __call__(self, row: Row, n: int) -> Example | None:
        text = _text(row, self.task.text, n, self.alias)
        prompt: list[int] = []
        if self.task.prompt is not None:
            prompt = self._open(self.tokenizer(_text(row, self.task.prompt, n, self.alias))["input_ids"])
        learned = self._open(self.tokenizer(text, add_special_tokens=self.task.prompt is None)["input_ids"])
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        ids = [*prompt, *learned, *end][: self.task.max_length]
        example = Example(array("i", ids), None, len(prompt))
        return example if example.weight(self.task) > 0 else None

    def _open(self, ids: list[int]) -> list[int]:
        """Without the end that some tokenizers put after every text."""
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids


def _value(row: Row, column: str, n: int, alias: str) -> object:
    if column not in row:
        raise errors.DataRefusal(
            f"row {n} of {alias!r} has no column {column!r}, only {', '.join(row)}" + (semicolons(row) or "; map one in its columns"),
            alias=alias,
            row=n,
            column=column,
            known=list(row),
        )
    return row[column]


def _text(row: Row, column: str, n: int, alias: str) -> str:
    value = _value(row, column, n, alias)
    if not isinstance(value, str):
        raise errors.DataRefusal(f"row {n} of {alias!r} has no text in {column!r}, but {type(value).__name__}", alias=alias, row=n)
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can write half of a character, which no tokenizer takes
        raise errors.DataRefusal(f"row {n} of {alias!r} has half of a character in {column!r}; mend it", alias=alias, row=n) from None
    return value


def _label(row: Row, column: str, n: int, alias: str) -> str:
    """A label as plans write it: 1 and 1.0 are "1", true is "true". Raises DataRefusal where there is none."""
    value = _value(row, column, n, alias)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise errors.DataRefusal(f"row {n} of {alias!r} has no label in {column!r}; add it, or remove the row", alias=alias, row=n)
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _whole(label: str) -> str:
    """1.0 as 1; any other label as it is."""
    found = WHOLE.fullmatch(label)
    return found[1] if found else label


def collate(examples: Sequence[Example], task: Task, pad: int, device: torch.device) -> Batch:
    """Rows padded on the right; padding is masked and never learned."""
    longest = max(len(example.ids) for example in examples)
    width = min(-(-longest // MULTIPLE) * MULTIPLE, max(task.max_length, longest))
    inputs = {
        "input_ids": _padded((e.ids for e in examples), width, pad),
        "attention_mask": _padded(([1] * len(e.ids) for e in examples), width, 0),
    }
    if examples[0].segments is not None:
        inputs["token_type_ids"] = _padded((e.segments or () for e in examples), width, 0)
    if isinstance(task, SequenceClassification):
        labels = torch.tensor([e.target for e in examples])
    else:
        labels = _padded(([IGNORED] * e.target + list(e.ids[e.target :]) for e in examples), width, IGNORED)
    weight = sum(e.weight(task) for e in examples)
    return Batch({name: tensor.to(device) for name, tensor in inputs.items()}, labels.to(device), weight)


def _padded(rows: Iterable[Sequence[int]], width: int, value: int) -> Tensor:
    return torch.tensor([[*row, *([value] * (width - len(row)))] for row in rows], dtype=torch.long)


def batches(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    """Examples in batches of like length, longest first, so that little is padding and too much memory shows at once."""
    ordered = sorted(examples, key=lambda example: -len(example.ids))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]
