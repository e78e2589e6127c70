"""Slices in models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from modelling import adapters, base
from modelling.layout import resolve
from protocol import errors
from protocol.plan import Head, Plan
from protocol.slices import Factors, Slice
from tests.modelling.drawn import CLASSES, CONTINUE, drawn_slice, tiny_plan

IDS = torch.tensor([[2, 17, 31, 60, 200, 3]])


def load(plan: Plan) -> base.Base:
    return base.load(plan.model, plan.task)


@pytest.fixture(params=["encoder", "decoder"])
def plan(request: pytest.FixtureRequest) -> Plan:
    place = request.getfixturevalue(request.param)
    return resolve(tiny_plan(place, CLASSES if request.param == "encoder" else CONTINUE, modules="all-linear"))


def taken(plan: Plan, slice: Slice) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    assert plan.layout is not None
    with adapters.adapted(load(plan), slice, plan.layout, 0.0) as adapted:
        return adapted.factors(), adapted.full()


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_slice_comes_out_of_the_model_bit_for_bit_as_it_went_in(plan: Plan, rank: int) -> None:
    slice = drawn_slice(plan, rank, 2.0)
    factors, full = taken(plan, slice)
    assert factors.keys() == slice.factors.keys()
    assert all(torch.equal(factors[n].a, slice.factors[n].a) and torch.equal(factors[n].b, slice.factors[n].b) for n in factors)
    assert full.keys() == slice.full.keys()
    assert all(torch.equal(full[name], slice.full[name]) for name in full)


def test_half_precision_on_the_wire_becomes_float32_in_the_model(encoder: Path) -> None:
    plan = resolve(tiny_plan(encoder))
    slice = drawn_slice(plan, 2, 1.0)
    halves = {n: Factors(b=f.b.bfloat16(), a=f.a.bfloat16()) for n, f in slice.factors.items()}
    factors, _ = taken(plan, Slice(slice.label, halves, slice.full))
    assert all(torch.equal(factors[n].a, halves[n].a.float()) for n in halves)


@pytest.mark.parametrize("scale", [2.0, 2 / 3, 0.1, 16 / 7])
def test_the_model_computes_scale_times_b_a_exactly_as_peft_does(encoder: Path, scale: float) -> None:
    plan = resolve(tiny_plan(encoder))
    assert plan.layout is not None
    slice = drawn_slice(plan, 4, scale)
    with adapters.adapted(load(plan), slice, plan.layout, 0.0) as adapted, torch.no_grad():
        for name in plan.layout.modules:
            assert adapted.model.get_submodule(name).scaling["default"] == scale
        ours = adapted.model(IDS).logits
    assert torch.equal(ours, by_hand(plan, slice))


def by_hand(plan: Plan, slice: Slice) -> Tensor:
    """The logits of the base model whose weights W are replaced by W + s b a, computed in peft's order of operations."""
    bare = base.copy(plan.model, plan.task).model
    for name, tensor in slice.full.items():
        bare.get_parameter(name).data = tensor
    for name, factors in slice.factors.items():

        def plus(_: object, inputs: tuple[Tensor], output: Tensor, factors: Factors = factors) -> Tensor:
            return output + (inputs[0] @ factors.a.T) @ factors.b.T * slice.label.scale

        bare.get_submodule(name).register_forward_hook(plus)
    with torch.no_grad():
        logits: Tensor = bare(IDS).logits
    return logits


def test_a_frozen_head_computes_as_a_trained_one_and_is_no_part_of_what_is_trained(encoder: Path) -> None:
    plan = resolve(tiny_plan(encoder))
    assert plan.layout is not None
    slice, logits, counts = drawn_slice(plan, 2, 1.0), [], []
    for head in Head:
        with adapters.adapted(load(plan), slice, plan.layout, 0.0, head=head) as adapted:
            logits.append(adapted.model(IDS).logits)
            counts.append((sum(p.numel() for p in adapted.trained()), len(adapted.full())))
    assert torch.equal(*logits)
    assert counts == [(plan.layout.numbers(2), 2), (plan.layout.numbers(2) - plan.layout.numbers(0), 0)]


