"""Single modules in memory, one thread: the exact and the quick method beside the dense form, in processor seconds."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import BaseModel

from benchmarks.crowd import Size, gather
from benchmarks.dense import Dense, Shape, Terms, truth
from benchmarks.machine import Machine, this_machine
from coordinator import truncation
from coordinator.blobs import Blobs
from coordinator.lowrank import written
from coordinator.merge import RoundTask
from coordinator.reading import open_slice
from coordinator.stacks import stacked
from coordinator.sums import Sum, Term


class Accuracy(BaseModel):
    """Of one module, in float64."""

    relative_excess: float  # (error − least error) / ‖W‖
    error_ratio: float  # error / least error
    certificate_error: float  # of what was said to be lost, relative to what was lost

    def __str__(self) -> str:
        return (
            f"error {self.error_ratio - 1:.1e} above the least ({self.relative_excess:.1e} of the sum), "
            f"certificate true to {self.certificate_error:.1e}"
        )


class Method(Accuracy):
    """One module in memory, by one method, one thread."""

    method: str
    n_out: int
    n_in: int
    clients: int
    stacked_rank: int
    rank: int
    seconds: float
    dense_seconds: float
    ratio: float
    machine: Machine

    def report(self) -> str:
        """For a person."""
        return (
            f"one module {self.n_out} × {self.n_in}, {self.clients} clients, one thread, {self.method}: {1000 * self.seconds:.0f} ms, "
            f"dense form {self.dense_seconds:.2f} s ({self.ratio:.0f} times), {self}"
        )


@contextmanager
def gathered(size: Size, folder: Path | None) -> Iterator[tuple[RoundTask, Blobs]]:
    """A round of that size, in files while the block lasts."""
    with tempfile.TemporaryDirectory(prefix="hlora-bench-", dir=folder) as inside:
        blobs = Blobs.open(f"file://{inside}/blobs")
        yield gather(size, blobs), blobs


def terms_of(task: RoundTask, blobs: Blobs, module: str) -> Terms:
    """One module's weights and factors."""
    total = sum(input.weight for input in task.inputs)
    return [(input.weight / total * input.scale, open_slice(blobs, input.digest).factors(module)) for input in task.inputs]


def methods(size: Size, dense: Dense, repeats: int = 5, folder: Path | None = None) -> list[Method]:
    """The first module of that size in memory, one thread: the exact and the quick method beside the dense form."""
    torch.set_num_threads(1)
    one = replace(size, shapes=size.shapes[:1])
    with gathered(one, folder) as (task, blobs):
        terms, shape, rank = terms_of(task, blobs, "module.000"), one.shapes[0], task.plan.global_rank
        dense_seconds = dense.seconds(terms, shape)
    w = Sum(shape, [Term(factors, weight) for weight, factors in terms])
    ways: dict[str, Callable[[], truncation.Singular | None]] = {
        "exact": lambda: truncation.exact(stacked(w), rank),
        "quick": lambda: truncation.quick(stacked(w), rank),
    }
    common = {"n_out": shape[0], "n_in": shape[1], "clients": one.clients, "stacked_rank": w.rank, "rank": rank}
    return [_method(name, way, terms, shape, dense_seconds, repeats, common) for name, way in ways.items()]


def _method(
    name: str,
    way: Callable[[], truncation.Singular | None],
    terms: Terms,
    shape: Shape,
    dense_seconds: float,
    repeats: int,
    common: dict[str, int],
) -> Method:
    times = []
    for _ in range(repeats):
        began = time.process_time()
        found = way()
        times.append(time.process_time() - began)
    assert found is not None, f"the certificate asks for less than {truncation.HAIR:.0%}, which this crowd allows"
    result = written(found, common["stacked_rank"])
    real = truth(terms, shape, result.padded(common["rank"]))
    said = (1 - result.kept(common["rank"])) * result.total
    return Method(
        method=name,
        seconds=min(times),
        dense_seconds=dense_seconds,
        ratio=dense_seconds / min(times),
        relative_excess=real.relative_excess,
        error_ratio=real.error_ratio,
        certificate_error=abs(said / real.lost - 1),
        machine=this_machine(),
        **common,
    )
