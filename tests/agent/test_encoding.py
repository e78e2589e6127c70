"""Rows as token ids, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from transformers import AutoTokenizer

from agent.encoding import IGNORED, Example, Tokenizer, batches, collate, encode
from agent.readers import Row
from protocol import errors
from protocol.plan import CausalLM, SequenceClassification, Task
from tests.modelling.drawn import CLASSES

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pieces(encoder: Path) -> Tokenizer:
    found: Tokenizer = AutoTokenizer.from_pretrained(encoder)
    return found


@pytest.fixture(scope="module")
def bytewise(decoder: Path) -> Tokenizer:
    """One token per byte; <s> is 1 and stands before every text, </s> is 2."""
    found: Tokenizer = AutoTokenizer.from_pretrained(decoder)
    return found


def encoded(rows: Sequence[Row], task: Task, tokenizer: Tokenizer, alias: str) -> list[Example]:
    return encode(enumerate(rows, start=1), task, tokenizer, alias)


def text(tokenizer: Tokenizer, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))  # type: ignore[attr-defined]  # only tests read tokens back


def learned(example: Example, task: CausalLM, tokenizer: Tokenizer) -> str:
    """What cross-entropy sees of an example, as text."""
    labels = collate([example], task, 0, CPU).labels[0, 1:]  # the first token is never predicted
    return text(tokenizer, labels[labels != IGNORED].tolist())


def test_the_prompt_is_read_and_only_what_follows_it_is_learned(bytewise: Tokenizer) -> None:
    task = CausalLM(prompt="question", text="answer", max_length=64)
    (example,) = encoded([{"question": "2+2=", "answer": "four"}], task, bytewise, "sums")
    assert text(bytewise, list(example.ids)) == "<s>2+2=four</s>"
    assert learned(example, task, bytewise) == "four</s>"
    assert example.weight(task) == 5


def test_the_prompt_has_the_tokens_that_it_has_when_the_model_is_used(bytewise: Tokenizer) -> None:
    task = CausalLM(prompt="question", text="answer", max_length=64)
    (example,) = encoded([{"question": "2+2=", "answer": "four"}], task, bytewise, "sums")
    assert list(example.ids[: example.target]) == bytewise("2+2=")["input_ids"]


def test_without_a_prompt_all_of_the_text_is_learned(bytewise: Tokenizer) -> None:
    task = CausalLM(max_length=64)
    (example,) = encoded([{"text": "once"}], task, bytewise, "stories")
    assert learned(example, task, bytewise) == "once</s>"
    assert example.weight(task) == 5


def test_a_text_that_is_cut_does_not_end(bytewise: Tokenizer) -> None:
    task = CausalLM(max_length=4)
    (example,) = encoded([{"text": "once upon"}], task, bytewise, "stories")
    assert text(bytewise, list(example.ids)) == "<s>onc"


def test_a_row_whose_prompt_fills_the_length_is_left_out(bytewise: Tokenizer) -> None:
    task = CausalLM(prompt="question", text="answer", max_length=5)
    rows = [{"question": "too long", "answer": "no"}, {"question": "hm", "answer": "yes"}]
    with capture_logs() as logs:
        (example,) = encoded(rows, task, bytewise, "sums")
    assert learned(example, task, bytewise) == "ye"
    assert [(log["event"], log["data"], log["rows"], log["kept"]) for log in logs] == [("rows-left-out", "sums", 1, 1)]
    with pytest.raises(errors.DataRefusal, match="no row of which anything can be learned"):
        encoded(rows[:1], task, bytewise, "sums")


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.text(max_size=12), st.text(min_size=1, max_size=12)), min_size=1, max_size=5))
def test_whatever_the_rows_the_learned_labels_are_the_continuations(rows: list[tuple[str, str]]) -> None:
    task = CausalLM(prompt="question", text="answer", max_length=200)
    tokenizer = _Bytes()
    examples = encoded([{"question": q, "answer": a} for q, a in rows], task, tokenizer, "any")
    batch = collate(examples, task, 0, CPU)
    for row, (_, answer) in zip(batch.labels, rows, strict=True):
        assert row[row != IGNORED].tolist() == [*answer.encode(errors="surrogatepass"), 257]
    assert batch.weight == int((batch.labels[:, 1:] != IGNORED).sum())
    padding = batch.inputs["attention_mask"] == 0
    assert bool((batch.labels[padding] == IGNORED).all())


class _Bytes:
    """The bytes of a text, after a beginning, 256; 257 ends it."""

    eos_token_id = 257

    def __call__(self, text: str, pair: str | None = None, /, **how: object) -> dict[str, list[int]]:
        start = [256] if how.get("add_special_tokens", True) else []
        return {"input_ids": [*start, *text.encode(errors="surrogatepass")]}


def test_a_tokenizer_that_ends_every_text_by_itself_ends_it_once() -> None:
    class Ending(_Bytes):
        def __call__(self, text: str, pair: str | None = None, /, **how: object) -> dict[str, list[int]]:
            return {"input_ids": [*super().__call__(text, pair, **how)["input_ids"], 257]}

    task = CausalLM(prompt="question", text="answer")
    (example,) = encoded([{"question": "a", "answer": "b"}], task, Ending(), "any")
    assert list(example.ids) == [256, ord("a"), ord("b"), 257]


def test_a_text_and_its_label_become_ids_and_a_number(pieces: Tokenizer) -> None:
    (example,) = encoded([{"text": "the red one", "label": "red"}], CLASSES, pieces, "things")
    assert text(pieces, list(example.ids)) == "[CLS] the red one [SEP]"
    assert example.target == 2
    assert example.weight(CLASSES) == 1


def test_pairs_are_told_apart(pieces: Tokenizer) -> None:
    task = SequenceClassification(labels=["0", "1"], text="a", text_pair="b")
    (example,) = encoded([{"a": "one", "b": "two three"[:3], "label": 1}], task, pieces, "pairs")
    assert text(pieces, list(example.ids)) == "[CLS] one [SEP] two [SEP]"
    assert example.segments is not None
    assert list(example.segments) == [0, 0, 0, 1, 1]


def test_long_texts_are_cut(pieces: Tokenizer) -> None:
    task = CLASSES.model_copy(update={"max_length": 6})
    (example,) = encoded([{"text": "see " * 50, "label": "red"}], task, pieces, "things")
    assert len(example.ids) == 6


@pytest.mark.parametrize(("label", "number"), [(1, 0), (1.0, 0), ("1", 0), (True, 1), ("yes", 2)])
def test_labels_are_compared_as_plans_write_them(pieces: Tokenizer, label: object, number: int) -> None:
    task = SequenceClassification(labels=["1", "true", "yes"])
    (example,) = encoded([{"text": "see", "label": label}], task, pieces, "things")
    assert example.target == number


@pytest.mark.parametrize(
    ("labels", "label", "number"),
    [
        (["0", "1"], "1.0", 1),
        (["0.0", "1.0"], 1, 1),
        (["0.0", "1.0"], "1", 1),
        (["1", "1.0"], "1", 0),
        (["1", "1.0"], "1.0", 1),
        (["1.0", "1"], "1.0", 0),
        ([False, True], True, 1),
        ([False, True], "false", 0),
    ],
)
def test_a_whole_number_is_one_label_however_it_is_written(pieces: Tokenizer, labels: list[object], label: object, number: int) -> None:
    task = SequenceClassification.model_validate({"labels": labels})
    (example,) = encoded([{"text": "see", "label": label}], task, pieces, "things")
    assert example.target == number


@pytest.mark.parametrize("label", [None, float("nan")])
def test_a_missing_label_is_no_label_of_that_name(pieces: Tokenizer, label: object) -> None:
    task = SequenceClassification(labels=["None", "nan"])
    with pytest.raises(errors.DataRefusal, match="row 2 of 'things' has no label in 'label'"):
        encoded([{"text": "see", "label": "None"}, {"text": "see", "label": label}], task, pieces, "things")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"body": "a secret", "label": "red"}, "no column 'text', only body, label"),
        ({"text": "see", "label": "a secret"}, "row 1 of 'things' has a label that is none of the plan's labels (blue, green, red)"),
        ({"text": None, "label": "red"}, "no text in 'text', but NoneType"),
        ({"text": "a secret \ud83d", "label": "red"}, "row 1 of 'things' has half of a character in 'text'"),
    ],
)
def test_rows_that_do_not_fit_the_task_are_refused_without_quoting_them(pieces: Tokenizer, row: dict[str, object], words: str) -> None:
    with pytest.raises(errors.DataRefusal) as refused:
        encoded([row], CLASSES, pieces, "things")
    assert words in refused.value.detail
    assert "secret" not in refused.value.detail


def test_no_rows_are_refused(pieces: Tokenizer) -> None:
    with pytest.raises(errors.DataRefusal, match="no row of which anything can be learned"):
        encoded([], CLASSES, pieces, "things")


def test_a_batch_is_padded_to_a_multiple_of_eight_and_the_padding_masked(pieces: Tokenizer) -> None:
    rows = [{"text": "see", "label": "red"}, {"text": "we see the small blue sun and all that", "label": "blue"}]
    batch = collate(encoded(rows, CLASSES, pieces, "things"), CLASSES, 0, CPU)
    assert batch.inputs["input_ids"].shape == batch.inputs["token_type_ids"].shape == (2, 16)
    assert batch.inputs["attention_mask"].sum(dim=1).tolist() == [3, 11]
    assert bool((batch.inputs["input_ids"][0, 3:] == 0).all())
    assert batch.labels.tolist() == [2, 0]
    assert batch.weight == 2


def test_padding_never_passes_the_tasks_length(pieces: Tokenizer) -> None:
    task = CLASSES.model_copy(update={"max_length": 5})
    batch = collate(encoded([{"text": "see the red sun", "label": "red"}], task, pieces, "things"), task, 0, CPU)
    assert batch.inputs["input_ids"].shape == (1, 5)


def test_batches_hold_every_row_once_the_longest_first(pieces: Tokenizer) -> None:
    rows = [{"text": "see " * n, "label": "red"} for n in (3, 1, 5, 2, 4)]
    found = list(batches(encoded(rows, CLASSES, pieces, "things"), 2))
    assert [[len(example.ids) - 2 for example in part] for part in found] == [[5, 4], [3, 2], [1]]
