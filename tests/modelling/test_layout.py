"""Resolving plans: what the base model is, what of it is adapted, and with which shapes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from modelling.checkpoint import fingerprint
from modelling.layout import resolve
from protocol import errors
from protocol.plan import BaseFacts, Layout, Plan
from tests.modelling.drawn import CONTINUE, tiny_plan


def layout(plan: Plan) -> Layout:
    resolved = resolve(plan)
    assert resolved.layout is not None
    return resolved.layout


def test_modules_are_named_as_in_the_task_model_with_outputs_before_inputs(encoder: Path) -> None:
    assert layout(tiny_plan(encoder, modules=["query", "intermediate.dense"])).modules == {
        "bert.encoder.layer.0.attention.self.query": (32, 32),
        "bert.encoder.layer.0.intermediate.dense": (48, 32),
        "bert.encoder.layer.1.attention.self.query": (32, 32),
        "bert.encoder.layer.1.intermediate.dense": (48, 32),
    }


def test_the_head_that_the_checkpoint_does_not_carry_is_trained_in_full(encoder: Path) -> None:
    assert layout(tiny_plan(encoder)).full == {"classifier.bias": (3,), "classifier.weight": (3, 32)}


def test_a_language_model_that_the_checkpoint_carries_whole_has_nothing_to_train_in_full(decoder: Path) -> None:
    assert layout(tiny_plan(decoder, CONTINUE)).full == {}


def test_a_language_model_becomes_a_classifier_with_a_fresh_head(decoder: Path) -> None:
    assert layout(tiny_plan(decoder, modules=["v_proj"])).full == {"score.weight": (3, 32)}


def test_all_linear_leaves_out_the_head_and_the_output_embedding(encoder: Path, decoder: Path) -> None:
    assert "classifier" not in (modules := layout(tiny_plan(encoder, modules="all-linear")).modules)
    assert len(modules) == 2 * 6 + 1  # six in each layer, and the pooler
    assert "lm_head" not in (modules := layout(tiny_plan(decoder, CONTINUE, modules="all-linear")).modules)
    assert len(modules) == 2 * 7


def test_facts_of_the_base_model_are_written_down(encoder: Path) -> None:
    tensors = load_file(encoder / "model.safetensors")
    head = 3 * 32 + 3
    assert layout(tiny_plan(encoder)).base == BaseFacts(
        parameters=sum(t.numel() for t in tensors.values()) + head, layers=2, hidden=32, vocabulary=257
    )


def test_modules_that_keep_their_weights_transposed_have_the_same_convention(tmp_path: Path, decoder: Path) -> None:
    config = GPT2Config(vocab_size=259, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for file in decoder.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    assert layout(tiny_plan(tmp_path, CONTINUE, modules=["attn.c_attn"])).modules == {"transformer.h.0.attn.c_attn": (96, 32)}


def test_a_head_of_several_layers_is_trained_whole(tmp_path: Path, encoder: Path) -> None:
    config = RobertaConfig(vocab_size=257, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    RobertaModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    for file in encoder.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    assert set(layout(tiny_plan(tmp_path)).full) == {
        "classifier.dense.bias",
        "classifier.dense.weight",
        "classifier.out_proj.bias",
        "classifier.out_proj.weight",
    }


def test_the_fingerprint_is_written_down_and_the_model_that_lacks_it_is_refused(encoder: Path, decoder: Path) -> None:
    resolved = resolve(tiny_plan(encoder))
    assert resolved.model.fingerprint == fingerprint(encoder)
    assert resolve(resolved) == resolved
    other = resolved.model_copy(update={"model": resolved.model.model_copy(update={"id": str(decoder)})})
    with pytest.raises(errors.ModelRefusal, match="the plan says"):
        resolve(other)


def test_a_module_that_is_not_there_is_refused_with_near_names(encoder: Path) -> None:
    with pytest.raises(errors.InvalidPlan, match="near it: query"):
        resolve(tiny_plan(encoder, modules=["value", "querry"]))


def test_a_module_that_is_not_linear_is_refused(encoder: Path) -> None:
    with pytest.raises(errors.InvalidPlan, match="no linear module"):
        resolve(tiny_plan(encoder, modules=["word_embeddings"]))


def test_pretrained_tensors_cannot_be_trained_in_full(encoder: Path) -> None:
    with pytest.raises(errors.InvalidPlan, match=r"bert\.pooler\.dense\.\w+, whose values are in the checkpoint"):
        resolve(tiny_plan(encoder, full=["classifier", "pooler"]))


def test_fresh_tensors_cannot_be_left_to_chance(encoder: Path) -> None:
    with pytest.raises(errors.InvalidPlan, match=r"name its module in adapter\.full"):
        resolve(tiny_plan(encoder, full=[]))


def test_a_head_may_be_named_and_is_then_not_adapted_as_well(encoder: Path) -> None:
    found = layout(tiny_plan(encoder, modules=["query"], full=["classifier"]))
    assert set(found.full) == {"classifier.weight", "classifier.bias"}
    with pytest.raises(errors.InvalidPlan, match="no linear module"):
        resolve(tiny_plan(encoder, modules=["classifier"]))


def test_ranks_larger_than_a_module_are_refused(encoder: Path) -> None:
    plan = tiny_plan(encoder)
    wide = plan.model_copy(update={"ranks": plan.ranks.model_copy(update={"ladder": [1, 33]})})
    with pytest.raises(errors.InvalidPlan, match=r"^the plan does not fit [^:]*: rank 33 is more than the smallest side 32"):
        resolve(wide)


def test_texts_longer_than_the_model_reads_are_refused(encoder: Path) -> None:
    plan = tiny_plan(encoder)
    with pytest.raises(errors.InvalidPlan, match="at most 128 tokens"):
        resolve(plan.model_copy(update={"task": plan.task.model_copy(update={"max_length": 129})}))


def test_something_must_be_adapted(encoder: Path) -> None:
    with pytest.raises(errors.InvalidPlan, match="at least one, or all-linear"):
        resolve(tiny_plan(encoder, modules=[]))


def test_a_tokenizer_that_cannot_pad_a_batch_is_refused(encoder: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(encoder, tmp_path / "copy"))
    words = Tokenizer(WordLevel({"see": 0}))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(place)
    with pytest.raises(errors.ModelRefusal, match="no token that could pad"):
        resolve(tiny_plan(place))


def test_a_model_that_transformers_does_not_know_is_refused(encoder: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(encoder, tmp_path / "copy"))
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "model_type": "homegrown", "auto_map": {"AutoConfig": "harm.Config"}}))
    (place / "harm.py").write_text("raise AssertionError('code of the model was run')")
    with pytest.raises(errors.ModelRefusal, match="transformers cannot open"):
        resolve(tiny_plan(place))


@pytest.mark.parametrize("damage", [{"model": {"type": "WordPiece", "vocab": 3}}, {"added_tokens": 3}])
def test_a_tokenizer_that_is_damaged_is_refused(encoder: Path, tmp_path: Path, damage: dict[str, object]) -> None:
    place = Path(shutil.copytree(encoder, tmp_path / "copy"))
    tokenizer = json.loads((place / "tokenizer.json").read_text())
    (place / "tokenizer.json").write_text(json.dumps(tokenizer | damage))
    with pytest.raises(errors.ModelRefusal, match="transformers cannot open"):
        resolve(tiny_plan(place))


def test_a_tensor_of_which_safetensors_knows_no_type_is_refused(encoder: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(encoder, tmp_path / "copy"))
    data = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(data.replace(b'"F32"', b'"F31"'))
    with pytest.raises(errors.ModelRefusal, match="transformers cannot open"):
        resolve(tiny_plan(place))


def test_nothing_is_loaded_to_resolve_a_plan(encoder: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(encoder, tmp_path / "copy"))
    tensors = {name: torch.full_like(t, torch.nan) for name, t in load_file(place / "model.safetensors").items()}
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    assert layout(tiny_plan(place)) == layout(tiny_plan(encoder))
