"""Resolving a plan: the base model is looked at once, and what is adapted, with its shapes, is written into the plan."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from pydantic import ValidationError
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from modelling import base
from modelling.base import inside, whole_modules
from protocol import errors
from protocol.plan import BaseFacts, Layout, Model, Plan
from protocol.strict import mistakes

LINEAR = (nn.Linear, Conv1D)


def resolve(plan: Plan) -> Plan:
    """The plan with its layout and the base model's fingerprint filled in. Reads the model's files, loads no weights.

    Raises ModelRefusal if the base model cannot be had, InvalidPlan if the plan asks of it what it has not.
    """
    skeleton = base.skeleton(plan.model, plan.task)
    if plan.model.fingerprint not in (None, skeleton.fingerprint):
        raise errors.ModelRefusal(
            f"{plan.model.id} has the fingerprint {skeleton.fingerprint}; the plan says {plan.model.fingerprint}",
            expected=plan.model.fingerprint,
            came=skeleton.fingerprint,
        )
    _check_length(plan, skeleton)
    heads = _full(skeleton, plan.adapter.full)
    layout = Layout(
        modules=_shapes(skeleton.model, _adapted(skeleton.model, plan.adapter.modules, heads)),
        full={name: tuple(p.shape) for name, p in skeleton.model.named_parameters() if inside(name, heads)},
        base=_facts(skeleton.model),
    )
    model = Model(id=plan.model.id, revision=plan.model.revision, fingerprint=skeleton.fingerprint)
    try:
        return Plan.model_validate({**plan.model_dump(), "model": model, "layout": layout})
    except ValidationError as error:
        wrong = next(mistakes(error, Plan)).removeprefix("the whole: ")
        raise errors.InvalidPlan(f"the plan does not fit {plan.model.id}: {wrong}") from None


def _check_length(plan: Plan, skeleton: base.Base) -> None:
    declared = [skeleton.tokenizer.model_max_length, getattr(skeleton.model.config.get_text_config(), "max_position_embeddings", None)]
    longest = min(n for n in (*declared, 1 << 30) if n is not None)
    if plan.task.max_length > longest:
        raise errors.InvalidPlan(f"task.max_length is {plan.task.max_length}; {plan.model.id} reads at most {longest} tokens")


def _full(skeleton: base.Base, wanted: list[str] | None) -> list[str]:
    """Modules to keep whole: those that are wanted, or else the largest ones of which the checkpoint has nothing."""
    fresh = skeleton.fresh
    heads = whole_modules(skeleton.model, fresh)
    if wanted is not None:
        heads = [name for end in wanted for name in _matches(end, [n for n, _ in skeleton.model.named_modules()], "module")]
    parameters = [name for name, _ in skeleton.model.named_parameters()]
    if pretrained := [name for name in parameters if inside(name, heads) and name not in fresh]:
        raise errors.InvalidPlan(
            f"adapter.full names {pretrained[0]}, whose values are in the checkpoint; only what is freshly made can be kept "
            "whole, because the coordinator makes its first values: adapt the rest by adapter.modules",
            tensors=pretrained[:10],
        )
    if untrained := sorted(name for name in parameters if name in fresh and not inside(name, heads)):
        raise errors.InvalidPlan(
            f"{untrained[0]} is freshly made for this task, so every device would make up its own: name its module in adapter.full",
            tensors=untrained[:10],
        )
    return heads


def _matches(end: str, names: Iterable[str], what: str) -> list[str]:
    names = list(names)
    found = [name for name in names if name == end or name.endswith("." + end)]
    if not found:
        known = {part for name in names for part in (name, name.rpartition(".")[2])}
        near = difflib.get_close_matches(end, sorted(known), n=5, cutoff=0.5) or sorted({n.rpartition(".")[2] for n in names})[:10]
        raise errors.InvalidPlan(f"{end!r} names no {what} of the base model; near it: {', '.join(near)}", asked=end, near=near)
    return found


def _adapted(model: PreTrainedModel, wanted: list[str] | str, heads: list[str]) -> list[str]:
    """The linear modules to adapt, outside what is trained in full; all-linear leaves out the output embedding, as peft does."""
    modules = {name: module for name, module in model.named_modules() if name and not inside(name, heads)}
    linear = [name for name, module in modules.items() if isinstance(module, LINEAR)]
    if isinstance(wanted, str):
        return [name for name in linear if modules[name] is not model.get_output_embeddings()]
    chosen = [name for end in wanted for name in _matches(end, linear, "linear module")]
    return sorted(set(chosen))


def _shapes(model: nn.Module, names: list[str]) -> dict[str, tuple[int, int]]:
    """(n_out, n_in) of each module, read off the factors that peft makes for it."""
    if not names:
        raise errors.InvalidPlan("adapter.modules names no module; name at least one, or all-linear")
    conv = isinstance(model.get_submodule(names[0]), Conv1D)
    inject_adapter_in_model(LoraConfig(r=1, target_modules=names, fan_in_fan_out=conv), model, low_cpu_mem_usage=True)
    layers: dict[str, LoraLayer] = {name: model.get_submodule(name) for name in names}
    return {name: (layer.lora_B["default"].weight.shape[0], layer.lora_A["default"].weight.shape[1]) for name, layer in layers.items()}


def _facts(model: PreTrainedModel) -> BaseFacts:
    config = model.config.get_text_config()
    count = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    return BaseFacts(parameters=count, layers=config.num_hidden_layers, hidden=config.hidden_size, vocabulary=config.vocab_size)
