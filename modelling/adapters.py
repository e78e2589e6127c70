"""Slices in models: put into a base model for one job and taken out again.

What of a slice is trained stands in one of peft's adapters, and what stays frozen in a second one beside it: the model
computes with base + s · b a of both, and the frozen part, like the base, is never rounded or copied as a dense matrix.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
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
from protocol.plan import Head, Layout, Sides
from protocol.slices import Factors, Slice

TRAINED, FROZEN = "default", "frozen"  # peft's names for the two adapters
KEPT = 8  # sets of wrapped modules that a base model keeps
_one_job = threading.Lock()  # the base model and torch's random numbers are shared by all jobs of a process


@dataclass(frozen=True)
class Adapted:
    """A base model with a slice in it, ready to train or to measure."""

    model: PreTrainedModel
    layout: Layout  # of what is trained

    def trained(self) -> list[nn.Parameter]:
        """All parameters that are trained, in a fixed order."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def factors(self) -> dict[str, Factors]:
        """The factors of the trained directions as they are now, in float32 on the CPU: a (r, n_in), b (n_out, r)."""
        layers = {name: self.model.get_submodule(name) for name in self.layout.modules}
        return {n: Factors(b=_numbers(x.lora_B[TRAINED].weight), a=_numbers(x.lora_A[TRAINED].weight)) for n, x in layers.items()}

    def full(self) -> dict[str, Tensor]:
        """The fully trained tensors as they are now, in float32 on the CPU."""
        return {name: _numbers(self.model.get_parameter(name)) for name in self.layout.full}


def _numbers(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


@contextmanager
def adapted(
    base: Base,
    slice: Slice,
    layout: Layout,
    dropout: float,
    directions: Sequence[int] | None = None,
    sides: Sides = Sides.both,
    head: Head = Head.trained,
) -> Iterator[Adapted]:
    """Lend the base model with the slice in it, to one borrower of the process at a time; afterwards it is as it was.

    Trained are the slice's directions at these positions, in this order, or all of them, and of those b alone if `sides` says so;
    and its full tensors, unless the head is frozen.
    Dropout is for what is trained: the frozen directions are part of the model that was handed out, as the base is.
    Raises ModelRefusal if the slice does not fit the model.
    """
    heads = whole_modules(base.model, layout.full.keys())
    frozen, device = directions is not None and len(directions) < slice.label.rank, base.device
    with _one_job:
        kept = {name: _submodule(base.model, name) for name in (*layout.modules, *heads)}
        layers: dict[str, LoraLayer] = {}
        try:
            layers = _wrapped(base, layout, dropout, (TRAINED, FROZEN) if frozen else (TRAINED,))
            for name, layer in layers.items():
                base.model.set_submodule(name, layer)
                for adapter, factors in _divided(slice.factors[name], directions).items():
                    _put_factors(layer, adapter, name, factors, device, sides)
                    layer.scaling[adapter] = slice.label.scale  # and not alpha / r, which need not be the same number
            _put_full(base.model, heads, slice.full, device, head)
            yield Adapted(base.model, layout if head is Head.trained else layout.factors_alone)
        finally:
            base.model.eval()
            for name, module in kept.items():
                base.model.set_submodule(name, module)
            for layer in layers.values():
                _take_factors(layer)


def _divided(factors: Factors, directions: Sequence[int] | None) -> dict[str, Factors]:
    """A module's factors by adapter: the directions named, in that order, and the others, if there are any."""
    if directions is None:
        return {TRAINED: factors}
    others = sorted(set(range(factors.rank)).difference(directions))
    return {adapter: factors.of(part) for adapter, part in ((TRAINED, directions), (FROZEN, others)) if part}


def _wrapped(base: Base, layout: Layout, dropout: float, adapters: tuple[str, ...]) -> dict[str, LoraLayer]:
    """The layout's modules as peft wraps them, kept from job to job: wrapping takes as long as training does for a step or two."""
    key = (tuple(layout.modules), dropout, adapters)
    if key not in base.wrapped:
        if len(base.wrapped) >= KEPT:
            base.wrapped.clear()
        _inject(base.model, layout, dropout, adapters)
        base.wrapped[key] = {name: base.model.get_submodule(name) for name in layout.modules}
    return base.wrapped[key]


def _inject(model: PreTrainedModel, layout: Layout, dropout: float, adapters: tuple[str, ...]) -> None:
    """Let peft wrap the layout's modules, with factors that have no numbers, and so no rank, yet."""
    conv = isinstance(model.get_submodule(next(iter(layout.modules))), Conv1D)
    for adapter in adapters:
        own = LoraConfig(r=1, lora_dropout=dropout if adapter == TRAINED else 0.0, target_modules=list(layout.modules), fan_in_fan_out=conv)
        try:
            inject_adapter_in_model(own, model, adapter_name=adapter, low_cpu_mem_usage=True)
        except ValueError as error:
            raise errors.ModelRefusal(f"peft cannot adapt what the plan names: {error}") from error
        finally:
            vars(model).pop("peft_config", None)
    for name in layout.modules:
        model.get_submodule(name).eval().set_adapter(list(adapters))  # both take part


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise errors.ModelRefusal(f"the base model has no module {name}, which the plan adapts", module=name) from None


def _put_factors(layer: LoraLayer, adapter: str, name: str, factors: Factors, device: torch.device, sides: Sides) -> None:
    trained = adapter == TRAINED
    for linear, tensor, shape, learns in (
        (layer.lora_A[adapter], factors.a, (factors.rank, layer.in_features), trained and sides is Sides.both),
        (layer.lora_B[adapter], factors.b, (layer.out_features, factors.rank), trained),
    ):
        if tensor.shape != shape:
            raise errors.ModelRefusal(f"{name} takes factors of {list(shape)}; the slice has {list(tensor.shape)}", module=name)
        linear.weight = nn.Parameter(tensor.to(device, torch.float32, copy=True), requires_grad=learns)


def _take_factors(layer: LoraLayer) -> None:
    """Let go of a job's numbers: their memory is not held for the next one."""
    for linear in (*layer.lora_A.values(), *layer.lora_B.values()):
        linear.weight = None


def _put_full(model: nn.Module, heads: list[str], full: Mapping[str, Tensor], device: torch.device, head: Head) -> None:
    for name in heads:
        model.set_submodule(name, copy.deepcopy(model.get_submodule(name)).float().requires_grad_(head is Head.trained))
    for name, tensor in full.items():
        parameter = model.get_parameter(name)
        if parameter.shape != tensor.shape:
            raise errors.ModelRefusal(f"{name} has shape {list(parameter.shape)}; the slice has {list(tensor.shape)}", tensor=name)
        parameter.data = tensor.to(device, torch.float32, copy=True)
