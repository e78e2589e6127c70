"""A training that is taken up again: its slice has the bytes of the one that nothing interrupted."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from agent import machine
from agent.checkpoints import Checkpoints
from agent.policy import Policy
from agent.training import Outcome, Standing, Tell, Trainer
from protocol import errors, slices
from protocol.messages import Job
from protocol.plan import Sides, Task
from tests.agent.work import ROWS, catalogue, handed_out, make_job, make_start
from tests.modelling.drawn import CLASSES, CONTINUE


def ignore(_: Standing) -> None:
    """Nobody listens."""


def until(last: int) -> Tell:
    """A listener that ends everything after so many steps."""

    def tell(standing: Standing) -> None:
        if standing.phase == "train" and standing.step == last:
            raise errors.JobOver("the process ends here")

    return tell


def counting(told: list[int]) -> Tell:
    def tell(standing: Standing) -> None:
        told.append(standing.step)

    return tell


class Bench:
    """A device that keeps a checkpoint after every step, or after so many seconds of its own clock: a second a look."""

    def __init__(self, folder: Path, model: Path, every: float = 1e-9) -> None:
        ticks = iter(range(10**6))
        self.folder, self.model = folder, model
        self.checkpoints = Checkpoints(folder / "work", every, clock=lambda: float(next(ticks)))

    def do(self, job: Job, tell: Tell = ignore, **policy: object) -> Outcome:
        trainer = Trainer(catalogue(self.folder), Policy.model_validate(policy), checkpoints=self.checkpoints)
        return trainer(job, handed_out(self.model, job), tell)

    def broken_off(self, job: Job, step: int) -> None:
        with pytest.raises(errors.JobOver):
            self.do(job, until(step))

    def file(self, job: Job) -> Path:
        return self.folder / "work" / job.id / "checkpoint"


def packed(outcome: Outcome, job: Job) -> bytes:
    """The trained slice as it travels."""
    assert outcome.slice is not None
    return slices.pack(outcome.slice, job.layout, job.wire)


def undisturbed(folder: Path, job: Job, model: Path) -> Outcome:
    """What comes of a job that nobody interrupts, on a device that keeps nothing."""
    return Trainer(catalogue(folder))(job, handed_out(model, job), ignore)


@pytest.fixture(params=["classify", "continue"])
def setting(request: pytest.FixtureRequest) -> tuple[Path, Task]:
    kinds: dict[str, tuple[str, Task]] = {"classify": ("encoder", CLASSES), "continue": ("decoder", CONTINUE)}
    model, task = kinds[request.param]
    return request.getfixturevalue(model), task


@pytest.mark.parametrize(
    ("precision", "part"),
    [
        ("float32", {}),
        ("bfloat16", {}),
        ("float16", {}),
        ("float32", {"directions": [3, 1]}),
        ("float16", {"directions": [0, 2], "sides": Sides.b}),
    ],
    ids=str,
)
def test_a_resumed_training_ends_with_the_same_bytes(
    tmp_path: Path, setting: tuple[Path, Task], precision: str, part: dict[str, Any]
) -> None:
    """The model has dropout, the plan too; the rate warms up and decays; the interruptions fall into different epochs."""
    model, task = setting
    job = make_job(model, task=task, epochs=3, warmup=0.3, weight_decay=0.1, accumulate=2, precision=precision, **part)
    job = job.model_copy(update={"adapter": job.adapter.model_copy(update={"dropout": 0.2})})
    whole = undisturbed(tmp_path, job, model)
    bench, told = Bench(tmp_path, model), list[int]()
    for step in (1, 2, 5):
        bench.broken_off(job, step)
    resumed = bench.do(job, counting(told))
    assert packed(resumed, job) == packed(whole, job)
    assert resumed.metrics == whole.metrics
    assert (resumed.examples, resumed.usage.steps) == (whole.examples, whole.usage.steps)
    assert told[2] == 6  # after loading and beginning: nothing was done twice


def test_whatever_was_drawn_meanwhile_does_not_matter(tmp_path: Path, encoder: Path) -> None:
    job = make_job(encoder, epochs=2)
    bench = Bench(tmp_path, encoder)
    bench.broken_off(job, 3)
    torch.manual_seed(99)
    torch.rand(7)
    assert packed(bench.do(job), job) == packed(undisturbed(tmp_path, job, encoder), job)


def test_a_training_whose_last_step_was_kept_only_has_to_be_handed_in(tmp_path: Path, encoder: Path) -> None:
    job, told = make_job(encoder), list[int]()
    bench = Bench(tmp_path, encoder)
    bench.broken_off(job, 5)
    resumed = bench.do(job, counting(told))
    assert packed(resumed, job) == packed(undisturbed(tmp_path, job, encoder), job)
    assert (told, resumed.usage.steps) == ([0, 0], 5)


def test_a_checkpoint_fits_the_job_under_whatever_lease(tmp_path: Path, encoder: Path) -> None:
    job, told = make_job(encoder), list[int]()
    bench = Bench(tmp_path, encoder)
    bench.broken_off(job, 2)
    again = job.model_copy(update={"lease": job.lease.model_copy(update={"epoch": 7}), "remaining_seconds": 5.0, "rank_reason": "other"})
    bench.do(again, counting(told))
    assert told[2] == 3


CHANGES: dict[str, Callable[[Job], Job]] = {
    "seed": lambda job: job.model_copy(update={"seed": job.seed + 1}),
    "slice": lambda job: job.model_copy(update={"slice": job.slice.model_copy(update={"digest": f"sha256:{1:064}"})}),
    "training": lambda job: job.model_copy(update={"training": job.training.model_copy(update={"learning_rate": 1e-3})}),
    "precision": lambda job: job.model_copy(update={"training": job.training.model_copy(update={"precision": "bfloat16"})}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_that_is_of_something_else_is_removed_and_the_training_begins_anew(tmp_path: Path, encoder: Path, change: str) -> None:
    job, told = make_job(encoder), list[int]()
    bench = Bench(tmp_path, encoder)
    bench.broken_off(job, 2)
    other = CHANGES[change](job)
    outcome = bench.do(other, counting(told))
    assert told[2] == 1
    assert packed(outcome, other) == packed(undisturbed(tmp_path, other, encoder), other)


def test_rows_that_changed_meanwhile_are_trained_on_from_the_beginning(tmp_path: Path, encoder: Path) -> None:
    job, told = make_job(encoder), list[int]()
    bench = Bench(tmp_path, encoder)
    bench.broken_off(job, 2)
    trainer = Trainer(catalogue(tmp_path, [*ROWS[1:], {"text": "the new one", "label": "red"}]), checkpoints=bench.checkpoints)
    trainer(job, make_start(encoder), counting(told))
    assert told[2] == 1


@pytest.mark.parametrize("damage", ["empty", "cut", "turned", "strange"])
def test_a_damaged_checkpoint_is_removed_and_the_training_begins_anew(tmp_path: Path, encoder: Path, damage: str) -> None:
    job, told = make_job(encoder), list[int]()
    bench = Bench(tmp_path, encoder)
    bench.broken_off(job, 2)
    data = bytearray(bench.file(job).read_bytes())
    place = data.index(b"trained") if damage == "strange" else len(data) // 2
    data[place] ^= 1
    bench.file(job).write_bytes({"empty": b"", "cut": bytes(data[: len(data) // 2])}.get(damage, bytes(data)))
    outcome = bench.do(job, counting(told))
    assert told[2] == 1
    assert packed(outcome, job) == packed(undisturbed(tmp_path, job, encoder), job)


def test_a_checkpoint_cannot_run_anything(tmp_path: Path, encoder: Path) -> None:
    job, told = make_job(encoder), list[int]()
    bench = Bench(tmp_path, encoder)
    bench.file(job).parent.mkdir(parents=True)
    torch.save({"key": Path("/nowhere")}, bench.file(job))  # an object, where only tensors and plain values may be
    bench.do(job, counting(told))
    assert told[2] == 1


def test_checkpoints_are_kept_as_often_as_asked_for_and_for_their_owner_alone(tmp_path: Path, encoder: Path) -> None:
    job = make_job(encoder, epochs=2)
    written: list[int] = []
    bench = Bench(tmp_path, encoder, every=3.0)  # of a clock that goes on by one with every look: two or three per step

    def tell(standing: Standing) -> None:
        if bench.file(job).exists():
            written.append(bench.file(job).stat().st_ino)

    bench.do(job, tell)
    assert 1 < len(set(written)) < 9
    assert bench.file(job).stat().st_mode & 0o777 == 0o600
    assert list(bench.file(job).parent.iterdir()) == [bench.file(job)]


def test_no_checkpoints_are_kept_where_none_are_wanted(tmp_path: Path, encoder: Path) -> None:
    Bench(tmp_path, encoder, every=0.0).do(make_job(encoder))
    assert not (tmp_path / "work").exists()


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file of this process can become larger: a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_training_goes_on_without_checkpoints_when_the_disk_is_full(
    tmp_path: Path, encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(encoder)
    trainer = Trainer(catalogue(tmp_path), checkpoints=Bench(tmp_path, encoder).checkpoints)
    with files_up_to(5000):
        outcome = trainer(job, make_start(encoder), ignore)
    assert "checkpoint-not-kept" in capsys.readouterr().out
    assert packed(outcome, job) == packed(undisturbed(tmp_path, job, encoder), job)
    assert list((tmp_path / "work" / job.id).iterdir()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_resumed_training_ends_with_the_same_bytes_on_a_gpu(tmp_path: Path, encoder: Path) -> None:
    assert machine.device("auto") == "cuda"
    job = make_job(encoder, epochs=2)
    bench = Bench(tmp_path, encoder)
    whole = undisturbed(tmp_path, job, encoder)
    bench.broken_off(job, 3)
    assert packed(bench.do(job), job) == packed(whole, job)
