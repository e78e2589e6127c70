"""One job's work, on real tiny models."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from agent import machine
from agent.data import Part
from agent.policy import Policy
from agent.training import Outcome, Standing, Trainer, precision
from coordinator.cards import Facts
from coordinator.readout import Wanted
from protocol import checks, contents, errors, slices
from protocol.checks import Expected
from protocol.contents import Label
from protocol.messages import Job
from protocol.plan import CausalLM, Dtype, Float, Task
from protocol.slices import Slice
from protocol.states import JobKind
from tests.adapters.folders import files
from tests.agent.work import ROWS, SCALE, catalogue, handed_out, make_job, make_start, resolved
from tests.modelling.drawn import CLASSES, CONTINUE

QUESTIONS = CausalLM(prompt="text", text="label", max_length=64)


def ignore(_: Standing) -> None:
    """Nobody listens."""


def do(folder: Path, job: Job, model: Path, tell: Callable[[Standing], None] = ignore, **policy: object) -> Outcome:
    trainer = Trainer(catalogue(folder), Policy.model_validate(policy))
    return trainer(job, handed_out(model, job), tell)


def packed(outcome: Outcome, job: Job) -> bytes:
    """The trained slice as it travels."""
    assert outcome.slice is not None
    return slices.pack(outcome.slice, job.layout, job.wire)


@pytest.fixture(params=["classify", "continue", "answer"])
def setting(request: pytest.FixtureRequest) -> tuple[Path, Task]:
    kinds: dict[str, tuple[str, Task]] = {
        "classify": ("encoder", CLASSES),
        "continue": ("decoder", CONTINUE),
        "answer": ("decoder", QUESTIONS),
    }
    model, task = kinds[request.param]
    return request.getfixturevalue(model), task


def test_the_same_job_gives_the_same_bytes(tmp_path: Path, setting: tuple[Path, Task]) -> None:
    model, task = setting
    job = make_job(model, task=task, epochs=2)
    first, second = do(tmp_path, job, model), do(tmp_path, job, model)
    assert packed(first, job) == packed(second, job)
    assert first.metrics == second.metrics


def test_whatever_the_process_drew_before_does_not_matter_nor_is_it_disturbed(tmp_path: Path, encoder: Path) -> None:
    job = make_job(encoder)
    torch.manual_seed(1)
    first = do(tmp_path, job, encoder)
    torch.rand(7)
    state = torch.get_rng_state()
    assert packed(do(tmp_path, job, encoder), job) == packed(first, job)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_seed_gives_other_bytes(tmp_path: Path, encoder: Path) -> None:
    first, second = make_job(encoder, seed=1), make_job(encoder, seed=2)
    assert packed(do(tmp_path, first, encoder), first) != packed(do(tmp_path, second, encoder), second)


@pytest.mark.parametrize("wire", get_args(Float))
def test_the_trained_slice_is_the_one_that_the_coordinator_expects(tmp_path: Path, setting: tuple[Path, Task], wire: Dtype) -> None:
    model, task = setting
    job = make_job(model, task=task, wire=wire)
    outcome = do(tmp_path, job, model)
    sent = packed(outcome, job)
    assert len(sent) <= job.max_upload_bytes
    header = contents.read_header(sent, len(sent))
    checks.check_header(header, Expected(job.layout, job.rank, job.scale, wire, job.slice.digest, job.round))
    assert header.label == Label(rank=2, scale=SCALE, round=3, base=job.slice.digest, examples=18)
    for module in slices.unpack(sent).factors.values():
        checks.check_finite("a", module.a)


def test_training_lowers_the_loss(tmp_path: Path, setting: tuple[Path, Task]) -> None:
    model, task = setting
    metrics = do(tmp_path, make_job(model, task=task, epochs=20, learning_rate=2e-2), model).metrics
    assert metrics["loss_after"].value < metrics["loss_before"].value - 0.1


def test_accumulated_passes_give_the_gradient_of_one_large_batch(tmp_path: Path, encoder: Path) -> None:
    """In exact arithmetic they are equal; with dropout off what remains is rounding, which AdamW's first steps magnify."""
    whole = do(tmp_path, make_job(still(encoder, tmp_path), batch_size=6, accumulate=1, epochs=3), still(encoder, tmp_path))
    parts = do(tmp_path, make_job(still(encoder, tmp_path), batch_size=2, accumulate=3, epochs=3), still(encoder, tmp_path))
    assert parts.usage.steps == whole.usage.steps
    assert parts.metrics["loss_before"].value == pytest.approx(whole.metrics["loss_before"].value, rel=1e-5)
    assert parts.metrics["loss_after"].value == pytest.approx(whole.metrics["loss_after"].value, rel=1e-3)


def still(model: Path, folder: Path) -> Path:
    """The model without dropout."""
    place = folder / "still"
    if not place.exists():
        bare = AutoModelForSequenceClassification.from_pretrained(model)
        bare.config.hidden_dropout_prob = bare.config.attention_probs_dropout_prob = 0.0
        bare.bert.save_pretrained(place)
        AutoTokenizer.from_pretrained(model).save_pretrained(place)
    return place


