"""Slices in models: put into a base model for one job and taken out again."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from modelling.base import Base, whole_modules
from protocol import errors
from protocol.plan import Layout
from protocol.slices import Factors, Slice

NAME = "default"  # peft's name for the one adapter
_one_job = threading.Lock()  # the base model and torch's random numbers are shared by all jobs of a process


@dataclass(frozen=True)
class Adapted:
    """A base model with a slice in it, ready to train or to measure."""

    model: PreTrainedModel
    layout: Layout

    def trained(self) -> list[nn.Parameter]:
        """All parameters of the slice, in a fixed order."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def factors(self) -> dict[str, Factors]:
        """The factors as they are now, in float32 on the CPU: a (r, n_in), b (n_out, r)."""
        layers = {name: self.model.get_submodule(name) for name in self.layout.modules}
        return {n: Factors(b=_numbers(x.lora_B[NAME].weight), a=_numbers(x.lora_A[NAME].weight)) for n, x in layers.items()}

    def full(self) -> dict[str, Tensor]:
        """The fully trained tensors as they are now, in float32 on the CPU."""
        return {name: _numbers(self.model.get_parameter(name)) for name in self.layout.full}


def _numbers(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


@contextmanager
def adapted(base: Base, slice: Slice, layout: Layout, dropout: float) -> Iterator[Adapted]:
    """Lend the base model with the slice in it, to one borrower of the process at a time; afterwards it is as it was.

    Raises ModelRefusal if the slice does not fit the model.
    """
    heads = whole_modules(base.model, layout.full.keys())
    with _one_job:
        kept = {name: _submodule(base.model, name) for name in (*layout.modules, *heads)}
        try:
            _inject(base.model, layout, slice.label.rank, dropout)
            for name, factors in slice.factors.items():
                _put_factors(base.model.get_submodule(name), name, factors, slice.label.scale, base.device)
            _put_full(base.model, heads, slice.full, base.device)
            yield Adapted(base.model, layout)
        finally:
            for name, module in kept.items():
                base.model.set_submodule(name, module)
            vars(base.model).pop("peft_config", None)
            base.model.requires_grad_(False)
            base.model.eval()


def _inject(model: PreTrainedModel, layout: Layout, rank: int, dropout: float) -> None:
    """Let peft wrap the layout's modules, with factors that have no numbers yet."""
    conv = isinstance(model.get_submodule(next(iter(layout.modules))), Conv1D)
    config = LoraConfig(r=rank, lora_dropout=dropout, target_modules=list(layout.modules), fan_in_fan_out=conv)
    try:
        inject_adapter_in_model(config, model, adapter_name=NAME, low_cpu_mem_usage=True)
    except ValueError as error:
        raise errors.ModelRefusal(f"peft cannot adapt what the plan names: {error}") from error


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise errors.ModelRefusal(f"the base model has no module {name}, which the plan adapts", module=name) from None


def _put_factors(layer: LoraLayer, name: str, factors: Factors, scale: float, device: torch.device) -> None:
    for part, tensor in ((layer.lora_A[NAME], factors.a), (layer.lora_B[NAME], factors.b)):
        if part.weight.shape != tensor.shape:
            raise errors.ModelRefusal(f"{name} takes factors of {list(part.weight.shape)}; the slice has {list(tensor.shape)}", module=name)
        part.weight = nn.Parameter(tensor.to(device, torch.float32, copy=True))
    layer.scaling[NAME] = scale  # and not alpha / r, which need not be the same number


def _put_full(model: nn.Module, heads: list[str], full: Mapping[str, Tensor], device: torch.device) -> None:
    for head in heads:
        model.set_submodule(head, copy.deepcopy(model.get_submodule(head)).float().requires_grad_(True))
    for name, tensor in full.items():
        parameter = model.get_parameter(name)
        if parameter.shape != tensor.shape:
            raise errors.ModelRefusal(f"{name} has shape {list(parameter.shape)}; the slice has {list(tensor.shape)}", tensor=name)
        parameter.data = tensor.to(device, torch.float32, copy=True)
