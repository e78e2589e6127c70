"""One job's work on this device: from the slice that was handed out to the trained slice, or to its measures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from time import perf_counter
from typing import NamedTuple

import structlog
import torch

from agent import learning, machine
from agent.checkpoints import Checkpoints
from agent.data import Catalogue, Part
from agent.encoding import Example
from agent.learning import Setting
from agent.policy import Policy
from agent.prepared import Prepared
from modelling import adapters, base
from modelling.adapters import Adapted
from protocol import errors, slices
from protocol.contents import Label
from protocol.messages import Job, Metric, Usage
from protocol.plan import Dtype
from protocol.slices import Slice
from protocol.states import JobKind

log = structlog.get_logger("agent")
NARROW = 256  # width up to which a processor is as quick in float32; measured with blocks of width 64, 256 and 384


class Standing(NamedTuple):
    """How far a job is."""

    phase: str  # download, load, train, evaluate, upload
    step: int = 0
    steps: int = 0
    loss: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What a job came to."""

    examples: int  # rows trained on or measured
    metrics: dict[str, Metric]
    usage: Usage
    slice: Slice | None = None  # the trained slice; none for an evaluation


Tell = Callable[[Standing], None]  # hears of every step; breaks the work off by raising, or ends a training with Enough
Train = Callable[[Job, Slice, Tell], Outcome]


@dataclass
class Clocked:
    """Times the steps of a job on their way to the listener, and watches the memory."""

    tell: Tell
    clock: Callable[[], float]
    device: str
    phase: str = ""
    began: float = 0.0
    marks: list[float] = field(default_factory=list)
    peak: int = 0

    def start(self, phase: str) -> None:
        """The steps of this phase begin now."""
        self.phase, self.began = phase, self.clock()

    def __call__(self, step: int, steps: int, loss: float) -> None:
        self.marks.append(self.clock())
        self.peak = max(self.peak, machine.used_bytes(self.device))
        self.tell(Standing(self.phase, step, steps, loss))

    def usage(self) -> Usage:
        """What the steps cost."""
        spans = [late - early for early, late in zip([self.began, *self.marks], self.marks, strict=False)]
        return Usage(
            seconds=max(0.0, sum(spans)),
            steps=len(spans),
            step_seconds=statistics.median(spans or [0.0]) or None,
            peak_memory_bytes=self.peak,
        )