def test_examples_are_the_rows_that_were_trained_on(tmp_path: Path, encoder: Path) -> None:
    assert do(tmp_path, make_job(encoder, epochs=3), encoder).examples == 18
    assert do(tmp_path, make_job(encoder, max_steps=2), encoder).examples == 8


def test_every_step_is_told(tmp_path: Path, encoder: Path) -> None:
    told: list[Standing] = []
    outcome = do(tmp_path, make_job(encoder), encoder, told.append)
    assert [standing[:3] for standing in told] == [("load", 0, 0), *(("train", n, 5) for n in range(6))]
    assert all(standing.loss is not None and standing.loss > 0 for standing in told[2:])
    assert outcome.usage.steps == 5
    assert outcome.usage.peak_memory_bytes is not None


def test_a_listener_that_raises_stops_the_training_at_that_step(tmp_path: Path, encoder: Path) -> None:
    told: list[Standing] = []

    def tell(standing: Standing) -> None:
        told.append(standing)
        if standing.step == 2:
            raise errors.JobOver("enough")

    with pytest.raises(errors.JobOver):
        do(tmp_path, make_job(encoder), encoder, tell)
    assert told[-1].step == 2
    assert do(tmp_path, make_job(encoder), encoder).examples == 18  # the base model was not left in use


def test_usage_is_counted_by_the_clock_that_it_is_given(tmp_path: Path, encoder: Path) -> None:
    ticks = iter(range(1000))
    trainer = Trainer(catalogue(tmp_path), clock=lambda: float(next(ticks)))
    usage = trainer(make_job(encoder), make_start(encoder), ignore).usage
    assert (usage.seconds, usage.steps, usage.step_seconds) == (5.0, 5, 1.0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@torch.no_grad()
def test_an_evaluation_measures_what_peft_computes_with_the_pulled_adapter(tmp_path: Path, setting: tuple[Path, Task]) -> None:
    """The canonical adapter has scale 1; b is multiplied by the scale, which is a power of two, so nothing is rounded."""
    model, task = setting
    start, plan = make_start(model, 2, task), resolved(model, task)
    assert plan.layout is not None
    whole = Slice(
        Label(rank=2, scale=1.0, round=0), {n: slices.Factors(b=f.b * SCALE, a=f.a) for n, f in start.factors.items()}, start.full
    )
    for name, data in files(plan, Facts("tiny", "sha256:0", 1, {}), slices.pack(whole, plan.layout, Dtype.float32), Wanted(2)).items():
        (tmp_path / name).write_bytes(data)
    kind = AutoModelForSequenceClassification if task.kind == "sequence-classification" else AutoModelForCausalLM
    bare = kind.from_pretrained(model, num_labels=3) if task.kind == "sequence-classification" else kind.from_pretrained(model)
    reference, tokenizer = PeftModel.from_pretrained(bare, str(tmp_path)).eval(), AutoTokenizer.from_pretrained(model)

    outcome = do(tmp_path, make_job(model, kind=JobKind.evaluate, task=task), model)

    losses, hits, count = 0.0, 0, 0
    for _, row in catalogue(tmp_path).rows("things", Part.held_out):
        if isinstance(task, CausalLM):
            before = tokenizer(row[task.prompt])["input_ids"] if task.prompt else []
            after = [*tokenizer(row[task.text], add_special_tokens=task.prompt is None)["input_ids"], tokenizer.eos_token_id]
            logits = reference(torch.tensor([[*before, *after]])).logits[0, :-1]
            learned = torch.tensor([*before, *after])[1:][max(0, len(before) - 1) :]
            losses += float(functional.cross_entropy(logits[-len(learned) :], learned, reduction="sum"))
            count += len(learned)
        else:
            logits = reference(**tokenizer(row["text"], return_tensors="pt")).logits
            number = task.labels.index(str(row["label"]))
            losses += float(functional.cross_entropy(logits, torch.tensor([number])))
            hits, count = hits + int(logits.argmax() == number), count + 1
    assert outcome.slice is None
    assert outcome.examples == 6
    assert outcome.metrics["loss"].value == pytest.approx(losses / count, rel=1e-5)
    assert outcome.metrics["loss"].weight == count
    if isinstance(task, CausalLM):
        assert outcome.metrics["perplexity"].value == pytest.approx(math.exp(losses / count), rel=1e-4)
    else:
        assert outcome.metrics["accuracy"].value == hits / count
        assert outcome.metrics["f1"].weight == 6


def test_lower_precision_trains_as_well(tmp_path: Path, encoder: Path) -> None:
    outcome = do(tmp_path, make_job(encoder, precision="bfloat16", epochs=20, learning_rate=2e-2), encoder)
    assert outcome.metrics["loss_after"].value < 0.7 * outcome.metrics["loss_before"].value


def test_auto_is_float32_where_the_model_is_narrow_and_what_the_plan_says_is_done(encoder: Path) -> None:
    assert precision(make_job(encoder, precision="auto"), "cpu") is None
    assert precision(make_job(encoder, precision="float32"), "cpu") is None
    assert precision(make_job(encoder, precision="float16"), "cpu") is torch.float16
    wide = make_job(encoder, precision="auto")
    base = wide.layout.base.model_copy(update={"hidden": 768})
    wide = wide.model_copy(update={"layout": wide.layout.model_copy(update={"base": base})})
    best = machine.precisions("cpu")[-1]
    assert precision(wide, "cpu") is (torch.bfloat16 if best is Dtype.bfloat16 else None)


def test_a_loss_that_is_no_number_ends_the_training(tmp_path: Path, encoder: Path) -> None:
    start = make_start(encoder)
    broken = Slice(start.label, start.factors, {name: t * torch.nan for name, t in start.full.items()})
    with pytest.raises(errors.NonFiniteSlice, match="loss is nan at step 1 of 5"):
        Trainer(catalogue(tmp_path))(make_job(encoder), broken, ignore)
    with pytest.raises(errors.NonFiniteSlice, match="is nan on held-out rows"):
        Trainer(catalogue(tmp_path))(make_job(encoder, kind=JobKind.evaluate), broken, ignore)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": Label(rank=1, scale=SCALE, round=0)}, "rank"),
        ({"label": Label(rank=2, scale=1.0, round=0)}, "scale"),
        ({"factors": {}}, "modules"),
        ({"full": {}}, "full tensors"),
    ],
)
def test_a_slice_that_is_not_the_jobs_is_not_trained(tmp_path: Path, encoder: Path, change: dict[str, object], words: str) -> None:
    start = make_start(encoder)
    other = Slice(**{"label": start.label, "factors": start.factors, "full": start.full, **change})  # type: ignore[arg-type]  # as written above
    with pytest.raises(errors.MismatchedSlice, match=words):
        Trainer(catalogue(tmp_path))(make_job(encoder), other, ignore)


