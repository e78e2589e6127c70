"""A round merged from files, beside the dense form that published code runs: form Σ p s b a of every module, then decompose it.

Both start from the same contributions, with the same number of threads. Of the dense form one module of each shape is
measured; what it would cost to read the files is left out, and its modules are taken to share the threads perfectly, both in
its favour.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import torch
import typer
from pydantic import BaseModel
from torch import Tensor

from benchmarks.crowd import Size, gather
from benchmarks.machine import Machine, Rates, peak_bytes, reset_peak, resident_bytes, this_machine
from coordinator import truncation
from coordinator.blobs import Blobs
from coordinator.executors import open_executor
from coordinator.merge import Merged, RoundTask, merge_round
from coordinator.reading import open_slice
from coordinator.stacks import stacked
from coordinator.sums import Sum, Term
from protocol.plan import Dtype
from protocol.slices import Factors
from protocol.views import Energy

Seconds = dict[tuple[int, int], float]  # of one decomposition, by shape


class Merge(BaseModel):
    """What merging one round cost."""

    size: str
    clients: int
    wire: Dtype
    modules: int  # that were merged; the model has `copies` times as many
    copies: float
    extrapolated: bool  # seconds and dense_seconds are of the model, from fewer modules
    stacked_rank: int
    rank: int
    seconds: float
    dense_seconds: float
    ratio: float
    peak_megabytes: float | None  # above what was in memory before the merge; none where the system does not say
    relative_excess: float  # of one module: (error − least error) / ‖W‖, in float64
    error_ratio: float  # error / least error
    certificate_error: float  # of what was said to be lost, relative to what was lost
    limit_share: float  # the least time that this machine could take / seconds
    machine: Machine


class Method(BaseModel):
    """One module in memory, by one method."""

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


ROBERTA = ((1024, 1024),)
LLAMA_BLOCK = ((4096, 4096),) * 4 + ((11008, 4096),) * 2 + ((4096, 11008),)


def _roberta(clients: int, modules: int, wire: Dtype) -> Size:
    return Size("RoBERTa-large, 48 modules 1024²", ROBERTA * modules, clients, wire, 48 / modules)


def _llama(clients: int, wire: Dtype) -> Size:
    return Size("Llama-2-7B, 224 modules, from one block", LLAMA_BLOCK, clients, wire, 32)


BOTH = (Dtype.float32, Dtype.bfloat16)
SIZES = (
    *(_roberta(clients, modules, wire) for clients, modules in ((10, 48), (20, 48), (100, 8), (1000, 2)) for wire in BOTH),
    *(_llama(20, wire) for wire in BOTH),
    _llama(100, Dtype.bfloat16),
)
QUICK = (_roberta(20, 24, Dtype.float32), _roberta(20, 24, Dtype.bfloat16), _roberta(100, 4, Dtype.float32))


def measure(size: Size, decompositions: Seconds, workers: int | None = None) -> Merge:
    """Merge one round of that size, both ways, with so many threads; by default one for each core."""
    torch.set_num_threads(1)
    workers = workers or os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="hlora-bench-") as folder, open_executor(f"threads://{workers}") as executor:
        blobs = Blobs.open(f"file://{folder}/blobs")
        task = gather(size, blobs)
        rates = Rates.measured()
        reset_peak()
        before = resident_bytes()
        began = time.perf_counter()
        merged = merge_round(task, executor, blobs)
        seconds = (time.perf_counter() - began) * size.copies
        peak = peak_bytes()
        dense = sum(_dense_seconds(size, task, blobs, shape, decompositions) for shape in size.shapes) * size.copies / workers
        excess, ratio, certificate = _checked(size, task, blobs, merged)
    stacked = sum(input.rank for input in task.inputs)
    return Merge(
        size=size.name,
        clients=size.clients,
        wire=size.wire,
        modules=len(size.shapes),
        copies=size.copies,
        extrapolated=size.copies > 1,
        stacked_rank=stacked,
        rank=task.plan.global_rank,
        seconds=seconds,
        dense_seconds=dense,
        ratio=dense / seconds,
        peak_megabytes=None if before is None or peak is None else (peak - before) / 1e6,
        relative_excess=excess,
        error_ratio=ratio,
        certificate_error=certificate,
        limit_share=_limit(size, task, stacked, rates) * size.copies / workers / seconds,
        machine=this_machine(),
    )


def _terms(task: RoundTask, blobs: Blobs, module: str) -> list[tuple[float, Factors]]:
    total = sum(input.weight for input in task.inputs)
    return [(input.weight / total * input.scale, open_slice(blobs, input.digest).factors(module)) for input in task.inputs]


def _summed(terms: list[tuple[float, Factors]], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    mean = torch.zeros(shape, dtype=dtype)
    for weight, factors in terms:
        mean += weight * (factors.b.to(dtype) @ factors.a.to(dtype))
    return mean


def _dense_seconds(size: Size, task: RoundTask, blobs: Blobs, shape: tuple[int, int], decompositions: Seconds) -> float:
    """Seconds of the dense form for one module; a decomposition takes as long whatever was summed, and is measured once."""
    module = next(name for name, found in size.modules.items() if found == shape)
    terms = _terms(task, blobs, module)
    began = time.perf_counter()
    mean = _summed(terms, shape, torch.float32)
    formed = time.perf_counter() - began
    if shape not in decompositions:
        began = time.perf_counter()
        torch.linalg.svd(mean, full_matrices=False)
        decompositions[shape] = time.perf_counter() - began
    return formed + decompositions[shape]


def _checked(size: Size, task: RoundTask, blobs: Blobs, merged: Merged) -> tuple[float, float, float]:
    """Of one module: relative excess error, error over least error, and how wrong the certificate is."""
    module, rank = "module.000", task.plan.global_rank
    w = _summed(_terms(task, blobs, module), size.shapes[0], torch.float64)
    found = open_slice(blobs, merged.adapter.digest).factors(module)
    lost = float((w - found.b.double() @ found.a.double()).square().sum())
    side = w if w.shape[0] <= w.shape[1] else w.T
    total = float(w.square().sum())
    least = max(0.0, total - float(torch.linalg.eigvalsh(side @ side.T)[-rank:].sum()))
    energy: Energy = merged.energy[module]
    said = (1 - energy.kept[rank]) * energy.total
    return (lost**0.5 - least**0.5) / total**0.5, (lost / least) ** 0.5, abs(said / lost - 1)


def _limit(size: Size, task: RoundTask, stacked: int, rates: Rates) -> float:
    """Least seconds of one thread: every byte read once; W multiplied once by r columns and once by r rows, as factors."""
    sides = sum(n_out + n_in for n_out, n_in in size.shapes)
    bytes = sides * stacked * size.wire.size
    return bytes / rates.bytes_per_second + 4 * sides * stacked * task.plan.global_rank / rates.flops_per_second


def methods(size: Size, decompositions: Seconds, repeats: int = 3) -> list[Method]:
    """The first module of that size in memory, one thread: the exact and the quick method beside the dense form."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="hlora-bench-") as folder:
        blobs = Blobs.open(f"file://{folder}/blobs")
        one = replace(size, shapes=size.shapes[:1])
        task, shape = gather(one, blobs), one.shapes[0]
        terms = _terms(task, blobs, "module.000")
        dense = _dense_seconds(one, task, blobs, shape, decompositions)
    w, rank = Sum(shape, [Term(factors, weight) for weight, factors in terms]), task.plan.global_rank
    ways: dict[str, Callable[[Sum], object | None]] = {
        "exact": lambda w: truncation.exact(stacked(w), rank),
        "quick": lambda w: truncation.quick(stacked(w), rank),
    }
    found = {name: _best(way, w, repeats) for name, way in ways.items()}
    common = {"n_out": shape[0], "n_in": shape[1], "clients": one.clients, "stacked_rank": w.rank, "rank": rank}
    return [
        Method(method=name, seconds=seconds, dense_seconds=dense, ratio=dense / seconds, machine=this_machine(), **common)
        for name, seconds in found.items()
    ]


