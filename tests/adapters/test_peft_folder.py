"""A published adapter as a PEFT folder: it loads, and it computes what the federation's own slices compute."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load, save
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from coordinator import adapters
from coordinator.cards import Facts, card
from coordinator.lowrank import cut
from coordinator.readout import ReadOut, Wanted
from modelling.layout import resolve
from protocol import errors
from protocol.contents import Label
from protocol.course import Cohort, Evaluation, Training
from protocol.plan import Adapter, CausalLM, Dtype, Layout, Model, Plan, Ranks, SequenceClassification, Split
from protocol.slices import Factors, Slice, pack
from tests.adapters import folders
from tests.tiny import tiny_decoder, tiny_encoder

# peft 0.21 still asks transformers 5 by a name that it will drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CAP = 8
FACTS = Facts(run="letters", plan=f"sha256:{2:064}", round=7, metrics={"accuracy": 0.8125, "loss": 0.5})
TOKENS = torch.tensor([[2, 40, 41, 42, 3], [2, 50, 51, 52, 3]])


def make_plan(folder: Path, task: SequenceClassification | CausalLM, modules: list[str]) -> Plan:
    plan = Plan(
        name="letters",
        model=Model(id=str(folder)),
        task=task,
        data="texts",
        adapter=Adapter(modules=modules),
        training=Training(learning_rate=1e-3),
        ranks=Ranks(ladder=[2, 4, 8]),
        cohort=Cohort(target=1, quorum=1),
        rounds=9,
    )
    return resolve(plan)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tiny_encoder(tmp_path_factory.mktemp("encoder"))
    return make_plan(folder, SequenceClassification(labels=["no", "yes", "perhaps"]), ["query", "output.dense"])


@pytest.fixture(scope="session")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return make_plan(tiny_decoder(tmp_path_factory.mktemp("decoder")), CausalLM(), ["q_proj", "down_proj"])


@pytest.fixture(params=["classifier", "writer"])
def plan(request: pytest.FixtureRequest) -> Plan:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Plan)
    return found


def layout_of(plan: Plan) -> Layout:
    assert plan.layout is not None
    return plan.layout


def make_adapter(plan: Plan, directions: int = CAP) -> Slice:
    """A global adapter of that many directions in falling order, each as the merge leaves them: b = U√S, a = √S Vᵀ."""
    generator = torch.Generator().manual_seed(5)
    factors = {}
    for module, (n_out, n_in) in layout_of(plan).modules.items():
        u, s, vt = torch.linalg.svd(torch.randn(n_out, n_in, generator=generator) / 4)
        root = s[:CAP].sqrt() * (torch.arange(CAP) < directions)
        factors[module] = Factors(b=u[:, :CAP] * root, a=root[:, None] * vt[:CAP])
    full = {name: torch.randn(shape, generator=generator) for name, shape in layout_of(plan).full.items()}
    return Slice(Label(rank=CAP, scale=1.0, round=7), factors, full)


def make_files(plan: Plan, rank: int, directions: int = CAP) -> dict[str, bytes]:
    layout = layout_of(plan)
    return folders.files(plan, FACTS, pack(make_adapter(plan, directions), layout, Dtype.float32), Wanted(rank))


def base_of(plan: Plan) -> PreTrainedModel:
    torch.manual_seed(0)  # the head that the checkpoint does not have
    if isinstance(plan.task, SequenceClassification):
        model = AutoModelForSequenceClassification.from_pretrained(plan.model.id, num_labels=len(plan.task.labels))
    else:
        model = AutoModelForCausalLM.from_pretrained(plan.model.id)
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def loaded(plan: Plan, files: dict[str, bytes], folder: Path) -> peft.PeftModel:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return peft.PeftModel.from_pretrained(base_of(plan), folder).eval()


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found = model(TOKENS).logits
    assert isinstance(found, Tensor)
    return found


def with_products(plan: Plan, products: dict[str, Tensor], full: dict[str, Tensor]) -> PreTrainedModel:
    """The base model with W + product in each adapted module, and the fully trained tensors in their places."""
    model = base_of(plan)
    with torch.no_grad():
        for module, product in products.items():
            model.get_parameter(f"{module}.weight").add_(product)
        for name, tensor in full.items():
            model.get_parameter(name).copy_(tensor)
    return model


@pytest.mark.parametrize("rank", [1, 4, CAP])
def test_the_folder_loads_in_peft_and_computes_the_product_of_the_leading_directions(plan: Plan, rank: int, tmp_path: Path) -> None:
    adapter = make_adapter(plan)
    products = {m: f.b[:, :rank] @ f.a[:rank] for m, f in adapter.factors.items()}
    expected = logits(with_products(plan, products, dict(adapter.full)))
    found = logits(loaded(plan, make_files(plan, rank), tmp_path))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, logits(base_of(plan)), atol=1e-2)


@pytest.mark.parametrize("kept", [0.3, 0.6, 1.0])
def test_each_module_has_the_smallest_rank_that_holds_the_share_asked_for(plan: Plan, kept: float, tmp_path: Path) -> None:
    whole, layout = make_adapter(plan), layout_of(plan)
    first = next(iter(layout.modules))
    whole.factors[first].b[:, 1:] *= 1e-3  # one module of nearly one direction
    files = folders.files(plan, FACTS, pack(whole, layout, Dtype.float32), Wanted(CAP, kept))
    model = loaded(plan, files, tmp_path)
    ranks = {}
    for name, factors in whole.factors.items():
        layer = model.base_model.model.get_submodule(name)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        ranks[name] = len(a)
        assert layer.scaling["default"] == 1
        assert torch.equal(a, factors.a[: len(a)])
        assert torch.equal(b, factors.b[:, : len(a)])
        s = torch.linalg.svdvals(factors.b.double() @ factors.a.double()).square()[:CAP]
        assert s[: len(a)].sum() >= (kept - 1e-6) * s.sum()
        assert len(a) == 1 or s[: len(a) - 1].sum() < kept * s.sum()
    assert ranks[first] == 1 or kept == 1
    assert max(ranks.values()) == json.loads(files["adapter_config.json"])["r"]


@pytest.mark.parametrize("directions", [3, CAP])
def test_it_computes_what_the_slice_of_that_rank_computes(plan: Plan, directions: int, tmp_path: Path) -> None:
    adapter, rank, scale = make_adapter(plan, directions), 4, 2.0
    fresh = {m: torch.randn(CAP, f.a.shape[1]) for m, f in adapter.factors.items()}
    parts = {m: cut(f, rank, scale, Split.balanced, fresh[m], torch.float32) for m, f in adapter.factors.items()}
    expected = logits(with_products(plan, {m: scale * f.b @ f.a for m, f in parts.items()}, dict(adapter.full)))
    found = logits(loaded(plan, make_files(plan, rank, directions), tmp_path))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_merged_into_the_base_it_gives_the_same_logits(plan: Plan, tmp_path: Path) -> None:
    model = loaded(plan, make_files(plan, 4), tmp_path)
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-5, atol=1e-5)


def test_a_rank_beyond_the_adapters_directions_is_filled_with_zeros(plan: Plan, tmp_path: Path) -> None:
    wide = load(make_files(plan, 16)["adapter_model.safetensors"])
    narrow = load(make_files(plan, CAP)["adapter_model.safetensors"])
    for name, tensor in narrow.items():
        if ".lora_A." in name:
            assert torch.equal(wide[name], torch.cat([tensor, torch.zeros(8, tensor.shape[1])]))
        elif ".lora_B." in name:
            assert torch.equal(wide[name], torch.cat([tensor, torch.zeros(tensor.shape[0], 8)], dim=1))
    assert torch.allclose(
        logits(loaded(plan, make_files(plan, 16), tmp_path)), logits(loaded(plan, make_files(plan, CAP), tmp_path)), atol=1e-5
    )


def test_peft_saves_the_same_tensors_under_the_same_names(plan: Plan, tmp_path: Path) -> None:
    ours = make_files(plan, 4)
    loaded(plan, ours, tmp_path).save_pretrained(tmp_path / "again")
    theirs = load((tmp_path / "again" / "adapter_model.safetensors").read_bytes())
    mine = load(ours["adapter_model.safetensors"])
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_configuration_holds_nothing_that_peft_does_not_know(plan: Plan) -> None:
    config = json.loads(make_files(plan, 4)["adapter_config.json"])
    assert peft.LoraConfig(**{k: v for k, v in config.items() if k != "peft_type"}).peft_type == config["peft_type"]
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    assert config["target_modules"] == list(layout_of(plan).modules)


def test_a_classifiers_head_is_saved_whole_and_a_language_model_has_none(classifier: Plan, writer: Plan) -> None:
    assert json.loads(make_files(classifier, 4)["adapter_config.json"])["modules_to_save"] == ["classifier"]
    assert json.loads(make_files(writer, 4)["adapter_config.json"])["modules_to_save"] is None
    assert all(".lora_" in name for name in load(make_files(writer, 4)["adapter_model.safetensors"]))


def test_a_head_of_several_layers_is_named_once_and_one_beside_adapted_modules_by_its_path() -> None:
    layout = Layout.model_validate(
        {
            "modules": {"bert.encoder.query": (4, 4)},
            "full": {"classifier.dense.weight": (4, 4), "classifier.out.bias": (2,), "bert.pooler.dense.weight": (4, 4)},
            "base": {"parameters": 1, "layers": 1, "hidden": 1, "vocabulary": 1},
        }
    )
    assert adapters.heads(layout) == ["bert.pooler", "classifier"]


def test_the_model_card_says_what_made_the_adapter_and_the_hub_can_read_it(classifier: Plan) -> None:
    text = make_files(classifier, 4)["README.md"].decode()
    matter = ModelCard(text).data
    assert (matter.get("base_model"), matter.get("library_name")) == (classifier.model.id, "peft")
    for fact in (
        "# letters, round 7, rank 4",
        "Each client measured what it would train from next, its own rank's slice or the whole adapter:\nwhichever rank this folder has",
        "| accuracy | 0.8125 |",
        "2, 4, 8, given by the policy `capacity`",
        "`folded`",
        FACTS.plan,
    ):
        assert fact in text


def test_the_model_card_names_the_rank_that_everybody_measured(classifier: Plan) -> None:
    plan = classifier.model_copy(update={"evaluation": Evaluation(rank=2)})
    assert "Each client measured the slice of rank 2:" in make_files(plan, 4)["README.md"].decode()


def test_the_model_cards_code_loads_the_adapter(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = make_files(plan, 4)
    expected = logits(loaded(plan, files, tmp_path))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(files["README.md"].decode().split("```python\n")[1].split("```")[0], names)
    model = names["model"]
    assert isinstance(model, peft.PeftModel)
    torch.testing.assert_close(logits(model.eval()), expected)


def test_the_model_card_knows_models_that_a_package_carries_and_revisions(classifier: Plan) -> None:
    carried = classifier.model_copy(update={"model": Model(id="package:tiny_words", revision="v1")})
    text = card(carried, Facts("letters", "sha256:0", 0, {}), ReadOut({"query": 4}, 0.0), 96)
    assert "import tiny_words\n" in text
    assert 'from_pretrained(tiny_words.get_model_path(), revision="v1", id2label=' in text
    assert "Measured by" not in text
    assert "begun with" not in text
    further = carried.model_copy(update={"continues": f"sha256:{1:064}"})
    assert f"| begun with | the adapter `sha256:{1:064}` of an earlier run |" in card(
        further, Facts("letters", "sha256:0", 0, {}), ReadOut({"query": 4}, 0.0), 96
    )


def test_the_same_adapter_gives_the_same_archive(plan: Plan, tmp_path: Path) -> None:
    made = make_files(plan, 4)
    packed = []
    for folder, order in (("one", sorted(made)), ("other", sorted(made, reverse=True))):
        (tmp_path / folder).mkdir()
        for name in order:
            (tmp_path / folder / name).write_bytes(made[name])
        stream = io.BytesIO()
        adapters.archive(tmp_path / folder, stream)
        packed.append(stream)
    assert packed[0].getvalue() == packed[1].getvalue()
    with zipfile.ZipFile(packed[0]) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == made


def test_the_numbers_are_written_as_their_library_writes_them(plan: Plan) -> None:
    made = make_files(plan, 4)["adapter_model.safetensors"]
    assert made == save(load(made), metadata={"format": "pt"})


def test_bytes_that_are_not_the_plans_adapter_are_refused(classifier: Plan, writer: Plan) -> None:
    other = pack(make_adapter(writer), layout_of(writer), Dtype.float32)
    with pytest.raises(errors.MismatchedSlice, match="not the global adapter"):
        folders.files(classifier, FACTS, other, Wanted(4))
    scaled = make_adapter(classifier)
    scaled = Slice(Label(rank=CAP, scale=2.0, round=7), scaled.factors, scaled.full)
    with pytest.raises(errors.MismatchedSlice, match="a scale that is not 1"):
        folders.files(classifier, FACTS, pack(scaled, layout_of(classifier), Dtype.float32), Wanted(4))


def test_a_plan_that_was_never_resolved_has_no_adapter(classifier: Plan) -> None:
    adapter = pack(make_adapter(classifier), layout_of(classifier), Dtype.float32)
    with pytest.raises(errors.InvalidPlan, match="never resolved"):
        folders.files(classifier.model_copy(update={"layout": None}), FACTS, adapter, Wanted(4))