def test_a_model_that_does_not_fit_the_offered_memory_is_refused_before_it_is_loaded(tmp_path: Path, encoder: Path) -> None:
    with pytest.raises(errors.MemoryRefusal, match=r"takes 114444 bytes, .* at least 124220; 100000 are offered"):
        do(tmp_path, make_job(encoder), encoder, memory_bytes=100_000)


def test_memory_that_runs_out_is_a_refusal_with_advice(tmp_path: Path, encoder: Path) -> None:
    def tell(standing: Standing) -> None:
        if standing.phase == "train":
            torch.empty(2**60)

    with pytest.raises(errors.MemoryRefusal, match="smaller batches with more accumulation"):
        do(tmp_path, make_job(encoder), encoder, tell)


def test_other_defects_are_not_taken_for_lack_of_memory(tmp_path: Path, encoder: Path) -> None:
    def tell(standing: Standing) -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        do(tmp_path, make_job(encoder), encoder, lambda standing: tell(standing) if standing.phase == "train" else None)


def test_gradients_are_clipped_if_the_plan_says_so(tmp_path: Path, encoder: Path) -> None:
    """AdamW hides the size of a gradient that is always the same; a step later the ratio of two of them shows."""
    tight, free = make_job(encoder, clip_norm=1e-3), make_job(encoder, clip_norm=None)
    assert packed(do(tmp_path, tight, encoder), tight) != packed(do(tmp_path, free, encoder), free)


def test_more_steps_than_the_policy_allows_are_refused(tmp_path: Path, encoder: Path) -> None:
    with pytest.raises(errors.PolicyRefusal, match="max_steps"):
        do(tmp_path, make_job(encoder), encoder, max_steps=4)


def test_another_model_under_the_same_name_is_refused(tmp_path: Path, encoder: Path) -> None:
    job = make_job(encoder)
    other = job.model_copy(update={"model": job.model.model_copy(update={"fingerprint": "sha256:" + 64 * "f"})})
    with pytest.raises(errors.ModelRefusal, match="the plan was made with"):
        do(tmp_path, other, encoder)


def test_data_that_lack_a_column_are_refused(tmp_path: Path, encoder: Path) -> None:
    trainer = Trainer(catalogue(tmp_path, [{"body": row["text"], "label": row["label"]} for row in ROWS]))
    with pytest.raises(errors.DataRefusal, match="no column 'text', only body, label"):
        trainer(make_job(encoder), make_start(encoder), ignore)


def test_an_evaluation_needs_held_out_rows(tmp_path: Path, encoder: Path) -> None:
    trainer = Trainer(catalogue(tmp_path, held_out=None))
    with pytest.raises(errors.DataRefusal, match="keeps no rows back"):
        trainer(make_job(encoder, kind=JobKind.evaluate), make_start(encoder), ignore)
