"""What a published adapter is worth at a rank: the product's own read-out, measured by the code that agents measure with."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Self

import safetensors.torch
import torch

from agent import learning
from agent.encoding import Example, Tokenizer, encode
from agent.learning import Seen, Setting
from coordinator.adapters import PREFIX
from experiments.material import Part
from experiments.records import ALL
from modelling import adapters, base
from modelling.base import Base
from protocol.contents import Label
from protocol.plan import Layout, Plan, Task
from protocol.slices import Factors, Slice

Values = dict[str, float]  # loss, and for classifiers accuracy and f1


@dataclass(frozen=True)
class Measurer:
    """Held-out rows, ready to be measured on."""

    base: Base
    layout: Layout
    setting: Setting
    examples: Mapping[str, Sequence[Example]]  # kind → its rows
    batch_size: int

    @classmethod
    def prepared(cls, plan: Plan, part: Part, batch_size: int) -> Self:
        """Load the plan's base model and encode the rows. Raises ModelRefusal, DataRefusal."""
        assert plan.layout is not None, "a plan is resolved before it runs"
        found = base.load(plan.model, plan.task, dtype=torch.float32)
        setting = Setting(plan.task, found.tokenizer.pad_token_id, found.device, None)
        return cls(found, plan.layout, setting, _encoded(part, plan.task, found.tokenizer), batch_size)

    def measure(self, adapter: bytes, rank: int) -> dict[str, Values]:
        """Each kind's values, and those of all, for the tensors of a PEFT folder of that rank.

        All of a language model: the mean over kinds, whatever their sizes. All of a classifier: over rows.
        """
        with adapters.adapted(self.base, _slice(adapter, self.layout, rank), self.layout, 0.0) as adapted:
            seen = {
                kind: learning.measure(adapted, self.setting, examples, self.batch_size, _unheard)
                for kind, examples in self.examples.items()
            }
        found = {kind: self._values(one) for kind, one in seen.items()}
        if self.setting.task.kind == "causal-lm":
            return {ALL: {"loss": sum(values["loss"] for values in found.values()) / len(found)}, **found}
        together = self._values(reduce(operator.add, seen.values()))
        return {ALL: together, **found} if len(found) > 1 else {ALL: together}

    def _values(self, seen: Seen) -> Values:
        return {name: metric.value for name, metric in seen.metrics(self.setting.task).items() if name != "perplexity"}


def _encoded(part: Part, task: Task, tokenizer: Tokenizer) -> dict[str, list[Example]]:
    """Each kind's rows. They are encoded source by source, so that a refusal names source and row as somebody can look them up."""
    found: dict[str, list[Example]] = {kind: [] for kind in sorted(set(part.kinds))}
    for source in dict.fromkeys(part.sources):
        own = [n for n, name in enumerate(part.sources) if name == source]
        examples = encode(enumerate((part.rows[n] for n in own), start=1), task, tokenizer, source)
        # A language model's rows may be left out, and so have no number of their own; but there every source is a kind.
        kinds = [source] * len(examples) if task.kind == "causal-lm" else [part.kinds[n] for n in own]
        for kind, example in zip(kinds, examples, strict=True):
            found[kind].append(example)
    return found


def _unheard(step: int, steps: int, loss: float) -> None:
    """Nobody waits for a measure's single batches."""


def _slice(adapter: bytes, layout: Layout, rank: int) -> Slice:
    """What lies under PEFT's names, as a slice of scale 1: there alpha is the rank."""
    tensors = safetensors.torch.load(adapter)
    return Slice(
        Label(rank=rank, scale=1.0, round=0),
        {m: Factors(b=tensors[f"{PREFIX}{m}.lora_B.weight"], a=tensors[f"{PREFIX}{m}.lora_A.weight"]) for m in layout.modules},
        {name: tensors[PREFIX + name] for name in layout.full},
    )
