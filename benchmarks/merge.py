"""A round merged from files, beside the dense form that published code runs: form Σ p s b a of every module, then decompose it.

Both start from the same contributions, with the same number of threads. Of the dense form one module of each shape is
measured, in processor seconds; what it would cost to read the files is left out, and its modules are taken to share the threads
perfectly, all in its favour.

The machine's limit is what no merge that knows its own error can go below: every byte read once, and the least arithmetic for
the energies (both Gram matrices, or the dense sum where that is less) and for the result, in float32 at the rate at which this
machine multiplies. The bare limit is that of a merge that does not ask what it lost: W times r columns, and r rows times W.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.alone import Accuracy, Method, gathered, methods, terms_of
from benchmarks.crowd import Size
from benchmarks.dense import Dense, truth
from benchmarks.machine import Machine, Rates, peak_bytes, reset_peak, resident_bytes, this_machine
from coordinator.blobs import Blobs
from coordinator.executors import open_executor
from coordinator.merge import Merged, RoundTask, merge_round
from coordinator.reading import open_slice
from protocol.plan import Dtype


class Merge(Accuracy):
    """What merging one round cost."""

    size: str
    clients: int
    wire: Dtype
    modules: int  # that were merged; the model has `copies` times as many
    copies: float
    extrapolated: bool  # seconds and dense_seconds are of the model, from fewer modules
    stacked_rank: int
    rank: int
    threads: int
    seconds: float
    processor_seconds: float  # of all threads
    dense_seconds: float
    ratio: float
    peak_megabytes: float | None  # above what was in memory before the merge; none where the system does not say
    limit_share: float  # the least time in which this machine could merge and know the error / seconds
    bare_limit_share: float  # the same without knowing the error
    machine: Machine

    def report(self) -> str:
        """For a person."""
        peak = "unknown" if self.peak_megabytes is None else f"{self.peak_megabytes:.0f} MB"
        return (
            f"{self.size}, {self.clients} clients, {self.wire}{', extrapolated' if self.extrapolated else ''}: {self.seconds:.2f} s "
            f"from files ({self.processor_seconds:.2f} s of processors), dense form {self.dense_seconds:.1f} s ({self.ratio:.1f} times), "
            f"{self.limit_share:.0%} of the machine's limit ({self.bare_limit_share:.0%} of the bare one), peak {peak}, {self}"
        )


LLAMA_BLOCK = ((4096, 4096),) * 4 + ((11008, 4096),) * 2 + ((4096, 11008),)


def _roberta(clients: int, modules: int, wire: Dtype) -> Size:
    return Size("RoBERTa-large, 48 modules 1024²", ((1024, 1024),) * modules, clients, wire, 48 / modules)


def _llama(clients: int, wire: Dtype) -> Size:
    return Size("Llama-2-7B, 224 modules, from one block", LLAMA_BLOCK, clients, wire, 32)


def _llama_pairs(clients: int, wire: Dtype) -> Size:
    return Size("Llama-2-7B, 128 of 224 modules, from two", ((4096, 4096),) * 2, clients, wire, 64)


BOTH = (Dtype.float32, Dtype.bfloat16)
SIZES = (
    *(_roberta(clients, modules, wire) for clients, modules in ((10, 48), (20, 48), (100, 8), (1000, 2)) for wire in BOTH),
    *(_llama(clients, wire) for clients in (10, 20) for wire in BOTH),
    _llama(100, Dtype.bfloat16),
    _llama_pairs(1000, Dtype.bfloat16),
)
QUICK = (
    *(_roberta(clients, modules, Dtype.float32) for clients, modules in ((10, 8), (20, 24), (100, 4))),
    _roberta(20, 24, Dtype.bfloat16),
    _llama_pairs(20, Dtype.bfloat16),
)


def measure(size: Size, dense: Dense, workers: int | None = None, folder: Path | None = None) -> Merge:
    """Merge one round of that size, both ways, with so many threads; by default one for each core."""
    torch.set_num_threads(1)
    workers = workers or os.cpu_count() or 1
    with gathered(size, folder) as (task, blobs), open_executor(f"threads://{workers}") as executor:
        rates = Rates.measured()
        reset_peak()
        before = resident_bytes()
        began, worked = time.perf_counter(), time.process_time()
        merged = merge_round(task, executor, blobs)
        seconds, processor = ((now - then) * size.copies for now, then in ((time.perf_counter(), began), (time.process_time(), worked)))
        peak = peak_bytes()
        dense_seconds = _dense_seconds(size, task, blobs, dense) * size.copies / workers
        accuracy = _checked(size, task, blobs, merged)
    stacked_rank = sum(input.rank for input in task.inputs)
    knowing, bare = (least * size.copies / workers / seconds for least in _limits(size, stacked_rank, task.plan.global_rank, rates))
    return Merge(
        size=size.name,
        clients=size.clients,
        wire=size.wire,
        modules=len(size.shapes),
        copies=size.copies,
        extrapolated=size.copies > 1,
        stacked_rank=stacked_rank,
        rank=task.plan.global_rank,
        threads=workers,
        seconds=seconds,
        processor_seconds=processor,
        dense_seconds=dense_seconds,
        ratio=dense_seconds / seconds,
        peak_megabytes=None if before is None or peak is None else (peak - before) / 1e6,
        limit_share=knowing,
        bare_limit_share=bare,
        machine=this_machine(),
        **accuracy.model_dump(),
    )


def _dense_seconds(size: Size, task: RoundTask, blobs: Blobs, dense: Dense) -> float:
    """Seconds of the dense form for all modules, one after another."""
    names = {shape: name for name, shape in size.modules.items()}
    each = {shape: dense.seconds(terms_of(task, blobs, name), shape) for shape, name in names.items()}
    return sum(each[shape] for shape in size.shapes)


def _checked(size: Size, task: RoundTask, blobs: Blobs, merged: Merged) -> Accuracy:
    module, rank = "module.000", task.plan.global_rank
    energy = merged.energy[module]
    found = truth(terms_of(task, blobs, module), size.shapes[0], open_slice(blobs, merged.adapter.digest).factors(module))
    said = (1 - energy.kept[rank]) * energy.total
    return Accuracy(relative_excess=found.relative_excess, error_ratio=found.error_ratio, certificate_error=abs(said / found.lost - 1))


def _limits(size: Size, stacked: int, rank: int, rates: Rates) -> tuple[float, float]:
    """Least seconds of one thread for a merge that knows its error, and for one that does not."""
    sides, area = sum(n_out + n_in for n_out, n_in in size.shapes), sum(n_out * n_in for n_out, n_in in size.shapes)
    reading = sides * stacked * size.wire.size / rates.bytes_per_second
    knowing = min(sides * stacked * (stacked + 2 * rank), 2 * area * (stacked + rank))
    return reading + knowing / rates.flops_per_second, reading + 4 * sides * stacked * rank / rates.flops_per_second


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    quick: Annotated[
        bool, typer.Option("--quick", help="fewer modules of each, about a minute; the whole takes a quarter of an hour")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON line for each measurement")] = False,
    folder: Annotated[Path | None, typer.Option(help="where the contributions lie meanwhile, up to 4 GB; by default the system's")] = None,
) -> None:
    """Merge rounds of clients with unequal ranks from files, beside the dense form, and hold the results against float64.

    First single modules in memory, one thread, by both methods; then RoBERTa-large and Llama-2-7B, 10 to 1,000 clients, all cores.
    """
    dense = Dense()
    sizes = QUICK if quick else SIZES
    alone = {size.shapes[0]: size for size in reversed(sizes) if size.clients == 20}  # the first of each shape
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(alone) + len(sizes))
        for one in alone.values():
            progress.update(task, description=f"one module {one.shapes[0][0]} × {one.shapes[0][1]}")
            for method in methods(one, dense, folder=folder):
                _say(method, as_json)
            progress.advance(task)
        for size in sizes:
            progress.update(task, description=f"{size.name}, {size.clients} clients, {size.wire}")
            _say(measure(size, dense, folder=folder), as_json)
            progress.advance(task)


def _say(found: Merge | Method, as_json: bool) -> None:
    typer.echo(found.model_dump_json() if as_json else found.report())


if __name__ == "__main__":
    app()
