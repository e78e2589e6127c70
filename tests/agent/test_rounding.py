"""What an agent says of the rounding of its slices is true."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from agent.outbox import Outbox
from agent.rounding import share
from agent.training import Outcome
from protocol.compact import arrived
from protocol.messages import Job, Metric, Usage
from protocol.plan import Dtype, Float, Sides
from protocol.slices import Factors, Slice
from tests.agent.work import make_job, make_start
from tests.federation import moved

ROUNDED = [Dtype.bfloat16, Dtype.float16, Dtype.int8]


def job_of(model: Path, uploads: Dtype, wire: Float = Dtype.float32, sides: Sides = Sides.both) -> Job:
    return make_job(model, rank=2, wire=wire).model_copy(update={"uploads": uploads, "directions": [3, 1], "sides": sides})


def dense(factors: Factors, scale: float) -> Tensor:
    return scale * (factors.b.double() @ factors.a.double())


@pytest.mark.parametrize("sides", Sides)
@pytest.mark.parametrize("size", [1e-6, 0.1, 1e3])
@pytest.mark.parametrize("dtype", ROUNDED)
def test_the_share_is_that_of_the_dense_products(encoder: Path, dtype: Dtype, size: float, sides: Sides) -> None:
    job, start = job_of(encoder, dtype, sides=sides), make_start(encoder, rank=4)
    new = moved(start, job, size=size)
    if sides is Sides.b:
        new = Slice(new.label, {m: Factors(b=f.b, a=start.factors[m].of(job.directions).a) for m, f in new.factors.items()}, new.full)
    error = change = 0.0
    for module, factors in new.factors.items():
        old = start.factors[module].of(job.directions)
        a = arrived(f"factors/{module}/a", factors.a, old.a, dtype) if sides is Sides.both else old.a
        read = Factors(b=arrived(f"factors/{module}/b", factors.b, old.b, dtype), a=a)
        error += float((dense(read, job.scale) - dense(factors, job.scale)).norm() ** 2)
        change += float((dense(factors, job.scale) - dense(old, job.scale)).norm() ** 2)
    assert share(new, start, job) == pytest.approx((error / change) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("dtype", ROUNDED)
def test_the_share_goes_with_the_result(encoder: Path, tmp_path: Path, dtype: Dtype) -> None:
    job, start = job_of(encoder, dtype), make_start(encoder, rank=4)
    outcome = Outcome(examples=7, metrics={}, usage=Usage(), slice=moved(start, job))
    metrics = Outbox(tmp_path).store(job, start, outcome, Usage()).result.metrics
    assert outcome.slice is not None
    assert metrics == {"rounding": Metric(value=share(outcome.slice, start, job) or 0.0, weight=7)}
    assert 1e-5 < metrics["rounding"].value < 0.05


def test_nothing_is_said_where_nothing_is_rounded_changed_or_a_number(encoder: Path) -> None:
    start = make_start(encoder, rank=4)
    job = job_of(encoder, Dtype.float32)
    assert share(moved(start, job), start, job) is None
    job = job_of(encoder, Dtype.int8)
    assert share(moved(start, job, size=0), start, job) is None
    assert share(moved(start, job, size=float("nan")), start, job) is None


def test_a_finer_format_rounds_less(encoder: Path) -> None:
    torch.manual_seed(0)
    start = make_start(encoder, rank=4)
    shares = [share(moved(start, job, size=0.01), start, job) for job in (job_of(encoder, dtype) for dtype in ROUNDED)]
    bfloat16, float16, int8 = (found or 0.0 for found in shares)
    assert float16 < int8 < bfloat16  # a small change of large numbers: int8 sends the change
