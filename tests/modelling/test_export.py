"""Pulled adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from coordinator.cards import Facts
from coordinator.readout import Wanted
from modelling import adapters, base
from modelling.export import load_adapter, merge_into_base
from modelling.layout import resolve
from protocol import errors, slices
from protocol.plan import Dtype, Plan
from protocol.slices import Slice
from tests.adapters.folders import files
from tests.modelling.drawn import CLASSES, CONTINUE, drawn_slice, tiny_plan

IDS = torch.tensor([[2, 17, 31, 60, 200, 3]])


def pulled(plan: Plan, slice: Slice, out: Path, kept: float | None = None) -> Path:
    """The PEFT folder that the coordinator makes of a global adapter."""
    assert plan.layout is not None
    whole = slices.pack(slice, plan.layout, Dtype.float32)
    for name, data in files(plan, Facts(run="tiny", plan="sha256:0", round=1, metrics={}), whole, Wanted(slice.label.rank, kept)).items():
        out.mkdir(exist_ok=True)
        (out / name).write_bytes(data)
    return out


@pytest.fixture(params=["encoder", "decoder"])
def plan(request: pytest.FixtureRequest) -> Plan:
    place = request.getfixturevalue(request.param)
    return resolve(tiny_plan(place, CLASSES if request.param == "encoder" else CONTINUE, modules="all-linear"))


@torch.no_grad()
def test_a_loaded_adapter_gives_the_logits_that_the_federation_gave(plan: Plan, tmp_path: Path) -> None:
    slice = drawn_slice(plan, 4, 1.0)
    assert plan.layout is not None
    with adapters.adapted(base.load(plan.model, plan.task), slice, plan.layout, 0.0) as adapted:
        ours = adapted.model(IDS).logits
    loaded = load_adapter(pulled(plan, slice, tmp_path / "adapter"))
    assert torch.equal(loaded.model(IDS).logits, ours)
    assert not torch.allclose(base.copy(plan.model, plan.task).model(IDS).logits, ours)


@torch.no_grad()
@pytest.mark.parametrize("kept", [None, 0.6])
def test_a_merged_model_needs_no_peft_and_computes_the_same_also_where_modules_have_ranks_of_their_own(
    plan: Plan, kept: float | None, tmp_path: Path
) -> None:
    folder = pulled(plan, drawn_slice(plan, 4, 1.0), tmp_path / "adapter", kept)
    assert bool(json.loads((folder / "adapter_config.json").read_text())["rank_pattern"]) is (kept is not None)
    merge_into_base(folder, tmp_path / "merged")
    family = AutoModelForSequenceClassification if plan.task == CLASSES else AutoModelForCausalLM
    merged, loading = family.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not loading["missing_keys"]
    torch.testing.assert_close(merged(IDS).logits, load_adapter(folder).model(IDS).logits, rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("see it")["input_ids"]


def test_outputs_carry_the_labels_that_are_given(encoder: Path, tmp_path: Path) -> None:
    plan = resolve(tiny_plan(encoder))
    folder = pulled(plan, drawn_slice(plan, 1, 1.0), tmp_path / "adapter")
    merge_into_base(folder, tmp_path / "merged", labels=["blue", "green", "red"])
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["id2label"] == {"0": "blue", "1": "green", "2": "red"}
    with pytest.raises(errors.ModelRefusal, match="has 3 outputs; 2 labels were given"):
        load_adapter(folder, labels=["no", "yes"])


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.ModelRefusal, match="is no PEFT adapter"):
        load_adapter(tmp_path)


def test_an_adapter_of_another_base_model_is_refused(encoder: Path, decoder: Path, tmp_path: Path) -> None:
    plan = resolve(tiny_plan(encoder))
    folder = pulled(plan, drawn_slice(plan, 1, 1.0), tmp_path / "adapter")
    with pytest.raises(errors.ModelRefusal, match="made for another base model"):
        load_adapter(folder, model=plan.model.model_copy(update={"id": str(decoder)}))
