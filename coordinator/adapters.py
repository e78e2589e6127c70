"""Published adapters as PEFT folders: configuration, tensors under PEFT's names, and a model card.

The canonical form is exported: one rank r for all modules, or one for each where a share of the energy is asked for, and
alpha = r, so that the scale is 1 and every loader agrees on it. The cut to a rank is the first r columns of b and rows of a,
because the global adapter's directions are in falling order, or are put in it where a strategy keeps other factors; where it has
fewer than r, zeros follow, which change nothing. So a folder of one rank computes what a device computes with the slice of that rank.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace

import safetensors.torch
from torch import Tensor

from coordinator import aggregation
from coordinator.lowrank import pad, truncate
from coordinator.sums import Sum, Term
from protocol import errors, slices
from protocol.plan import CausalLM, Layout, Plan, SequenceClassification
from protocol.slices import Factors, Slice

PREFIX = "base_model.model."  # what PEFT puts before every name of the base model
OLDEST = (1980, 1, 1, 0, 0, 0)  # the first moment that a zip archive can name


@dataclass(frozen=True)
class Facts:
    """Where an adapter comes from, for its model card."""

    run: str  # the run's name
    round: int
    metrics: Mapping[str, float]  # of the published adapter, weighted means over clients


def files(plan: Plan, facts: Facts, adapter: bytes, rank: int, kept: float | None = None) -> dict[str, bytes]:
    """The PEFT folder of a global adapter (a slice file of scale 1) at a rank: file name → bytes, the same for the same input.

    With `kept`, each module has the smallest rank up to `rank` that holds this share of its ‖b a‖²_F.
    Raises InvalidPlan if the plan was never resolved, MismatchedSlice if the bytes are not the plan's adapter.
    """
    if plan.layout is None:
        raise errors.InvalidPlan(f"plan {plan.name!r} has no layout; it was never resolved")
    whole = slices.unpack(adapter)
    if whole.label.scale != 1.0 or whole.factors.keys() != plan.layout.modules.keys() or whole.full.keys() != plan.layout.full.keys():
        raise errors.MismatchedSlice(
            f"these bytes are not the global adapter of plan {plan.name!r}: other tensors, or a scale that is not 1"
        )
    whole = _falling(plan, whole)
    ranks = {module: rank if kept is None else min(rank, _smallest(factors, kept)) for module, factors in whole.factors.items()}
    return {
        "README.md": card(plan, facts, max(ranks.values())).encode(),
        "adapter_config.json": (json.dumps(config(plan, plan.layout, ranks), indent=2, sort_keys=True) + "\n").encode(),
        "adapter_model.safetensors": safetensors.torch.save(tensors(whole, ranks), metadata={"format": "pt"}),
    }


def _falling(plan: Plan, whole: Slice) -> Slice:
    """The adapter in singular form; also where nobody can say any more in which form its strategy keeps it."""
    if plan.strategy.name in aggregation.names() and aggregation.load(plan.strategy.name).singular:
        return whole
    return replace(whole, factors={module: _decomposed(factors) for module, factors in whole.factors.items()})


def _decomposed(factors: Factors) -> Factors:
    w = Sum((len(factors.b), factors.a.shape[1]), [Term(factors, 1.0)])
    return truncate(w, factors.rank).padded(factors.rank)


def _smallest(factors: Factors, kept: float) -> int:
    """The smallest rank that holds this share of ‖b a‖²_F, at least 1: with b = U√S and a = √S Vᵀ, sᵢ = ‖bᵢ‖ ‖aᵢ‖."""
    energies = factors.b.double().square().sum(dim=0) * factors.a.double().square().sum(dim=1)
    held = energies.cumsum(dim=0)
    return 1 + int((held[:-1] < kept * held[-1]).sum())


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


def tensors(whole: Slice, ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """The tensors of a PEFT file: lora_A (rank, n_in) and lora_B (n_out, rank) of each module, and the fully trained ones."""
    named: dict[str, Tensor] = {}
    for module, factors in whole.factors.items():
        rank = ranks[module]
        part = pad(Factors(b=factors.b[:, :rank].contiguous(), a=factors.a[:rank].contiguous()), rank)
        named[f"{PREFIX}{module}.lora_A.weight"] = part.a
        named[f"{PREFIX}{module}.lora_B.weight"] = part.b
    return named | {PREFIX + name: tensor for name, tensor in whole.full.items()}


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


def card(plan: Plan, facts: Facts, rank: int) -> str:
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

# {facts.run}, round {facts.round}, rank {rank}

A LoRA adapter for `{plan.model.id}`{revision}, fine-tuned by a federation:
the training rows stayed on the clients' own machines, and each machine trained the rank that it could afford.

## Use

```python
{_use(plan)}
```

## How it was made

{_origin(plan, facts, rank)}
{_measured(facts)}"""


def _origin(plan: Plan, facts: Facts, rank: int) -> str:
    return f"""| | |
|---|---|
| run | {facts.run} |
| round | {facts.round} of {plan.rounds} |
| task | {plan.task.kind} |
| clients' ranks | {", ".join(map(str, plan.ranks.ladder))}, given by the policy `{plan.ranks.name}` |
| strategy | `{plan.strategy.name}` |
| rank of the global adapter | {plan.global_rank}; this folder holds its {min(rank, plan.global_rank)} leading directions |
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
