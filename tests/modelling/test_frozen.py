"""Slices of which a job trains part: the rest stays frozen beside it, and takes part in every computation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from modelling import adapters, base
from modelling.layout import resolve
from protocol.plan import Plan, Sides
from protocol.slices import Factors, Slice
from tests.modelling.drawn import CONTINUE, drawn_slice, tiny_plan

IDS = torch.tensor([[2, 17, 31, 60, 200, 3]])
TRAINED = [3, 1]  # of rank 4
CLOSE = 64 * torch.finfo(torch.float32).eps  # relative; sums of some 32 products in another order


@pytest.fixture
def plan(decoder: Path) -> Plan:
    return resolve(tiny_plan(decoder, CONTINUE, modules="all-linear"))


def logits(plan: Plan, slice: Slice, directions: list[int] | None = None, dropout: float = 0.0, training: bool = False) -> Tensor:
    assert plan.layout is not None
    with adapters.adapted(base.load(plan.model, plan.task), slice, plan.layout, dropout, directions) as adapted, torch.no_grad():
        found: Tensor = adapted.model.train(training)(IDS).logits
    return found


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_whatever_is_trained_of_it_the_model_computes_with_the_whole_slice_as_peft_does(plan: Plan) -> None:
    slice = drawn_slice(plan, 4, 2.0)
    wanted = by_peft(plan, slice)
    assert torch.equal(logits(plan, slice), wanted)
    for directions in (TRAINED, [0], [0, 1, 2, 3], [2, 0, 3, 1]):
        assert (logits(plan, slice, directions) - wanted).norm() <= CLOSE * wanted.norm()
    assert (logits(plan, drawn_slice(plan, 2, 2.0)) - wanted).norm() > 1e-3 * wanted.norm()


def by_peft(plan: Plan, slice: Slice) -> Tensor:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(slice.factors))
    reference = get_peft_model(AutoModelForCausalLM.from_pretrained(plan.model.id), config).eval()
    for name, factors in slice.factors.items():
        layer = reference.get_submodule(f"base_model.model.{name}")
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = factors.a, factors.b
    with torch.no_grad():
        found: Tensor = reference(IDS).logits
    return found


def test_the_trained_directions_come_back_in_the_order_in_which_they_are_named(plan: Plan) -> None:
    assert plan.layout is not None
    slice = drawn_slice(plan, 4, 2.0)
    with adapters.adapted(base.load(plan.model, plan.task), slice, plan.layout, 0.0, TRAINED) as adapted:
        found = adapted.factors()
        assert sum(p.numel() for p in adapted.trained()) == plan.layout.numbers(2)
    assert all(torch.equal(f.b, slice.factors[n].b[:, TRAINED]) and torch.equal(f.a, slice.factors[n].a[TRAINED]) for n, f in found.items())


@pytest.mark.parametrize("scale", [2.0, 0.3])
def test_the_gradients_are_those_of_the_dense_model_that_the_whole_slice_makes(plan: Plan, scale: float) -> None:
    """With W = W₀ + s b a and G = dL/dW, those of the trained directions are s G aᵀ and s bᵀ G."""
    assert plan.layout is not None
    slice = drawn_slice(plan, 4, scale)
    dense = dense_gradients(plan, slice)
    with adapters.adapted(base.load(plan.model, plan.task), slice, plan.layout, 0.0, TRAINED) as adapted:
        adapted.model(IDS).logits.square().sum().backward()
        for name, factors in slice.factors.items():
            layer = adapted.model.get_submodule(name)
            for found, wanted in (
                (layer.lora_B["default"].weight.grad, scale * dense[name] @ factors.a[TRAINED].T),
                (layer.lora_A["default"].weight.grad, scale * factors.b[:, TRAINED].T @ dense[name]),
            ):
                assert (found - wanted).norm() <= 16 * CLOSE * wanted.norm()  # through all the layers above
            assert layer.lora_A["frozen"].weight.grad is layer.lora_B["frozen"].weight.grad is None


def dense_gradients(plan: Plan, slice: Slice) -> dict[str, Tensor]:
    bare = base.copy(plan.model, plan.task).model
    weights = {name: bare.get_parameter(f"{name}.weight") for name in slice.factors}
    for name, factors in slice.factors.items():
        weights[name].data += slice.label.scale * factors.b @ factors.a
        weights[name].requires_grad_(True)
    bare(IDS).logits.square().sum().backward()
    return {name: weight.grad for name, weight in weights.items() if weight.grad is not None}


def test_dropout_is_for_what_is_trained_alone(plan: Plan) -> None:
    """The trained directions add nothing yet, so dropout of what they read changes nothing."""
    drawn = drawn_slice(plan, 4, 2.0)
    still = {n: Factors(b=f.b * torch.tensor([1.0, 0.0, 1.0, 0.0]), a=f.a) for n, f in drawn.factors.items()}
    slice = Slice(drawn.label, still, drawn.full)
    assert torch.equal(logits(plan, slice, TRAINED, dropout=0.5, training=True), logits(plan, slice, TRAINED))
    assert not torch.equal(logits(plan, drawn, TRAINED, dropout=0.5, training=True), logits(plan, drawn, TRAINED))


@pytest.mark.parametrize("directions", [None, TRAINED])
def test_where_b_alone_is_trained_a_has_no_gradient(plan: Plan, directions: list[int] | None) -> None:
    assert plan.layout is not None
    slice = drawn_slice(plan, 4, 2.0)
    with adapters.adapted(base.load(plan.model, plan.task), slice, plan.layout, 0.0, directions, Sides.b) as adapted:
        adapted.model(IDS).logits.sum().backward()
        trained = adapted.trained()
        assert sum(p.numel() for p in trained) == plan.layout.numbers(2 if directions else 4, Sides.b)
        assert all(p.grad is not None for p in trained)
        assert not any(layer.lora_A["default"].weight.requires_grad for layer in map(adapted.model.get_submodule, plan.layout.modules))


def test_a_job_hands_nothing_on_to_the_next(plan: Plan) -> None:
    """Other ranks, dropout, frozen directions and training before it change no bit of a job; nothing is held between jobs."""
    assert plan.layout is not None
    found, slice = base.copy(plan.model, plan.task), drawn_slice(plan, 2, 2.0)
    first = outputs(found, plan, slice)
    for rank, directions, sides in ((4, TRAINED, Sides.both), (4, None, Sides.b), (1, None, Sides.both)):
        with adapters.adapted(found, drawn_slice(plan, rank, 0.5), plan.layout, 0.1, directions, sides) as adapted:
            adapted.model.train()
            adapted.model(IDS).logits.sum().backward()
            torch.optim.AdamW(adapted.trained(), lr=0.1).step()
    assert torch.equal(outputs(found, plan, slice), first)
    assert not any(
        "lora" in name for wrapped in found.wrapped.values() for layer in wrapped.values() for name, _ in layer.named_parameters()
    )


def outputs(found: base.Base, plan: Plan, slice: Slice) -> Tensor:
    assert plan.layout is not None
    with adapters.adapted(found, slice, plan.layout, 0.0) as adapted, torch.no_grad():
        logits: Tensor = adapted.model(IDS).logits
    return logits


def test_a_base_model_keeps_few_sets_of_wrapped_modules(plan: Plan) -> None:
    assert plan.layout is not None
    found = base.copy(plan.model, plan.task)
    for n in range(adapters.KEPT + 2):
        with adapters.adapted(found, drawn_slice(plan, 1, 1.0), plan.layout, n / 100):
            assert 0 < len(found.wrapped) <= adapters.KEPT
