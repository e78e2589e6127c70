"""Base models: loaded once per process, frozen, and compared with the plan's fingerprint."""

from __future__ import annotations

import functools
import threading
from collections.abc import Hashable, Iterable, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from modelling import checkpoint
from protocol import errors
from protocol.plan import Model, SequenceClassification, Task

_loading = threading.Lock()  # two threads that need the same base load it once


@dataclass(frozen=True)
class Base:
    """A frozen base model for one task. Whoever changes anything of it puts it back."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fresh: frozenset[str]  # tensors that the checkpoint does not carry: the task's head
    folder: Path
    fingerprint: str
    wrapped: dict[Hashable, dict[str, nn.Module]] = field(default_factory=dict, repr=False, compare=False)  # modules, ready for adapters

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(next(self.model.parameters()).device)


def load(model: Model, task: Task, *, device: str = "cpu", dtype: torch.dtype | None = None) -> Base:
    """The base model for a task, in its checkpoint's dtype unless another is asked for; loaded once per process.

    Raises ModelRefusal if it cannot be had or is not the one that the plan was made with.
    """
    place = checkpoint.folder(model)
    with _loading:
        base = _load(place, task.kind, _labels(task), device, dtype)
    if model.fingerprint not in (None, base.fingerprint):
        raise errors.ModelRefusal(
            f"{model.id} at {place} has the fingerprint {base.fingerprint}; the plan was made with {model.fingerprint}: "
            "put the plan's revision of the model there",
            expected=model.fingerprint,
            came=base.fingerprint,
        )
    return base


def skeleton(model: Model, task: Task) -> Base:
    """The base model's names and shapes without its numbers: every tensor is on torch's meta device."""
    return _open(checkpoint.folder(model), task.kind, _labels(task), device_map="meta")


def copy(model: Model, task: Task) -> Base:
    """The base model for a task, in its checkpoint's dtype, for a borrower who will change it."""
    return _open(checkpoint.folder(model), task.kind, _labels(task), dtype="auto")


def whole_modules(model: nn.Module, tensors: Set[str]) -> list[str]:
    """The largest modules all of whose parameters are among those named."""
    whole: list[str] = []
    if not tensors:  # every module is looked at otherwise
        return whole
    for name, module in model.named_modules():  # parents come before their children
        own = (f"{name}.{parameter}" for parameter, _ in module.named_parameters())
        if name and next(own, None) in tensors and all(parameter in tensors for parameter in own) and not inside(name, whole):
            whole.append(name)
    return whole


def inside(name: str, modules: Iterable[str]) -> bool:
    """Whether a module or parameter is one of these modules or part of one."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def _labels(task: Task) -> tuple[str, ...]:
    return tuple(task.labels) if isinstance(task, SequenceClassification) else ()


@functools.lru_cache(maxsize=2)
def _load(place: Path, kind: str, labels: tuple[str, ...], device: str, dtype: torch.dtype | None) -> Base:
    base = _open(place, kind, labels, dtype=dtype or "auto")
    base.model.to(device)
    base.model.config.get_text_config().use_cache = False  # keys and values are copied for generation alone; the bits are the same
    return base


def _open(place: Path, kind: str, labels: tuple[str, ...], **how: object) -> Base:
    """Open the folder for the task; code that a model brings along is never run."""
    fingerprint = checkpoint.fingerprint(place)  # it knows better than transformers what is wrong with a file
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    numbered = dict(enumerate(labels))
    config: dict[str, Any] = {"id2label": numbered, "label2id": {label: n for n, label in numbered.items()}} if labels else {}
    family = AutoModelForSequenceClassification if kind == "sequence-classification" else AutoModelForCausalLM
    try:
        model, loading = family.from_pretrained(
            place,
            config=AutoConfig.from_pretrained(place, trust_remote_code=False, **config),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **how,
        )
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except (MemoryError, RuntimeError):
        raise  # memory that ran out is no fault of the model
    except Exception as error:  # safetensors has errors of its own, and tokenizers raises Exception itself
        raise errors.ModelRefusal(f"transformers cannot open {place} for {kind}: {error}", folder=str(place)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise errors.ModelRefusal(f"the tokenizer in {place} has no token that could pad a batch", folder=str(place))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.requires_grad_(False)
    model.eval()
    return Base(model, tokenizer, frozenset(loading["missing_keys"]), place, fingerprint)
