"""Model cards: what a pulled adapter is, how to load it, and how it was made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from coordinator.readout import ReadOut
from protocol.plan import CausalLM, Head, Plan, SequenceClassification


@dataclass(frozen=True)
class Facts:
    """Where an adapter comes from, for its model card."""

    run: str  # the run's name
    plan: str  # the digest of its plan, as it was when the run was made
    round: int
    metrics: Mapping[str, float]  # of the published adapter, weighted means over clients


def card(plan: Plan, facts: Facts, found: ReadOut, size: int) -> str:
    """README.md: front matter for model hubs, what the adapter is, how to load it, and how it was made."""
    revision = f" at revision `{plan.model.revision}`" if plan.model.revision else ""
    return f"""---
base_model: {json.dumps(plan.model.id)}
library_name: peft
pipeline_tag: {"text-classification" if isinstance(plan.task, SequenceClassification) else "text-generation"}
tags:
- lora
- peft
- federated-learning
- hlora
---

# {facts.run}, round {facts.round}, {_spread(found)}

A LoRA adapter for `{plan.model.id}`{revision}, fine-tuned by a federation:
the training rows stayed on the clients' own machines, and each machine trained the rank that it could afford.

## Use

```python
{_use(plan)}
```

## How it was made

{_origin(plan, facts, found, size)}
{_measured(plan, facts)}"""


def _spread(found: ReadOut) -> str:
    smallest, largest = min(found.ranks.values()), max(found.ranks.values())
    return f"rank {largest}" if smallest == largest else f"ranks {smallest} to {largest}"


def _mean(found: ReadOut) -> str:
    ranks = found.ranks.values()
    mean = "" if len(set(ranks)) == 1 else f", {math.fsum(ranks) / len(ranks):.4g} on average"
    return f"{_spread(found)}{mean}, over {len(ranks)} modules"


def _origin(plan: Plan, facts: Facts, found: ReadOut, size: int) -> str:
    return f"""| | |
|---|---|
| run | {facts.run} |
| round | {facts.round} of {plan.rounds} |
| task | {plan.task.kind} |
| clients' ranks | {", ".join(map(str, plan.ranks.ladder))}, given by the policy `{plan.ranks.name}` |
| strategy | `{plan.strategy.name}` |
| rank of the global adapter | {plan.global_rank} |
{_continued(plan)}{_head(plan)}| this folder | {_mean(found)}; {size:,} bytes of numbers |
| left out of the global adapter | {f"{100 * found.left_out:.3g} % of its energy ‖ΔW‖²" if found.left_out else "nothing"} |
| base model's fingerprint | `{plan.model.fingerprint}` |
| plan | `{facts.plan}` |"""


def _continued(plan: Plan) -> str:
    return "" if plan.continues is None else f"| begun with | the adapter `{plan.continues}` of an earlier run |\n"


def _head(plan: Plan) -> str:
    frozen = [] if plan.layout is None or plan.adapter.head is Head.trained else plan.layout.full
    origin = "first made" if plan.continues is None else "begun with"
    return f"| never trained | {', '.join(frozen)}: as they were {origin} |\n" if frozen else ""


def _measured(plan: Plan, facts: Facts) -> str:
    if not facts.metrics:
        return ""
    lines = "".join(f"| {name} | {value:.4g} |\n" for name, value in sorted(facts.metrics.items()))
    rank = plan.evaluation.rank
    what = "what it would train from next, its own rank's slice or the whole adapter" if rank is None else f"the slice of rank {rank}"
    return f"""
Measured by the clients on their own held-out rows, weighted means. Each client measured {what}:
whichever rank this folder has, the table says what was measured there, not what this folder by itself comes to.

| metric | value |
|---|---|
{lines}"""


def _use(plan: Plan) -> str:
    kind = "AutoModelForCausalLM" if isinstance(plan.task, CausalLM) else "AutoModelForSequenceClassification"
    package = plan.model.id.removeprefix("package:")
    where = f"{package}.get_model_path()" if package != plan.model.id else json.dumps(plan.model.id)
    arguments = [where] + ([f"revision={json.dumps(plan.model.revision)}"] if plan.model.revision else [])
    if isinstance(plan.task, SequenceClassification):
        arguments.append(f"id2label={dict(enumerate(plan.task.labels))!r}")
    lines = [f"import {package}"] if package != plan.model.id else []
    return "\n".join(
        [
            *lines,
            "from peft import PeftModel",
            f"from transformers import {kind}",
            "",
            f"base = {kind}.from_pretrained({', '.join(arguments)})",
            'model = PeftModel.from_pretrained(base, ".")  # this folder',
        ]
    )
