"""What a round publishes: the global adapter and one slice per rung of the ladder, built module by module.

The parts come in the order of the file and go to disk at once, so that no more than a few modules are in memory.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Self

from torch import Tensor

from coordinator.blobs import GROWING, Blobs
from coordinator.fresh import fresh_rows
from coordinator.lowrank import cut, pad
from protocol import crash, errors
from protocol.checks import check_finite
from protocol.crash import Point
from protocol.messages import BlobRef
from protocol.plan import Dtype, Layout, Plan
from protocol.slices import TORCH_DTYPES, Factors, Label, head, numbers
from protocol.views import Energy


@dataclass(frozen=True)
class Piece:
    """One module's, or one fully trained tensor's, numbers in every file that a round publishes."""

    adapter: bytes
    slices: Mapping[int, bytes]
    energy: Energy | None = None


@dataclass(frozen=True)
class Merged:
    """What a round published. The adapter is float32 at the plan's cap and scale 1; slices are by rank."""

    adapter: BlobRef
    slices: dict[int, BlobRef]
    energy: dict[str, Energy] = field(default_factory=dict)


def layout_of(plan: Plan) -> Layout:
    """A resolved plan's layout. Raises InvalidPlan for one that is not resolved."""
    if plan.layout is None:
        raise errors.InvalidPlan("the plan has no layout; it must be resolved against its base model first")
    return plan.layout


def module_piece(plan: Plan, round: int, module: str, adapter: Factors, energy: Energy) -> Piece:
    """One module of the adapter, and its cut at every rung.

    adapter: b = U√S (n_out, k), a = √S Vᵀ (k, n_in), float32. Raises NonFiniteSlice where the wire's dtype cannot hold it.
    """
    whole = pad(adapter, plan.global_rank)
    fresh = fresh_rows(plan.global_rank, whole.a.shape[1], seed=plan.seed, round=round, module=module)
    dtype = TORCH_DTYPES[plan.wire]
    slices: dict[int, bytes] = {}
    for rank in plan.ranks.ladder:
        part = cut(whole, rank, plan.adapter.scale(rank), plan.adapter.split, fresh, dtype)
        check_finite(f"factors/{module}/b", part.b)
        check_finite(f"factors/{module}/a", part.a)
        slices[rank] = numbers(part.a, plan.wire) + numbers(part.b, plan.wire)
    return Piece(numbers(whole.a, Dtype.float32) + numbers(whole.b, Dtype.float32), slices, energy)


def tensor_piece(plan: Plan, name: str, tensor: Tensor) -> Piece:
    """One fully trained tensor, the same in every slice. Raises NonFiniteSlice where the wire's dtype cannot hold it."""
    travelling = tensor.to(TORCH_DTYPES[plan.wire])
    check_finite(f"full/{name}", travelling)
    return Piece(numbers(tensor, Dtype.float32), dict.fromkeys(plan.ranks.ladder, numbers(travelling, plan.wire)))


class Assembly:
    """The files of one round while they grow; a context, because they lie in a temporary folder."""

    def __init__(self, plan: Plan, round: int) -> None:
        self._plan = plan
        self._round = round
        self._open = ExitStack()
        self._energy: dict[str, Energy] = {}

    def __enter__(self) -> Self:
        folder = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix=GROWING)))
        layout, plan = layout_of(self._plan), self._plan
        label = Label(rank=plan.global_rank, scale=1.0, round=self._round)
        self._adapter = self._spool(folder / "adapter", head(layout, label, Dtype.float32))
        self._slices = {}
        for rank in plan.ranks.ladder:
            label = Label(rank=rank, scale=plan.adapter.scale(rank), round=self._round)
            self._slices[rank] = self._spool(folder / str(rank), head(layout, label, plan.wire))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def add(self, name: str, piece: Piece) -> None:
        """The next piece, in the order of the layout: modules, then fully trained tensors."""
        self._adapter.write(piece.adapter)
        for rank, spool in self._slices.items():
            spool.write(piece.slices[rank])
        if piece.energy is not None:
            self._energy[name] = piece.energy

    def publish(self, blobs: Blobs) -> Merged:
        """Keep the files as blobs."""
        adapter = self._adapter.keep(blobs)
        crash.reached(Point.first_blob_kept)
        slices = {rank: spool.keep(blobs) for rank, spool in self._slices.items()}
        crash.reached(Point.adapter_blob_kept)
        return Merged(adapter=adapter, slices=slices, energy=self._energy)

    def _spool(self, path: Path, start: bytes) -> _Spool:
        spool = _Spool(path, self._open.enter_context(path.open("wb")))
        spool.write(start)
        return spool


class _Spool:
    """A file that knows the digest of what was written to it."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._hash.update(data)
        self._file.write(data)

    def keep(self, blobs: Blobs) -> BlobRef:
        self._file.flush()
        return blobs.put_file(self._path, "sha256:" + self._hash.hexdigest())
