"""Jobs that train part of what is handed out: some of its directions, or one of its sides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from agent.outbox import Outbox
from agent.policy import Policy
from agent.training import Outcome, Standing, Trainer
from protocol import checks, contents, errors
from protocol.checks import Expected
from protocol.contents import Label
from protocol.messages import Job
from protocol.plan import Dtype, Sides, Task
from protocol.slices import Factors, Slice
from protocol.states import JobKind
from tests.agent.work import NOON, SCALE, WHOLE, catalogue, handed_out, make_job, make_start
from tests.modelling.drawn import CLASSES, CONTINUE

PART = [3, 1]


def ignore(_: Standing) -> None:
    """Nobody listens."""


@pytest.fixture(params=["classify", "continue"])
def setting(request: pytest.FixtureRequest) -> tuple[Path, Task]:
    kinds: dict[str, tuple[str, Task]] = {"classify": ("encoder", CLASSES), "continue": ("decoder", CONTINUE)}
    model, task = kinds[request.param]
    return request.getfixturevalue(model), task


def do(folder: Path, job: Job, start: Slice, **policy: object) -> Outcome:
    return Trainer(catalogue(folder), Policy.model_validate(policy))(job, start, ignore)


def trained(outcome: Outcome) -> Mapping[str, Factors]:
    assert outcome.slice is not None
    return outcome.slice.factors


def same(some: Mapping[str, Factors], others: Mapping[str, Factors]) -> bool:
    return all(torch.equal(f.a, others[n].a) and torch.equal(f.b, others[n].b) for n, f in some.items())


def bare(start: Slice, silent: list[int]) -> Slice:
    """The slice whose named directions add nothing: their b is zero."""
    b = torch.ones(start.label.rank)
    b[silent] = 0.0
    return Slice(start.label, {n: Factors(b=f.b * b, a=f.a) for n, f in start.factors.items()}, start.full)


def only(start: Slice, directions: list[int]) -> Slice:
    """The slice of these directions alone."""
    label = start.label.model_copy(update={"rank": len(directions)})
    return Slice(label, {n: Factors(b=f.b[:, directions], a=f.a[directions]) for n, f in start.factors.items()}, start.full)


def test_naming_all_directions_is_naming_none(tmp_path: Path, setting: tuple[Path, Task]) -> None:
    model, task = setting
    job = make_job(model, rank=WHOLE, task=task, epochs=2)
    named = job.model_copy(update={"directions": list(range(WHOLE))})
    start = make_start(model, WHOLE, task)
    assert same(trained(do(tmp_path, job, start)), trained(do(tmp_path, named, start)))


@pytest.mark.parametrize("sides", list(Sides))
def test_frozen_directions_that_add_nothing_change_no_bit_of_the_others(tmp_path: Path, setting: tuple[Path, Task], sides: Sides) -> None:
    """Dropout included: the random numbers are drawn for what is trained alone."""
    model, task = setting
    job = make_job(model, task=task, directions=PART, sides=sides, epochs=2, clip_norm=0.1)
    job = job.model_copy(update={"adapter": job.adapter.model_copy(update={"dropout": 0.2})})
    start = handed_out(model, job)
    alone = job.model_copy(update={"directions": None})
    silent = do(tmp_path, job, bare(start, [0, 2]))
    assert same(trained(silent), trained(do(tmp_path, alone, only(start, PART))))
    assert silent.metrics != do(tmp_path, job, start).metrics


@pytest.mark.parametrize("sides", list(Sides))
@pytest.mark.parametrize("wire", [Dtype.float32, Dtype.bfloat16])
def test_the_outbox_holds_what_the_coordinator_expects(tmp_path: Path, setting: tuple[Path, Task], wire: Dtype, sides: Sides) -> None:
    model, task = setting
    job = make_job(model, task=task, wire=wire, directions=PART, sides=sides)
    start = handed_out(model, job)
    outcome = do(tmp_path, job, start)
    outbox = Outbox(tmp_path / "outbox")
    sent = outbox.file(outbox.store(job, start, outcome, outcome.usage)).read_bytes()
    header = contents.read_header(sent, len(sent))
    checks.check_header(header, Expected(job.layout, 2, SCALE, wire, job.slice.digest, job.round, tuple(PART), sides))
    assert header.label == Label(rank=2, scale=SCALE, round=3, base=job.slice.digest, examples=18)
    before = only(start, PART).factors
    assert not any(torch.equal(f.b, before[n].b) for n, f in trained(outcome).items())
    assert all(torch.equal(f.a, before[n].a) == (sides is Sides.b) for n, f in trained(outcome).items())


def test_training_part_of_a_slice_lowers_the_loss(tmp_path: Path, setting: tuple[Path, Task]) -> None:
    model, task = setting
    job = make_job(model, task=task, directions=[2], sides=Sides.b, epochs=20, learning_rate=2e-2)
    metrics = do(tmp_path, job, handed_out(model, job)).metrics
    assert metrics["loss_after"].value < metrics["loss_before"].value - 0.1


@pytest.mark.parametrize(
    ("rank", "directions"),
    [(2, [0, 4]), (2, [1, 1]), (2, [0]), (2, [0, 1, 2]), (2, []), (2, None), (5, [0, 1, 2, 3, 0])],
    ids=["beyond", "twice", "too few", "too many", "empty", "none", "twice the whole"],
)
def test_directions_that_are_not_the_slices_are_refused(tmp_path: Path, encoder: Path, rank: int, directions: list[int] | None) -> None:
    job = make_job(encoder, directions=PART).model_copy(update={"rank": rank, "directions": directions})
    with pytest.raises(errors.MismatchedSlice, match=f"has rank 4; the job trains rank {rank} of it, at"):
        do(tmp_path, job, make_start(encoder, WHOLE))


def test_the_owners_rank_is_of_what_is_trained_and_the_bytes_are_of_what_moves(encoder: Path) -> None:
    job = make_job(encoder, directions=PART)
    Policy(largest_rank=2).check(job, NOON)
    Policy(max_bytes=job.slice.bytes + job.max_upload_bytes).check(job, NOON)
    with pytest.raises(errors.PolicyRefusal) as refused:
        Policy(max_bytes=make_job(encoder, rank=2).slice.bytes + job.max_upload_bytes).check(job, NOON)
    assert refused.value.facts["line"] == "max_bytes"


def test_memory_is_counted_for_all_that_is_handed_out_and_for_training_what_is_trained(tmp_path: Path, encoder: Path) -> None:
    """Four bytes a number of the base and of the slice, twelve more of what is trained."""
    job = make_job(encoder, directions=PART, sides=Sides.b)
    needed = 4 * job.layout.base.parameters + 4 * job.layout.numbers(WHOLE) + 12 * job.layout.numbers(2, Sides.b)
    with pytest.raises(errors.MemoryRefusal, match=f"at least {needed}; {needed - 1} are offered"):
        do(tmp_path, job, handed_out(encoder, job), memory_share=1.0, memory_bytes=needed - 1)
    do(tmp_path, job, handed_out(encoder, job), memory_share=1.0, memory_bytes=needed)
    measured = make_job(encoder, rank=WHOLE, kind=JobKind.evaluate)
    enough = 4 * job.layout.base.parameters + 4 * job.layout.numbers(WHOLE)
    do(tmp_path, measured, make_start(encoder, WHOLE), memory_share=1.0, memory_bytes=enough)


def test_measured_is_all_that_was_handed_out_whatever_of_it_would_be_trained(tmp_path: Path, encoder: Path) -> None:
    part, whole, less = (make_job(encoder, kind=JobKind.evaluate, **told) for told in ({"directions": PART}, {"rank": WHOLE}, {"rank": 2}))
    starts = [(part, WHOLE), (whole, WHOLE), (less, 2)]
    seen = [do(tmp_path, job, make_start(encoder, held)).metrics["loss"].value for job, held in starts]
    assert seen[0] == pytest.approx(seen[1], rel=1e-6)
    assert seen[0] != pytest.approx(seen[2], rel=1e-6)


@pytest.mark.parametrize("change", [{"directions": [1, 3]}, {"directions": None}, {"sides": Sides.b}])
def test_what_was_trained_of_a_slice_is_not_delivered_as_another_part_of_it(
    tmp_path: Path, encoder: Path, change: dict[str, object]
) -> None:
    job = make_job(encoder, directions=PART)
    start = handed_out(encoder, job)
    outbox, outcome = Outbox(tmp_path / "outbox"), do(tmp_path, job, start)
    entry = outbox.store(job, start, outcome, outcome.usage)
    assert outbox.find(job) == entry
    assert outbox.find(job.model_copy(update=change)) is None
    assert outbox.entries() == []
