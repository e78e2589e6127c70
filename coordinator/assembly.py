"""What a round publishes: the global adapter, one slice per rung of the ladder, and what training starts from, module by module.

The parts come in the order of the file and go to disk soon, so that no more than a few modules are in memory; the files are
hashed and written beside each other.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import BinaryIO, Self

import torch
from torch import Tensor

from coordinator import aggregation, rounding, sizes
from coordinator.blobs import GROWING, Blobs
from coordinator.devices import PROCESSOR
from coordinator.fresh import fresh_rows
from coordinator.lowrank import cut, pad
from coordinator.portions import Portion, fresh
from protocol import crash, errors
from protocol.checks import is_finite
from protocol.contents import Label, head
from protocol.crash import Point
from protocol.messages import BlobRef
from protocol.plan import Dtype, Plan
from protocol.slices import TORCH_DTYPES, Factors, numbers
from protocol.views import Energy

BATCH = 1 << 20  # bytes of a file that are hashed and written at a time


@dataclass(frozen=True)
class Start:
    """A file that training starts from, and that is no slice. Ranks of which it is the same share one."""

    directions: int
    scale: float


@dataclass(frozen=True)
class Piece:
    """One module's, or one fully trained tensor's, numbers in every file that a round publishes."""

    adapter: bytes
    slices: Mapping[int, bytes]
    starts: Mapping[Start, bytes]
    energy: Energy | None = None


@dataclass(frozen=True)
class Merged:
    """What a round published. The adapter is float32 at the plan's cap and scale 1; slices are by rank.

    Starts are by rank too; none where training starts from the slices. The device is what computed it, in words.
    """

    adapter: BlobRef
    slices: dict[int, BlobRef]
    starts: dict[int, BlobRef] = field(default_factory=dict)
    energy: dict[str, Energy] = field(default_factory=dict)
    device: str = PROCESSOR


def starts(plan: Plan) -> dict[int, Start]:
    """What training starts from at each rung; nothing where it starts from the slices."""
    kind = aggregation.load(plan.strategy.name)
    if kind.portion is Portion.leading and kind.singular:
        return {}
    return {rank: Start(kind.portion.held(rank, plan.global_rank), plan.adapter.scale(rank)) for rank in plan.ranks.ladder}


def module_piece(plan: Plan, round: int, module: str, kept: Factors, best: Factors, energy: Energy) -> Piece:
    """One module of the adapter as it is kept, its best approximation's cut at every rung, and what training starts from.

    kept, best: b (n_out, k), a (k, n_in), the best one with b = U√S, a = √S Vᵀ; where the strategy keeps singular form they are
    the same. Raises NonFiniteSlice where the wire's dtype cannot hold it, UnmergeableRound for factors of other shapes.
    """
    (n_out, n_in), cap = (len(best.b), best.a.shape[1]), plan.global_rank
    if kept.b.shape != (n_out, kept.rank) or kept.a.shape[1:] != (n_in,) or kept.rank > cap:
        raise errors.UnmergeableRound(
            f"strategy {plan.strategy.name} kept factors of shapes {list(kept.b.shape)} and {list(kept.a.shape)} of {module}; "
            f"at most {cap} directions of {n_out} × {n_in} were expected"
        )
    rows = fresh_rows(plan.global_rank, best.a.shape[1], seed=plan.seed, round=round, module=module)
    whole = pad(Factors(b=kept.b.float(), a=kept.a.float()), plan.global_rank)
    singular = aggregation.load(plan.strategy.name).singular

    @cache  # a smaller slice is a larger one's first part, as long as their scales are the same
    def widest(scale: float) -> Factors:
        rank = max(rank for rank in plan.ranks.ladder if plan.adapter.scale(rank) == scale)
        return cut(best, rank, scale, plan.adapter.split, fresh(rows, rank), TORCH_DTYPES[plan.wire])

    def start(of: Start) -> Factors:
        return cut(
            whole, of.directions, of.scale, plan.adapter.split if singular else None, fresh(rows, of.directions), TORCH_DTYPES[plan.wire]
        )

    scales = {rank: plan.adapter.scale(rank) for rank in plan.ranks.ladder}
    begun = {of: start(of) for of in set(starts(plan).values())}

    def rounded() -> float | None:
        """The most that the wire's dtype takes off any of these, as a share of what it stands for."""
        if plan.wire is Dtype.float32:
            return None
        off = rounding.share if singular else rounding.share_in_any_gauge
        cuts = [rounding.share(best, widest(scale), scale) for scale in set(scales.values())]
        return max([*cuts, *(off(pad(whole, of.directions), file, of.scale) for of, file in begun.items())])

    return Piece(
        adapter=_numbers(module, whole, Dtype.float32),
        slices={rank: _numbers(module, widest(scale).leading(rank), plan.wire) for rank, scale in scales.items()},
        starts={of: _numbers(module, file, plan.wire) for of, file in begun.items()},
        energy=energy.model_copy(update={"rounding": rounded()}),
    )


def _numbers(module: str, factors: Factors, dtype: Dtype) -> bytes:
    _check_held(f"factors/{module}/b", factors.b)
    _check_held(f"factors/{module}/a", factors.a)
    return numbers(factors.a, factors.b, dtype=dtype)


