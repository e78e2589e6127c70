"""The steps of training, and measures."""

from __future__ import annotations

import math
from array import array
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.encoding import Example
from agent.learning import f1, mean, rate, schedule
from protocol.course import Training
from protocol.messages import Metric


def examples(lengths: list[int]) -> list[Example]:
    return [Example(array("i", [0] * length), None, n) for n, length in enumerate(lengths)]


def planned(found: list[Example], training: Training, seed: int = 0) -> list[list[int]]:
    """The schedule, as numbers of rows."""
    return [[example.target for example in step] for step in schedule(found, training, torch.Generator().manual_seed(seed))]


lengths = st.lists(st.integers(1, 50), min_size=1, max_size=40)
trainings = st.builds(
    Training,
    learning_rate=st.just(1.0),
    epochs=st.floats(0.1, 4.0),
    batch_size=st.integers(1, 8),
    accumulate=st.integers(1, 3),
    max_steps=st.none() | st.integers(1, 20),
)


@settings(deadline=None)
@given(lengths, trainings)
def test_there_are_as_many_steps_as_the_plan_says_and_only_the_shortest_may_be_short(sizes: list[int], training: Training) -> None:
    steps = planned(examples(sizes), training)
    size = training.batch_size * training.accumulate
    assert len(steps) == training.steps(len(sizes))
    assert sorted(len(step) for step in steps)[1:] == [size] * (len(steps) - 1)
    assert sum(map(len, steps)) == min(math.ceil(training.epochs * len(sizes)), size * len(steps))


@settings(deadline=None)
@given(lengths, trainings)
def test_no_row_comes_twice_more_often_than_another(sizes: list[int], training: Training) -> None:
    seen = Counter(n for step in planned(examples(sizes), training) for n in step)
    counts = [seen[n] for n in range(len(sizes))]
    assert max(counts) - min(counts) <= 1


@settings(deadline=None)
@given(lengths, trainings, st.integers(0, 2**62))
def test_the_same_seed_gives_the_same_steps(sizes: list[int], training: Training, seed: int) -> None:
    assert planned(examples(sizes), training, seed) == planned(examples(sizes), training, seed)


def test_another_seed_gives_another_order() -> None:
    training = Training(learning_rate=1.0, batch_size=4)
    assert planned(examples([5] * 40), training, 0) != planned(examples([5] * 40), training, 1)


def test_rows_of_a_step_are_of_like_lengths() -> None:
    found = examples([n % 10 + 1 for n in range(64)])
    steps = schedule(found, Training(learning_rate=1.0, batch_size=8), torch.Generator().manual_seed(0))
    spread = [max(len(e.ids) for e in step) - min(len(e.ids) for e in step) for step in steps]
    assert max(spread) <= 2  # 64 rows of ten lengths in eight steps


def test_the_learning_rate_rises_and_then_falls() -> None:
    training = Training(learning_rate=1.0, warmup=0.4)
    assert [rate(n, 5, training) for n in range(5)] == [1 / 2, 1.0, 1.0, 2 / 3, 1 / 3]
    assert [rate(n, 5, training.model_copy(update={"decay": False})) for n in range(5)] == [1 / 2, 1.0, 1.0, 1.0, 1.0]
    assert rate(0, 1, Training(learning_rate=1.0)) == 1.0


@given(st.integers(1, 200), st.floats(0, 0.99), st.booleans())
def test_no_step_stands_still_and_none_exceeds_the_plans_rate(steps: int, warmup: float, decay: bool) -> None:
    training = Training(learning_rate=1.0, warmup=warmup, decay=decay)
    assert all(0 < rate(n, steps, training) <= 1 for n in range(steps))


def test_losses_are_averaged_by_what_was_learned() -> None:
    assert mean([Metric(value=1.0, weight=1), Metric(value=4.0, weight=2)]) == Metric(value=3.0, weight=3)


@pytest.mark.parametrize(
    ("truth", "guess", "classes", "score"),
    [
        ([1, 1, 0, 0], [1, 0, 1, 0], 2, 0.5),  # tp 1, fp 1, fn 1
        ([0, 0], [0, 0], 2, 0.0),  # the second class neither occurs nor is guessed
        ([1, 1], [1, 1], 2, 1.0),
        ([0, 1, 2], [0, 1, 1], 3, (1 + 2 / 3 + 0) / 3),
        ([0, 1], [0, 1], 3, 1.0),  # the third class plays no part
    ],
)
def test_f1_is_that_of_the_second_class_or_the_mean_over_classes_that_occur(
    truth: list[int], guess: list[int], classes: int, score: float
) -> None:
    assert f1(torch.tensor(truth), torch.tensor(guess), classes) == pytest.approx(score)