def _best(way: Callable[[Sum], object | None], w: Sum, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        found = way(w)
        times.append(time.perf_counter() - began)
        assert found is not None, f"the certificate asks for less than {truncation.HAIR:.0%}, which this crowd allows"
    return min(times)


def report(found: Merge | Method) -> str:
    """One measurement for a person."""
    if isinstance(found, Method):
        return (
            f"one module {found.n_out} × {found.n_in}, {found.clients} clients, one thread, {found.method}: "
            f"{1000 * found.seconds:.0f} ms, dense form {found.dense_seconds:.2f} s ({found.ratio:.0f} times)"
        )
    return (
        f"{found.size}, {found.clients} clients, {found.wire}{', extrapolated' if found.extrapolated else ''}: {found.seconds:.2f} s from "
        f"files, dense form {found.dense_seconds:.1f} s ({found.ratio:.1f} times), {found.limit_share:.0%} of the machine's limit, peak "
        f"{'unknown' if found.peak_megabytes is None else f'{found.peak_megabytes:.0f} MB'}, error {found.error_ratio - 1:.1e} above the "
        f"least ({found.relative_excess:.1e} of the sum), certificate true to {found.certificate_error:.1e}"
    )


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    quick: Annotated[bool, typer.Option("--quick", help="a part of RoBERTa-large alone, under a minute")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON line for each measurement")] = False,
) -> None:
    """Merge rounds of clients with unequal ranks, beside the dense form."""
    decompositions: Seconds = {}
    sizes = QUICK if quick else SIZES
    told = {size.shapes[0]: size for size in sizes if size.clients == 20}
    for one in told.values():
        for method in methods(one, decompositions):
            typer.echo(method.model_dump_json() if as_json else report(method))
    for size in sizes:
        found = measure(size, decompositions)
        typer.echo(found.model_dump_json() if as_json else report(found))


if __name__ == "__main__":
    app()
