"""Published adapters as PEFT folders: configuration, tensors under PEFT's names, and a model card.

The canonical form is exported: one rank r for all modules, or one for each where a share of the energy is asked for, and
alpha = r, so that the scale is 1 and every loader agrees on it. The cut to a rank is the best one: the first r columns of b and
rows of a, where the global adapter's directions are in falling order, and they are put in it where its strategy keeps other
factors. In the first case a folder of one rank computes what a device computes with the slice of that rank.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass

import safetensors.torch
from torch import Tensor

from coordinator import aggregation
from coordinator.readout import ReadOut, Wanted, read_out, singular
from protocol import errors, slices
from protocol.plan import CausalLM, Layout, Plan, SequenceClassification
from protocol.slices import Factors

PREFIX = "base_model.model."  # what PEFT puts before every name of the base model
OLDEST = (1980, 1, 1, 0, 0, 0)  # the first moment that a zip archive can name


@dataclass(frozen=True)
class Facts:
    """Where an adapter comes from, for its model card."""

    run: str  # the run's name
    round: int
    metrics: Mapping[str, float]  # of the published adapter, weighted means over clients


def files(plan: Plan, facts: Facts, adapter: bytes, wanted: Wanted) -> dict[str, bytes]:
    """The PEFT folder of a global adapter (a slice file of scale 1), read out: file name → bytes, the same for the same input.

    Raises InvalidPlan if the plan was never resolved, MismatchedSlice if the bytes are not the plan's adapter.
    """
    if plan.layout is None:
        raise errors.InvalidPlan(f"plan {plan.name!r} has no layout; it was never resolved")
    whole = slices.unpack(adapter)
    if whole.label.scale != 1.0 or whole.factors.keys() != plan.layout.modules.keys() or whole.full.keys() != plan.layout.full.keys():
        raise errors.MismatchedSlice(
            f"these bytes are not the global adapter of plan {plan.name!r}: other tensors, or a scale that is not 1"
        )
    found = read_out(whole.factors if _is_singular(plan) else singular(whole.factors), wanted)
    numbers = safetensors.torch.save(tensors(found.factors, whole.full), metadata={"format": "pt"})
    return {
        "README.md": card(plan, facts, found, len(numbers)).encode(),
        "adapter_config.json": (json.dumps(config(plan, plan.layout, found.ranks), indent=2, sort_keys=True) + "\n").encode(),
        "adapter_model.safetensors": numbers,
    }


def _is_singular(plan: Plan) -> bool:
    """Whether the adapter is known to be in singular form; it is not where nobody can say any more how its strategy keeps it."""
    return plan.strategy.name in aggregation.names() and aggregation.load(plan.strategy.name).singular


def archive(files: Mapping[str, bytes]) -> bytes:
    """A zip archive of the files, the same bytes for the same files on every machine; float numbers are not worth compressing."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as packed:
        for name, data in sorted(files.items()):
            entry = zipfile.ZipInfo(name, OLDEST)
            entry.create_system = 3  # Unix, whatever the machine is
            entry.external_attr = 0o644 << 16
            packed.writestr(entry, data)
    return stream.getvalue()


def tensors(factors: Mapping[str, Factors], full: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a PEFT file: lora_A (rank, n_in) and lora_B (n_out, rank) of each module, and the fully trained ones."""
    named: dict[str, Tensor] = {}
    for module, pair in factors.items():
        named[f"{PREFIX}{module}.lora_A.weight"] = pair.a
        named[f"{PREFIX}{module}.lora_B.weight"] = pair.b
    return named | {PREFIX + name: tensor for name, tensor in full.items()}


def config(plan: Plan, layout: Layout, ranks: Mapping[str, int]) -> dict[str, object]:
    """PEFT's adapter_config.json, for one rank per module; those below the largest stand in its patterns.

    Modules stand under their full names. PEFT adapts a module whose name is one of them, or ends with one of them after a
    dot; so exactly these, unless one module's full name is the end of another's.
    """
    largest = max(ranks.values())
    smaller = {module: rank for module, rank in ranks.items() if rank < largest}
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if isinstance(plan.task, SequenceClassification) else "CAUSAL_LM",
        "base_model_name_or_path": plan.model.id,
        "revision": plan.model.revision,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": plan.adapter.dropout,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "target_modules": list(layout.modules),
        "modules_to_save": heads(layout) or None,
    }


def heads(layout: Layout) -> list[str]:
    """The modules trained in full: for each tensor the largest module around it that holds nothing of what is adapted.

    PEFT wraps and saves them whole, and for classifiers adds the head by its usual name, so a part of it must not be named.
    """
    adapted = {prefix for module in layout.modules for prefix in _prefixes(module)}
    found = [next((p for p in _prefixes(name.rpartition(".")[0]) if p not in adapted), "") for name in layout.full]
    return sorted({name for name in found if name})


def _prefixes(name: str) -> list[str]:
    """a, a.b, a.b.c of a.b.c."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


# --- the model card ----------------------------------------------------------------------------------------------------


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
{_measured(facts)}"""


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
| this folder | {_mean(found)}; {size:,} bytes of numbers |
| left out of the global adapter | {f"{100 * found.left_out:.3g} % of its energy ‖ΔW‖²" if found.left_out else "nothing"} |
| base model's fingerprint | `{plan.model.fingerprint}` |
| plan | `{plan.digest()}` |"""


def _measured(facts: Facts) -> str:
    if not facts.metrics:
        return ""
    lines = "".join(f"| {name} | {value:.4g} |\n" for name, value in sorted(facts.metrics.items()))
    return f"\nMeasured by the clients on their own held-out rows, weighted means:\n\n| metric | value |\n|---|---|\n{lines}"


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
