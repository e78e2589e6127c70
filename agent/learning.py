"""The steps of one job's training, and the measuring of an adapter. Knows models and batches; knows no wire and no files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from agent.encoding import IGNORED, Batch, Example, batches, collate
from modelling.adapters import Adapted
from protocol import errors
from protocol.course import Training
from protocol.messages import Metric
from protocol.plan import Task

WINDOW = 8  # steps whose rows are sorted by length among themselves, so that batches need little padding
Told = Callable[[int, int, float], None]  # step, steps, loss
State = dict[str, Any]  # tensors and plain values, which can be written down and read back without running anything


class Enough(Exception):
    """Who listens wants no further step: what was learned so far counts."""


@dataclass
class Course:
    """A training on its way: beside rows and model, all that its next step depends on."""

    trained: list[nn.Parameter]
    optimiser: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    device: torch.device
    losses: list[Metric] = field(default_factory=list)  # of every step that was taken

    @classmethod
    def begin(cls, trained: list[nn.Parameter], setting: Setting, training: Training) -> Self:
        """Before the first step. AdamW starts afresh in every job."""
        # All tensors in one call of each kernel: the same bits, and on a processor two thirds of the time.
        optimiser = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=training.weight_decay, foreach=True)
        scaler = torch.amp.GradScaler(setting.device.type, enabled=setting.half is torch.float16)
        return cls(trained, optimiser, scaler, setting.device)

    def advance(self, training: Training, factor: float) -> None:
        """Take a step along the gradients that were gathered, at that part of the learning rate."""
        for group in self.optimiser.param_groups:
            group["lr"] = training.learning_rate * factor
        self.scaler.unscale_(self.optimiser)
        if training.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.trained, training.clip_norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)

    def state(self) -> State:
        """What `restore` needs, without copying a tensor: good until the next step. With it every further bit is the same."""
        return {
            "trained": [parameter.detach() for parameter in self.trained],
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "chance": torch.get_rng_state(),
            "chance_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "losses": torch.tensor([(loss.value, loss.weight) for loss in self.losses], dtype=torch.float64),
        }

    def restore(self, state: State) -> None:
        """Go on where another course of the same training stood."""
        with torch.no_grad():
            for parameter, kept in zip(self.trained, state["trained"], strict=True):
                parameter.copy_(kept)
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["chance"])
        if state["chance_cuda"] is not None:
            torch.cuda.set_rng_state(state["chance_cuda"], self.device)
        self.losses = [Metric(value=value, weight=weight) for value, weight in state["losses"].tolist()]


class Kept(Protocol):
    """Where a course is kept for the case that this process ends before it does."""

    def resume(self, course: Course) -> None:
        """Restore the course, if one was kept that is this one's beginning."""
        ...

    def keep(self, course: Course) -> None:
        """The course has come a step further."""
        ...


