"""A run small enough to follow: two modules, one fully trained head, ranks 1, 2 and 4; and what its clients send."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from pydantic import JsonValue
from torch import Tensor

from coordinator import aggregation
from coordinator.assembly import Merged
from coordinator.blobs import Blobs
from coordinator.merge import Input, RoundTask
from protocol.compact import trained_parts
from protocol.contents import Label
from protocol.course import Cohort, Training
from protocol.messages import BlobRef
from protocol.plan import Adapter, BaseFacts, CausalLM, Choice, Dtype, Layout, Model, Plan, Ranks, Scaling, Split
from protocol.slices import Factors, Slice, unpack

LAYOUT = Layout(
    modules={"block.q": (20, 12), "block.v": (12, 30)},
    full={"head.bias": (3,), "head.weight": (3, 12)},
    base=BaseFacts(parameters=1, layers=1, hidden=12, vocabulary=1),
)
Train = Callable[[Slice, int], Slice]


def make_plan(
    strategy: str = "delta",
    *,
    options: Mapping[str, JsonValue] | None = None,
    ladder: Sequence[int] = (1, 2, 4),
    cap: int | None = None,
    scaling: Scaling = Scaling.rank,
    split: Split = Split.balanced,
    wire: Dtype = Dtype.float32,
    uploads: Dtype | None = None,
    layout: Layout | None = LAYOUT,
    seed: int = 0,
) -> Plan:
    """A resolved plan; scale = 4 / rank, so that ranks differ in scale too."""
    return Plan(
        name="small",
        model=Model(id="base"),
        task=CausalLM(),
        data="texts",
        adapter=Adapter(modules=["q", "v"], alpha=4.0, scaling=scaling, split=split),
        layout=layout,
        training=Training(learning_rate=1e-3),
        strategy=Choice(name=strategy, options=options or {}),
        ranks=Ranks(ladder=list(ladder)),
        cap=cap,
        cohort=Cohort(target=1, quorum=1),
        rounds=100,
        wire=wire,
        uploads=uploads,
        seed=seed,
    )


def trained(start: Slice, seed: int) -> Slice:
    """The slice after a training that moved every number at random."""
    g = torch.Generator().manual_seed(seed)
    return replace(
        start,
        factors={name: Factors(b=_moved(f.b, g), a=_moved(f.a, g)) for name, f in start.factors.items()},
        full={name: _moved(t, g) for name, t in start.full.items()},
    )


def _moved(tensor: Tensor, g: torch.Generator) -> Tensor:
    return (tensor.float() + 0.1 * torch.randn(tensor.shape, generator=g)).to(tensor.dtype)


def untrained(start: Slice, seed: int) -> Slice:
    """The slice after a training that moved nothing."""
    return start


def start_of(merged: Merged, rank: int) -> BlobRef:
    """What training at that rank starts from."""
    return merged.starts.get(rank) or merged.slices[rank]


def send(
    blobs: Blobs,
    plan: Plan,
    base: BlobRef,
    *,
    rank: int | None = None,
    seed: int = 0,
    weight: float = 1.0,
    shrink: float = 1.0,
    train: Train = trained,
) -> Input:
    """One client's contribution to the round after the one that published `base`, by default of all of its directions."""
    given, kind = unpack(blobs.read(base.digest)), aggregation.load(plan.strategy.name)
    rank = rank or given.label.rank
    directions = kind.portion.trained(rank, plan.global_rank, str(seed))
    done = train(replace(given, factors={name: f.of(directions) for name, f in given.factors.items()}), seed)
    label = Label(rank=rank, scale=given.label.scale, round=given.label.round + 1, base=base.digest, examples=seed + 1)
    assert plan.layout is not None
    new = replace(done, label=label)
    ref = blobs.put(b"".join(trained_parts(new, given, plan.layout, plan.upload, directions=directions, sides=kind.sides)))
    trained_ones = None if directions is None else tuple(directions)
    return Input(ref.digest, rank, label.scale, weight, shrink, base.digest, trained_ones)


def round_task(blobs: Blobs, plan: Plan, before: Merged, inputs: Sequence[Input], round: int = 1) -> RoundTask:
    """The round that follows what was published before."""
    return RoundTask(store=blobs.url, plan=plan, round=round, previous=before.adapter.digest, inputs=tuple(inputs))


def read(blobs: Blobs, ref: BlobRef) -> Slice:
    """A published slice."""
    return unpack(blobs.read(ref.digest))


def dense(factors: Factors, scale: float = 1.0) -> Tensor:
    """scale · b @ a in float64: (n_out, n_in)."""
    return scale * (factors.b.double() @ factors.a.double())


def update(slice: Slice, module: str) -> Tensor:
    """What a slice adds to one weight matrix, float64: (n_out, n_in)."""
    return dense(slice.factors[module], slice.label.scale)


def best(w: Tensor, rank: int) -> Tensor:
    """The best approximation of that rank, from a full singular value decomposition in float64."""
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    leading: Tensor = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return leading