def tensor_piece(plan: Plan, name: str, tensor: Tensor) -> Piece:
    """One fully trained tensor, the same in every file. Raises NonFiniteSlice where the wire's dtype cannot hold it."""
    travelling = tensor.to(TORCH_DTYPES[plan.wire])
    _check_held(f"full/{name}", travelling)
    part = numbers(travelling, dtype=plan.wire)
    whole = part if plan.wire is Dtype.float32 else numbers(tensor, dtype=Dtype.float32)
    return Piece(whole, dict.fromkeys(plan.ranks.ladder, part), dict.fromkeys(starts(plan).values(), part))


def _check_held(name: str, travelling: Tensor) -> None:
    """Raises NonFiniteSlice where numbers, which were finite, became infinite on the way into the wire's dtype."""
    if not is_finite(travelling):
        largest = torch.finfo(travelling.dtype).max
        raise errors.NonFiniteSlice(
            f"{name} of the merged adapter holds numbers beyond {largest:.6g}, the most that slices of this plan can carry; "
            "start a run whose wire is bfloat16 or float32",
            tensor=name,
        )


class Assembly:
    """The files of one round while they grow; a context, because they lie in a temporary folder."""

    def __init__(self, plan: Plan, round: int) -> None:
        self._plan = plan
        self._round = round
        self._begun = starts(plan)
        self._open = ExitStack()
        self._energy: dict[str, Energy] = {}

    def __enter__(self) -> Self:
        folder = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix=GROWING)))
        self._writers = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="assembly")
        layout, plan = sizes.layout(self._plan), self._plan
        label = Label(rank=plan.global_rank, scale=1.0, round=self._round)
        self._adapter = self._spool(folder / "adapter", head(layout, label, Dtype.float32))
        self._slices = {}
        for rank in plan.ranks.ladder:
            label = Label(rank=rank, scale=plan.adapter.scale(rank), round=self._round)
            self._slices[rank] = self._spool(folder / str(rank), head(layout, label, plan.wire))
        self._starts: dict[Start, _Spool] = {}
        for start in dict.fromkeys(self._begun.values()):
            label = Label(rank=start.directions, scale=start.scale, round=self._round)
            self._starts[start] = self._spool(folder / f"start-{len(self._starts)}", head(layout, label, plan.wire))
        self._open.enter_context(self._writers)  # last, so that they end before their files are closed
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def add(self, name: str, piece: Piece) -> None:
        """The next piece, in the order of the layout: modules, then fully trained tensors."""
        self._adapter.write(piece.adapter)
        for rank, spool in self._slices.items():
            spool.write(piece.slices[rank])
        for start, spool in self._starts.items():
            spool.write(piece.starts[start])
        if piece.energy is not None:
            self._energy[name] = piece.energy

    def publish(self, blobs: Blobs) -> Merged:
        """Keep the files as blobs."""
        for settled in [spool.settle() for spool in (self._adapter, *self._slices.values(), *self._starts.values())]:
            settled.result()
        adapter = self._adapter.keep(blobs)
        crash.reached(Point.first_blob_kept)
        slices = {rank: spool.keep(blobs) for rank, spool in self._slices.items()}
        kept = {start: spool.keep(blobs) for start, spool in self._starts.items()}
        crash.reached(Point.adapter_blob_kept)
        begun = {rank: kept[start] for rank, start in self._begun.items()}
        return Merged(adapter=adapter, slices=slices, starts=begun, energy=self._energy)

    def _spool(self, path: Path, start: bytes) -> _Spool:
        spool = _Spool(path, self._open.enter_context(path.open("wb")), self._writers)
        spool.write(start)
        return spool


class _Spool:
    """A file that knows the digest of what was written to it; a batch is written while the next one is collected."""

    def __init__(self, path: Path, file: BinaryIO, writers: Executor) -> None:
        self._path, self._file, self._writers = path, file, writers
        self._hash = hashlib.sha256()
        self._batch, self._size = list[bytes](), 0
        self._writing: Future[None] | None = None

    def write(self, data: bytes) -> None:
        """Write this too, soon. Raises what the batch before it met."""
        self._batch.append(data)
        self._size += len(data)
        if self._size >= BATCH:
            self._begin(self._write)

    def settle(self) -> Future[None]:
        """Write what is left, and make all of it durable."""
        return self._begin(self._finish)

    def keep(self, blobs: Blobs) -> BlobRef:
        """The file as a blob, once it has settled."""
        return blobs.put_file(self._path, "sha256:" + self._hash.hexdigest())

    def _begin(self, work: Callable[[list[bytes]], None]) -> Future[None]:
        if self._writing is not None:
            self._writing.result()
        self._writing = self._writers.submit(work, self._batch)
        self._batch, self._size = [], 0
        return self._writing

    def _write(self, batch: list[bytes]) -> None:
        for data in batch:
            self._hash.update(data)
            self._file.write(data)

    def _finish(self, batch: list[bytes]) -> None:
        self._write(batch)
        self._file.flush()
        os.fsync(self._file.fileno())