@dataclass(frozen=True)
class Trainer:
    """The real `Train`: transformers and peft on the device's own rows, repeatable from the job's seed."""

    catalogue: Catalogue
    policy: Policy = field(default_factory=Policy)
    clock: Callable[[], float] = perf_counter
    checkpoints: Checkpoints | None = None

    @cached_property
    def prepared(self) -> Prepared:
        """The device's rows, as models read them."""
        return Prepared(self.catalogue)

    def __call__(self, job: Job, start: Slice, tell: Tell) -> Outcome:
        """Do a job. Raises DataRefusal, ModelRefusal, MemoryRefusal, PolicyRefusal, MismatchedSlice, NonFiniteSlice."""
        place = machine.device(self.policy.device)
        _check_start(job, start)
        self._check_memory(job, start, place)
        tell(Standing("load"))
        with _memory_translated(job):
            half = precision(job, place)
            found = base.load(job.model, job.task, device=place, dtype=None if half else torch.float32)
            part = Part.train if job.kind is JobKind.train else Part.held_out
            examples = self.prepared.examples(job, part, found.tokenizer)
            setting = Setting(job.task, found.tokenizer.pad_token_id, found.device, half)
            clocked = Clocked(tell, self.clock, place)
            machine.forget_peak(place)
            devices = [found.device] if found.device.type == "cuda" else []
            lent = adapters.adapted(found, start, job.layout, job.adapter.dropout, job.directions, job.sides, job.adapter.head)
            with lent as adapted, torch.random.fork_rng(devices):
                torch.manual_seed(job.seed)
                work = self._train if job.kind is JobKind.train else self._evaluate
                return work(job, adapted, setting, examples, clocked)

    def _check_memory(self, job: Job, start: Slice, place: str) -> None:
        """Raises MemoryRefusal where not even the numbers fit: the model's, the slice's, and gradient and AdamW of what is trained."""
        offered = self.policy.offered(machine.memory_bytes(place))
        weights = (4 if job.training.precision == "float32" else 2) * job.layout.base.parameters
        learned = job.trained.numbers(job.rank, job.sides) if job.kind is JobKind.train else 0
        if (needed := weights + 4 * (job.layout.numbers(start.label.rank) + 3 * learned)) > offered:
            raise errors.MemoryRefusal(
                f"{job.model.id} takes {weights} bytes, with rank {start.label.rank} and what training needs at least {needed}; "
                f"{offered} are offered (memory_share, memory_bytes in policy.toml)",
                needed=needed,
                offered=offered,
            )

    def _train(self, job: Job, adapted: Adapted, setting: Setting, examples: list[Example], clocked: Clocked) -> Outcome:
        steps = learning.schedule(examples, job.training, torch.Generator().manual_seed(job.seed))
        self.policy.check_steps(len(steps))
        checkpoint = self.checkpoints.of(job, setting, examples) if self.checkpoints else None
        clocked.tell(Standing("train", 0, len(steps)))
        clocked.start("train")
        losses = learning.learn(adapted, setting, steps, job.training, clocked, checkpoint)
        if len(losses) < len(steps):
            log.warning("training-cut-short", steps=len(losses), planned=len(steps), why="no time for more before the job's deadline")
        tenth = max(1, len(losses) // 10)
        count = min(len(examples), sum(len(rows) for rows in steps[: len(losses)]))
        label = Label(rank=job.rank, scale=job.scale, round=job.round, base=job.slice.digest, examples=count)
        usage = clocked.usage()
        return Outcome(
            examples=count,
            metrics={"loss_before": learning.mean(losses[:tenth]), "loss_after": learning.mean(losses[-tenth:])},
            usage=checkpoint.added(usage) if checkpoint else usage,
            slice=Slice(label, adapted.factors(), adapted.full()),
        )

    def _evaluate(self, job: Job, adapted: Adapted, setting: Setting, examples: list[Example], clocked: Clocked) -> Outcome:
        # In the precision of the weights themselves, so that PEFT gives the same logits for the same slice.
        weights = adapted.model.dtype
        plain = replace(setting, half=None if weights is torch.float32 else weights)
        clocked.start("evaluate")
        seen = learning.measure(adapted, plain, examples, job.training.batch_size, clocked)
        return Outcome(examples=len(examples), metrics=seen.metrics(job.task), usage=clocked.usage())


def precision(job: Job, place: str) -> torch.dtype | None:
    """The lower precision in which the matrices are multiplied; none for float32 throughout."""
    if job.training.precision != "auto":
        chosen = Dtype(job.training.precision)
    else:
        # On a processor the conversions cost a narrow model more than its multiplications save.
        narrow = place == "cpu" and job.layout.base.hidden <= NARROW
        chosen = Dtype.float32 if narrow else machine.precisions(place)[-1]
    return None if chosen is Dtype.float32 else slices.TORCH_DTYPES[chosen]


def _check_start(job: Job, start: Slice) -> None:
    """Raises MismatchedSlice unless the slice handed out is the job's, and holds what the job trains."""
    held = start.label.rank
    trained = range(held) if job.directions is None else job.directions
    if len(trained) != job.rank or len(set(trained)) != job.rank or any(position >= held for position in trained):
        raise errors.MismatchedSlice(
            f"the slice that was handed out has rank {held}; the job trains rank {job.rank} of it, at {job.directions or 'all positions'}",
            slice=job.slice.digest,
        )
    for what, came, wanted in (
        ("scale", start.label.scale, job.scale),
        ("modules", start.factors.keys(), job.layout.modules.keys()),
        ("full tensors", start.full.keys(), job.layout.full.keys()),
    ):
        if came != wanted:
            raise errors.MismatchedSlice(f"the {what} of the slice that was handed out are not the job's", slice=job.slice.digest)


@contextmanager
def _memory_translated(job: Job) -> Iterator[None]:
    """Memory that ran out becomes a MemoryRefusal."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise
        torch.cuda.empty_cache()  # does nothing where there is no CUDA
        raise errors.MemoryRefusal(
            f"rank {job.rank} with {job.training.batch_size} rows of up to {job.task.max_length} tokens does not fit this device's "
            "memory: offer less in policy.toml (memory_bytes), or plan smaller batches with more accumulation",
            rank=job.rank,
        ) from error
