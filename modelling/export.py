"""Pulled adapters: a PEFT folder loaded onto its base model, and merged into the base model's weights."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import PeftConfig, PeftModel
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from modelling import base
from protocol import errors
from protocol.plan import CausalLM, Model, SequenceClassification, Task

PREFIX = "base_model.model."  # what PEFT puts before every name of the base model
COUNTED = 7919  # labels of a model that is only looked at: no other size of it is this prime


@dataclass(frozen=True)
class Loaded:
    """An adapter on its own copy of the base model."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase


def load_adapter(folder: Path, *, labels: Sequence[str] = (), model: Model | None = None) -> Loaded:
    """The base model with the folder's adapter, through `PeftModel.from_pretrained`, ready to be asked.

    The base model is the one that the folder names, or `model`. Labels are only names for the outputs; without them they are
    numbered. Raises ModelRefusal if the folder is no adapter, or its base model cannot be had.
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, OSError, json.JSONDecodeError) as error:
        raise errors.ModelRefusal(f"{folder} is no PEFT adapter: {error}", folder=str(folder)) from None
    named = model or Model(id=config.base_model_name_or_path, revision=config.revision)
    task: Task = CausalLM() if config.task_type == "CAUSAL_LM" else _classification(folder, named, labels)
    bare = base.copy(named, task)
    with warnings.catch_warnings():
        # PEFT asks transformers by a name that transformers is giving up; nothing follows from it for a user.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return Loaded(PeftModel.from_pretrained(bare.model, str(folder)).eval(), bare.tokenizer)


def merge_into_base(folder: Path, out: Path, *, labels: Sequence[str] = (), model: Model | None = None) -> None:
    """Write a model folder that computes by itself what the base model computes with the adapter. Raises ModelRefusal."""
    loaded = load_adapter(folder, labels=labels, model=model)
    loaded.model.merge_and_unload(safe_merge=True).save_pretrained(out)
    loaded.tokenizer.save_pretrained(out)


def _classification(folder: Path, model: Model, labels: Sequence[str]) -> SequenceClassification:
    """A classification with as many labels as the adapter's head has outputs."""
    looked = base.skeleton(model, SequenceClassification(labels=[str(n) for n in range(COUNTED)]))
    outputs = {PREFIX + name for name in looked.fresh if looked.model.get_parameter(name).shape[0] == COUNTED}
    with safe_open(str(folder / "adapter_model.safetensors"), framework="pt") as file:
        counts = {file.get_slice(name).get_shape()[0] for name in outputs & set(file.keys())}
    if len(counts) != 1:
        raise errors.ModelRefusal(f"{folder} has no head for {model.id}; it was made for another base model", folder=str(folder))
    count = counts.pop()
    if labels and len(labels) != count:
        raise errors.ModelRefusal(f"{folder} has {count} outputs; {len(labels)} labels were given", folder=str(folder))
    return SequenceClassification(labels=list(labels) or [str(n) for n in range(count)])
