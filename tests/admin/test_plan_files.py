"""Plan files: what is wrong with them is said once and exactly, and what is right is resolved and shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from admin import plans, words
from admin.__main__ import app
from protocol import errors
from protocol.plan import Plan
from tests.admin.conftest import Desk
from tests.federation import make_plan
from tests.tiny import tiny_encoder

TOML = """
name = "letters"
data = "texts"
rounds = 1

[model]
id = "{model}"

[task]
kind = "sequence-classification"
labels = ["no", "yes", "perhaps"]
max_length = 32

[adapter]
modules = ["query"]

[training]
learning_rate = 0.01

[ranks]
ladder = [2, 4]

[cohort]
target = 1
quorum = 1
"""


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    file = folder / "plan.toml"
    file.write_text(TOML.format(model=tiny_encoder(folder / "encoder")))
    return file


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name = ", "is no TOML: Invalid value"),
        ("", "name: Field required; .*; and 4 more"),
        (TOML.replace("[2, 4]", "[4, 2]"), "ranks.ladder: the ladder must rise"),
        (TOML.replace("quorum = 1", "quorum = 3"), "cohort: the quorum of 3 is more than the target of 1"),
        (TOML.replace("rounds = 1", "rounds = -1"), "rounds: Input should be greater than or equal to 1"),
        (TOML + "colour = 1", "cohort.colour is unknown; there are target, quorum, over_selection, attempts"),
        (TOML + "quorums = 1", "cohort.quorums is unknown; is quorum meant?"),
        ('strategi = "delta"\n' + TOML, "strategi is unknown; is strategy meant?"),
        (TOML.replace("max_length", "max_len"), "task.sequence-classification.max_len is unknown"),
        ("\xff", "cannot be read: .*utf-8"),
    ],
)
def test_a_wrong_plan_is_refused_with_the_place_and_the_reason(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(errors.InvalidPlan, match=said):
        plans.read(file)


def test_a_missing_file_and_wrong_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidPlan, match="No such file"):
        plans.read(tmp_path / "plan.toml")
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(errors.InvalidPlan, match="is no JSON"):
        plans.read(tmp_path / "plan.json")


def test_a_resolved_plan_is_left_as_it_is() -> None:
    assert plans.resolved(make_plan()) == make_plan()


def test_checking_a_plan_says_what_it_amounts_to(toml: Path) -> None:
    result = CliRunner().invoke(app, ["plans", "check", str(toml)])
    assert result.exit_code == 0, result.output
    # two query modules of 32 × 32 and a head of 3 × 32 + 3
    for fact in ("2 modules: query", "classifier.bias, classifier.weight", f"{2 * 2 * 64 + 99}", f"{2 * 4 * 64 + 99}", "sha256:"):
        assert fact in result.stdout
    facts = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert {"strategy folded (not checked here)", "rank policy capacity (not checked here)"} <= set(facts)
    found = Plan.model_validate(json.loads(CliRunner().invoke(app, ["plans", "check", str(toml), "--json"]).stdout))
    assert found.layout is not None
    assert found.model.fingerprint is not None


def test_checking_a_plan_says_how_long_slices_and_trained_slices_are(toml: Path) -> None:
    toml.write_text('uploads = "int8"\n' + toml.read_text())
    result = CliRunner().invoke(app, ["plans", "check", str(toml)])
    count = 2 * 4 * 64 + 99
    # in int8 two scales of each of two modules' four directions, one of the bias and three of the head's rows
    assert f"{count} {words.size(4 * count)} {words.size(count + 4 * (2 * 2 * 4 + 1 + 3))}" in " ".join(result.stdout.split())


def test_a_base_model_that_cannot_be_had_is_one_line(toml: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(TOML.format(model="./nowhere"))
    result = CliRunner().invoke(app, ["plans", "check", str(tmp_path / "plan.toml")])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "there is no folder ./nowhere" in result.stderr


def test_a_resolved_plan_is_written_to_a_file_or_to_standard_output(toml: Path, tmp_path: Path) -> None:
    printed = CliRunner().invoke(app, ["plans", "resolve", str(toml)]).stdout
    written = CliRunner().invoke(app, ["plans", "resolve", str(toml), "--out", str(tmp_path / "plan.json"), "--json"])
    assert (tmp_path / "plan.json").read_text() == printed == written.stdout
    assert plans.read(tmp_path / "plan.json") == plans.resolved(plans.read(toml))
    refused = CliRunner().invoke(app, ["plans", "resolve", str(toml), "--out", str(tmp_path)])
    assert "cannot be written" in refused.stderr


async def test_a_plan_as_toml_runs_and_its_adapter_can_be_pulled_merged_into_the_base_model(desk: Desk, toml: Path, tmp_path: Path) -> None:
    run = desk.tell("runs", "create", toml)["id"]
    desk.federation.tick()
    assert "model.safetensors" in desk.tell("adapter", "pull", run, "--merged", "--out", tmp_path / "merged")["files"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "merged")("good day", return_tensors="pt")
    assert model.config.id2label == {0: "no", 1: "yes", 2: "perhaps"}
    with torch.no_grad():
        assert model(**tokens).logits.shape == (1, 3)