@dataclass(frozen=True)
class Setting:
    """What a model is fed with, and how it computes."""

    task: Task
    pad: int
    device: torch.device
    half: torch.dtype | None  # the lower precision of the matrices, if they shall have one

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy over what is learned, in float32, and the logits that it came from."""
        with torch.autocast(self.device.type, dtype=self.half, enabled=self.half is not None):
            logits = model(**batch.inputs).logits.float()
        if self.task.kind == "sequence-classification":
            return functional.cross_entropy(logits, batch.labels, reduction="sum"), logits
        ahead, labels = logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()
        return functional.cross_entropy(ahead, labels, ignore_index=IGNORED, reduction="sum"), logits

    def batch(self, examples: Sequence[Example]) -> Batch:
        """These examples as one batch on the device."""
        return collate(examples, self.task, self.pad, self.device)


def schedule(examples: Sequence[Example], training: Training, generator: torch.Generator) -> list[list[Example]]:
    """The rows of every optimiser step: epochs · n rows in all, each epoch in a new order, in steps of like lengths."""
    size = training.batch_size * training.accumulate
    count = min(math.ceil(training.epochs * len(examples)), size * training.steps(len(examples)))
    orders = [torch.randperm(len(examples), generator=generator) for _ in range(math.ceil(count / len(examples)))]
    rows = [examples[int(n)] for n in torch.cat(orders)[:count]]
    steps: list[list[Example]] = []
    for start in range(0, count, WINDOW * size):
        window = sorted(rows[start : start + WINDOW * size], key=lambda example: len(example.ids))
        groups = [window[i : i + size] for i in range(0, len(window), size)]
        steps += [groups[int(n)] for n in torch.randperm(len(groups), generator=generator)]
    return steps


def rate(step: int, steps: int, training: Training) -> float:
    """The learning rate's factor at a step, from 0: rises linearly over the warm-up, then falls linearly towards zero."""
    rising = math.ceil(training.warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return (steps - step) / (steps - rising) if training.decay else 1.0


def learn(
    adapted: Adapted, setting: Setting, steps: Sequence[Sequence[Example]], training: Training, told: Told, kept: Kept | None = None
) -> list[Metric]:
    """Train the slice through these steps; gives each step's mean loss before it was taken, weighted by what was learned.

    The gradient is that of the mean over the whole step, however it is divided into passes. `told` hears of every step; it
    ends the training with Enough, to which at least one step is due, and breaks it off by raising anything else. A training
    that is resumed ends with the same bits as one that was never interrupted. Raises NonFiniteSlice if the loss is no number.
    """
    course = Course.begin(adapted.trained(), setting, training)
    if kept is not None:
        kept.resume(course)
    adapted.model.train()
    for n in range(len(course.losses), len(steps)):
        loss, weight = _gather(course, adapted, setting, steps[n], training.batch_size)
        if not math.isfinite(loss):
            raise errors.NonFiniteSlice(f"the training loss is {loss} at step {n + 1} of {len(steps)}; a lower learning rate may help")
        course.advance(training, rate(n, len(steps), training))
        course.losses.append(Metric(value=loss, weight=weight))
        if kept is not None:
            kept.keep(course)
        try:
            told(n + 1, len(steps), loss)
        except Enough:
            break
    return course.losses


def _gather(course: Course, adapted: Adapted, setting: Setting, rows: Sequence[Example], size: int) -> tuple[float, int]:
    """Gather the gradient of the rows' mean loss, in passes of so many rows; gives that loss, and what it weighs."""
    weight = sum(example.weight(setting.task) for example in rows)
    total = 0.0
    for part in batches(rows, size):
        loss, _ = setting.loss(adapted.model, setting.batch(part))
        torch.autograd.backward(course.scaler.scale(loss / weight))
        total += loss.item()
    return total / weight, weight


def mean(losses: Sequence[Metric]) -> Metric:
    """The weighted mean of some losses."""
    weight = sum(loss.weight for loss in losses)
    return Metric(value=sum(loss.value * loss.weight for loss in losses) / weight, weight=weight)


@dataclass(frozen=True)
class Seen:
    """What became of some rows: each batch's mean loss, and for classifiers what was right and what was guessed."""

    losses: list[Metric]
    answers: Tensor  # (2, rows): truth and guess; (2, 0) for language models

    def __add__(self, other: Seen) -> Seen:
        return Seen(self.losses + other.losses, torch.cat([self.answers, other.answers], dim=1))

    def metrics(self, task: Task) -> dict[str, Metric]:
        """Classification: loss and accuracy, weighted by rows, and f1. Language models: loss per learned token and its
        exponential, the perplexity, weighted by tokens."""
        loss = mean(self.losses)
        if task.kind != "sequence-classification":
            return {"loss": loss, "perplexity": Metric(value=math.exp(min(loss.value, 700.0)), weight=loss.weight)}
        truth, guess = self.answers
        return {
            "loss": loss,
            "accuracy": Metric(value=float((truth == guess).double().mean()), weight=len(truth)),
            "f1": Metric(value=f1(truth, guess, len(task.labels)), weight=len(truth)),
        }


@torch.no_grad()
def measure(adapted: Adapted, setting: Setting, examples: Sequence[Example], size: int, told: Told) -> Seen:
    """What the slice makes of these rows, in batches of that size. Raises NonFiniteSlice if a loss is no number."""
    adapted.model.eval()
    losses, answers = [], [torch.empty(2, 0, dtype=torch.long)]
    parts = list(batches(examples, size))
    for n, part in enumerate(parts, start=1):
        batch = setting.batch(part)
        loss, logits = setting.loss(adapted.model, batch)
        if not math.isfinite(loss.item()):
            raise errors.NonFiniteSlice(f"the loss of the adapter that was handed out is {loss.item()} on held-out rows")
        losses.append(Metric(value=loss.item() / batch.weight, weight=batch.weight))
        if setting.task.kind == "sequence-classification":
            answers.append(torch.stack([batch.labels, logits.argmax(-1)]).cpu())
        told(n, len(parts), losses[-1].value)
    return Seen(losses, torch.cat(answers, dim=1))


def f1(truth: Tensor, guess: Tensor, classes: int) -> float:
    """With two classes the F1 of the second; with more the mean over the classes that occur in truth or guess.

    F1 = 2 tp / (2 tp + fp + fn); 0 where the second class neither occurs nor is guessed.
    """
    scores = []
    for label in [1] if classes == 2 else range(classes):
        hits = int(((truth == label) & (guess == label)).sum())
        said = int((truth == label).sum()) + int((guess == label).sum())
        if said or classes == 2:
            scores.append(2 * hits / said if said else 0.0)
    return sum(scores) / len(scores)
