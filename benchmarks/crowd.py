"""Crowds for benchmarks: clients of unequal ranks whose contributions lie in files, as they would have been sent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coordinator.blobs import Blobs
from coordinator.initial import first_adapter
from coordinator.merge import Input, Merged, RoundTask
from protocol.contents import Label
from protocol.plan import Dtype, Plan
from protocol.slices import TORCH_DTYPES, Factors, Slice, pack

FINGERPRINT = "sha256:" + "0" * 64
NOISE = 0.3  # length of what each client has of its own in a direction; that of what all have in common is 1 / √i


@dataclass(frozen=True)
class Size:
    """A model, a crowd, and the ranks that its clients train in turn."""

    name: str
    shapes: tuple[tuple[int, int], ...]  # (n_out, n_in) of the modules that are merged here
    clients: int
    wire: Dtype = Dtype.float32
    copies: float = 1.0  # how often the model has these modules; more than one is an extrapolation
    ladder: tuple[int, ...] = (4, 8, 16, 32, 64)

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """The modules by name."""
        return {f"module.{number:03}": shape for number, shape in enumerate(self.shapes)}


def gather(size: Size, blobs: Blobs) -> RoundTask:
    """The first round of that size, every contribution stored."""
    plan = _plan(size)
    first = first_adapter(plan, blobs)
    common = {module: _common(shape, size.ladder[-1], seed) for seed, (module, shape) in enumerate(size.modules.items())}
    inputs = tuple(_send(size, plan, blobs, first, common, number) for number in range(size.clients))
    return RoundTask(store=blobs.url, plan=plan, round=1, previous=first.adapter.digest, inputs=inputs)


def _plan(size: Size) -> Plan:
    base = {"parameters": 10**6, "layers": len(size.shapes), "hidden": size.shapes[0][1], "vocabulary": 1000}
    return Plan.model_validate(
        {
            "name": "bench",
            "model": {"id": "bench", "fingerprint": FINGERPRINT},
            "task": {"kind": "causal-lm"},
            "data": "rows",
            "adapter": {"modules": "all-linear"},
            "layout": {"modules": size.modules, "base": base},
            "training": {"learning_rate": 0.001},
            "strategy": {"name": "hlora"},
            "ranks": {"name": "fixed", "ladder": size.ladder},
            "cohort": {"target": size.clients, "quorum": 1},
            "rounds": 1,
            "wire": size.wire,
        }
    )


def _common(shape: tuple[int, int], rank: int, seed: int) -> Factors:
    """What all clients learn: singular values that fall like 1 / i, half in each factor."""
    generator = torch.Generator().manual_seed(seed)
    n_out, n_in = shape
    root = torch.arange(1, rank + 1).rsqrt()
    return Factors(b=_drawn(generator, n_out, rank) * root, a=root[:, None] * _drawn(generator, n_in, rank).T)


def _drawn(generator: torch.Generator, length: int, rank: int) -> Tensor:
    """(length, rank) columns of length about one."""
    return torch.randn(length, rank, generator=generator).div_(length**0.5)


def _send(size: Size, plan: Plan, blobs: Blobs, first: Merged, common: dict[str, Factors], number: int) -> Input:
    rank = size.ladder[number % len(size.ladder)]
    scale, base = plan.adapter.scale(rank), first.slices[rank].digest
    generator = torch.Generator().manual_seed(1000 + number)
    dtype = TORCH_DTYPES[size.wire]
    factors = {}
    for module, (n_out, n_in) in size.modules.items():
        b = common[module].b[:, :rank] + NOISE * _drawn(generator, n_out, rank)
        a = common[module].a[:rank] + NOISE * _drawn(generator, n_in, rank).T
        factors[module] = Factors(b=b.to(dtype), a=a.to(dtype))
    assert plan.layout is not None, "this plan is made with its layout"
    data = pack(Slice(Label(rank=rank, scale=scale, round=1, base=base, examples=1), factors), plan.layout, plan.wire)
    return Input(digest=blobs.put(data).digest, rank=rank, scale=scale, weight=float(number % 7 + 1), shrink=1.0, base=base)
