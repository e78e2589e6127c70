"""The finished adapter in a user's hands: loaded with PEFT, measured again, and asked for some labels.

The only part of the demonstration that needs model libraries; import it where it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from demo.departments import Department, Row
from modelling.export import Loaded, load_adapter
from protocol.plan import Plan, SequenceClassification

BATCH = 32


@dataclass(frozen=True)
class Prediction:
    """One held-out row and what the model makes of it."""

    text: str
    truth: str
    without: str  # the base model with its untrained head
    guess: str
    confidence: float


@dataclass(frozen=True)
class Trial:
    """What the pulled adapters do outside the federation."""

    accuracy: float  # the largest rank, on the held-out rows of all departments
    accuracy_own_rank: float  # each department's rows at its own rank, which is what the federation measured
    predictions: Sequence[Prediction]


def open_adapter(folder: Path, plan: Plan) -> Loaded:
    """The adapter on its base model, by `PeftModel.from_pretrained`."""
    return load_adapter(folder, labels=_task(plan).labels, model=plan.model)


def try_out(folders: Mapping[int, Path], ranks: Mapping[str, int], departments: Sequence[Department], plan: Plan, count: int) -> Trial:
    """Measure the adapters pulled at these ranks on rows that nobody trained on, and show `count` of the predictions."""
    torch.set_num_threads(1)
    torch.manual_seed(plan.seed)  # of the untrained head, which the base model has without the adapter
    right = 0
    for rank, folder in folders.items():
        mine = [row for department in departments if ranks[department.name] == rank for row in department.held_out]
        right += _right(mine, _probabilities(open_adapter(folder, plan), mine, plan), plan) if mine else 0
    rows = [row for department in departments for row in department.held_out]
    largest = open_adapter(folders[max(folders)], plan)
    probabilities = _probabilities(largest, rows, plan)
    return Trial(
        accuracy=_right(rows, probabilities, plan) / len(rows),
        accuracy_own_rank=right / len(rows),
        predictions=_predictions(largest, some(rows, count), plan),
    )


def some(rows: Iterable[Row], count: int) -> list[Row]:
    """A few short rows, no two of one label as long as there are others: chosen before anybody knows what the model says."""
    short = sorted(rows, key=lambda row: (abs(len(row.text) - 90), row.text))
    first = list({row.label: row for row in reversed(short)}.values())
    return (first[::-1] + [row for row in short if row not in first])[:count]


def _predictions(loaded: Loaded, rows: Sequence[Row], plan: Plan) -> list[Prediction]:
    labels = _task(plan).labels
    after = _probabilities(loaded, rows, plan)
    with loaded.model.disable_adapter():
        before = _probabilities(loaded, rows, plan)
    return [
        Prediction(row.text, row.label, labels[int(b.argmax())], labels[int(a.argmax())], float(a.max()))
        for row, a, b in zip(rows, after, before, strict=True)
    ]


def _right(rows: Sequence[Row], probabilities: torch.Tensor, plan: Plan) -> int:
    labels = _task(plan).labels
    return sum(row.label == labels[int(n)] for row, n in zip(rows, probabilities.argmax(-1), strict=True))


@torch.no_grad()
def _probabilities(loaded: Loaded, rows: Sequence[Row], plan: Plan) -> torch.Tensor:  # (rows, labels)
    found = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        pairs = [row.text_pair for row in part if row.text_pair is not None]
        inputs = loaded.tokenizer(
            [row.text for row in part], pairs or None, truncation=True, max_length=plan.task.max_length, padding=True, return_tensors="pt"
        )
        found.append(loaded.model(**inputs).logits.float().softmax(-1))
    return torch.cat(found)


def _task(plan: Plan) -> SequenceClassification:
    assert isinstance(plan.task, SequenceClassification), "the demonstration classifies"
    return plan.task
