"""One round merged from files, beside the dense form: form Σ p s b a of every module, then a full singular value decomposition.

Both start from the same contributions and use one thread. The dense form is measured on one module and multiplied by their
number; what it would cost to read the files is left out, in its favour.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass

import torch
from pydantic import BaseModel
from torch import Tensor

from benchmarks.machine import Machine, this_machine
from coordinator.blobs import Blobs
from coordinator.executors import open_executor
from coordinator.initial import first_adapter
from coordinator.merge import Input, Merged, RoundTask, merge_round
from protocol.plan import Plan
from protocol.slices import Factors, Label, Slice, pack, unpack

FINGERPRINT = "sha256:" + "0" * 64


@dataclass(frozen=True)
class Size:
    """A model, a crowd, and the ranks that its clients train in turn."""

    name: str
    modules: int
    side: int
    clients: int
    ladder: tuple[int, ...] = (4, 8, 16, 32)


class Merge(BaseModel):
    """What merging one round cost."""

    size: str
    modules: int
    side: int
    clients: int
    seconds: float
    dense_seconds: float  # one module measured, times the modules
    ratio: float
    relative_error: float  # of one module, against the best approximation of the sum in float64
    machine: Machine


SIZES = (
    Size("RoBERTa-base, 24 modules 768²", 24, 768, 20),
    Size("RoBERTa-large, 48 modules 1024²", 48, 1024, 20),
)
QUICK = (Size("one layer, 2 modules 512²", 2, 512, 10),)


def measure(size: Size) -> Merge:
    """Merge one round of that size, both ways."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="hlora-bench-") as folder, open_executor("threads://1") as executor:
        blobs = Blobs.open(f"file://{folder}/blobs")
        plan = _plan(size)
        first = first_adapter(plan, blobs)
        inputs = tuple(_send(size, plan, blobs, first, number) for number in range(size.clients))
        task = RoundTask(store=blobs.url, plan=plan, round=1, previous=first.adapter.digest, inputs=inputs)
        began = time.perf_counter()
        merged = merge_round(task, executor, blobs)
        seconds = time.perf_counter() - began
        dense_seconds, error = _dense(size, task, blobs, merged)
    return Merge(
        size=size.name,
        modules=size.modules,
        side=size.side,
        clients=size.clients,
        seconds=seconds,
        dense_seconds=dense_seconds * size.modules,
        ratio=dense_seconds * size.modules / seconds,
        relative_error=error,
        machine=this_machine(),
    )


def _plan(size: Size) -> Plan:
    modules = {f"layer.{number:03}": (size.side, size.side) for number in range(size.modules)}
    base = {"parameters": 10**6, "layers": size.modules, "hidden": size.side, "vocabulary": 1000}
    return Plan.model_validate(
        {
            "name": "bench",
            "model": {"id": "bench", "fingerprint": FINGERPRINT},
            "task": {"kind": "causal-lm"},
            "data": "rows",
            "adapter": {"modules": "all-linear"},
            "layout": {"modules": modules, "base": base},
            "training": {"learning_rate": 0.001},
            "strategy": {"name": "hlora"},
            "ranks": {"name": "fixed", "ladder": size.ladder},
            "cohort": {"target": size.clients, "quorum": 1},
            "rounds": 1,
        }
    )


def _send(size: Size, plan: Plan, blobs: Blobs, first: Merged, number: int) -> Input:
    """One client's contribution: random factors, stored as they would have been sent."""
    rank = size.ladder[number % len(size.ladder)]
    scale, base = plan.adapter.scale(rank), first.slices[rank].digest
    generator = torch.Generator().manual_seed(number)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).div_(size.side**0.5)

    assert plan.layout is not None, "this plan is made with its layout"
    factors = {module: Factors(b=drawn(size.side, rank), a=drawn(rank, size.side)) for module in plan.layout.modules}
    data = pack(Slice(Label(rank=rank, scale=scale, round=1, base=base, examples=1), factors), plan.layout, plan.wire)
    return Input(digest=blobs.put(data).digest, rank=rank, scale=scale, weight=float(number + 1), shrink=1.0, base=base)


def _dense(size: Size, task: RoundTask, blobs: Blobs, merged: Merged) -> tuple[float, float]:
    """Seconds of the dense form for one module, and how far the merged module is from the best approximation."""
    module, rank = "layer.000", task.plan.global_rank
    total = sum(input.weight for input in task.inputs)
    terms = [(input.weight / total * input.scale, unpack(blobs.read(input.digest)).factors[module]) for input in task.inputs]
    began = time.perf_counter()
    mean = torch.zeros(size.side, size.side)
    for weight, factors in terms:
        mean += weight * (factors.b @ factors.a)
    torch.linalg.svd(mean)
    seconds = time.perf_counter() - began
    exact = sum((weight * factors.b.double() @ factors.a.double() for weight, factors in terms), torch.zeros(size.side, size.side).double())
    u, s, vt = torch.linalg.svd(exact, full_matrices=False)
    best = u[:, :rank] * s[:rank] @ vt[:rank]
    found = unpack(blobs.read(merged.adapter.digest)).factors[module]
    return seconds, float(torch.linalg.norm(found.b.double() @ found.a.double() - best) / torch.linalg.norm(best))


def report(found: Merge) -> str:
    """One measurement for a person."""
    return (
        f"{found.size}, {found.clients} clients: {found.seconds:.2f} s from files, dense form {found.dense_seconds:.1f} s "
        f"({found.ratio:.0f} times), relative error {found.relative_error:.1e}"
    )