@pytest.mark.parametrize("directions", [None, [1]])
def test_the_shared_base_model_is_left_as_it_was(plan: Plan, directions: list[int] | None) -> None:
    found = load(plan)
    before = {name: tensor.clone() for name, tensor in found.model.state_dict().items()}
    modules = dict(found.model.named_modules())
    assert plan.layout is not None
    with adapters.adapted(found, drawn_slice(plan, 2, 1.0), plan.layout, 0.1, directions) as adapted:
        adapted.model.train()
        adapted.model(IDS).logits.sum().backward()
        torch.optim.AdamW(adapted.trained(), lr=0.1).step()
    after = found.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert dict(found.model.named_modules()) == modules
    assert not found.model.training
    assert not any(p.requires_grad or p.grad is not None for p in found.model.parameters())
    assert not hasattr(found.model, "peft_config")


def test_the_base_model_is_left_as_it_was_also_when_the_borrower_fails(encoder: Path) -> None:
    plan = resolve(tiny_plan(encoder))
    found = load(plan)
    before = list(found.model.state_dict())
    assert plan.layout is not None
    with pytest.raises(ZeroDivisionError), adapters.adapted(found, drawn_slice(plan, 2, 1.0), plan.layout, 0.1):
        raise ZeroDivisionError
    assert list(found.model.state_dict()) == before


def test_only_the_slice_is_trained(encoder: Path) -> None:
    plan = resolve(tiny_plan(encoder))
    assert plan.layout is not None
    with adapters.adapted(load(plan), drawn_slice(plan, 2, 1.0), plan.layout, 0.0) as adapted:
        assert sum(p.numel() for p in adapted.trained()) == plan.layout.numbers(2)


def test_jobs_of_one_process_share_one_base_model(encoder: Path) -> None:
    plan = resolve(tiny_plan(encoder))
    assert load(plan) is load(plan)


def test_nothing_is_kept_for_generation_and_the_logits_are_the_same(decoder: Path) -> None:
    plan = resolve(tiny_plan(decoder, CONTINUE))
    with torch.no_grad():
        ours, whole = load(plan).model(IDS), base.copy(plan.model, plan.task).model(IDS)
    assert ours.past_key_values is None
    assert whole.past_key_values is not None  # what is exported generates as quickly as ever
    assert torch.equal(ours.logits, whole.logits)


def test_a_base_model_that_is_not_the_plans_is_refused_with_both_fingerprints(encoder: Path) -> None:
    plan = resolve(tiny_plan(encoder))
    other = plan.model.model_copy(update={"fingerprint": "sha256:" + 64 * "0"})
    with pytest.raises(errors.ModelRefusal, match="the plan was made with sha256:0000") as refused:
        base.load(other, plan.task)
    assert refused.value.facts["came"] == plan.model.fingerprint


def test_a_slice_for_another_model_is_refused(encoder: Path, decoder: Path) -> None:
    plan, other = resolve(tiny_plan(encoder)), resolve(tiny_plan(decoder, CONTINUE))
    assert other.layout is not None
    with (
        pytest.raises(errors.ModelRefusal, match="has no module"),
        adapters.adapted(load(plan), drawn_slice(other, 2, 1.0), other.layout, 0.0),
    ):
        pass


def test_a_module_that_peft_cannot_adapt_is_refused(encoder: Path) -> None:
    plan = resolve(tiny_plan(encoder))
    assert plan.layout is not None
    odd = plan.model_copy(update={"layout": plan.layout.model_copy(update={"modules": {"bert.embeddings.LayerNorm": (32, 32)}})})
    with pytest.raises(errors.ModelRefusal, match="peft cannot adapt"):
        taken(odd, drawn_slice(odd, 2, 1.0))


def test_factors_of_another_shape_are_refused(encoder: Path) -> None:
    plan = resolve(tiny_plan(encoder))
    slice = drawn_slice(plan, 2, 1.0)
    wrong = {name: Factors(b=f.b, a=f.a[:, :5]) for name, f in slice.factors.items()}
    with pytest.raises(errors.ModelRefusal, match=r"takes factors of \[2, 32\]; the slice has \[2, 5\]"):
        taken(plan, Slice(slice.label, wrong, slice.full))


def test_a_head_of_another_shape_is_refused(encoder: Path) -> None:
    plan = resolve(tiny_plan(encoder))
    slice = drawn_slice(plan, 2, 1.0)
    wrong = {name: torch.zeros(5) for name in slice.full}
    with pytest.raises(errors.ModelRefusal, match=r"classifier\.\w+ has shape"):
        taken(plan, Slice(slice.label, slice.factors, wrong))
