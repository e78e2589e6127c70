"""From a round's contributions to the next global adapter and its slices, one task per module.

Keys travel, tensors do not: a task is names, digests and numbers, and its worker reads the byte ranges that it needs.
What comes out depends on the contents that went in and on nothing else: not on their order, the executor, or the number of
workers.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from typing import Protocol, runtime_checkable

from torch import Tensor

from coordinator import aggregation, devices, sizes
from coordinator.aggregation import Contribution, Given, ModuleRound
from coordinator.assembly import Assembly, Merged, Piece, module_piece, tensor_piece
from coordinator.blobs import Blobs
from coordinator.initial import first_adapter
from coordinator.lowrank import held, truncate
from coordinator.reading import SliceReader, StoredFactors, TrainedFactors, ahead, learn, open_slice
from coordinator.sums import Stored, Sum, Term
from protocol import errors
from protocol.plan import Head, Plan
from protocol.slices import Factors
from protocol.views import Energy

__all__ = ["Input", "Merged", "ModuleTask", "RoundTask", "first_adapter", "merge_module", "merge_round", "merge_tensor"]


@dataclass(frozen=True, order=True)
class Input:
    """One accepted contribution: its blob, its label, and how much it counts. Ordered by its content."""

    digest: str
    rank: int
    scale: float
    weight: float  # ≥ 0, in any unit: shares are formed here
    shrink: float  # γ in (0, 1]: the share of the change that counts
    base: str  # digest of the slice that it started from
    directions: tuple[int, ...] | None = None  # those of the base that it trained, in the order in which they came; all if none
    job: str = field(default="", compare=False)  # whose it is, for the record; nothing follows from it


@dataclass(frozen=True)
class RoundTask:
    """One round to be merged."""

    store: str  # URL of the blobs
    plan: Plan  # resolved
    round: int  # the round that is published
    previous: str  # digest of the global adapter before it
    inputs: tuple[Input, ...]
    earlier: str | None = None  # digest of the global adapter one round before that


@dataclass(frozen=True)
class ModuleTask:
    """One module, or one tensor kept whole, of a round."""

    round: RoundTask  # its plan without the layout, its inputs in order, their weights summing to one
    name: str
    shape: tuple[int, ...]


def merge_round(task: RoundTask, executor: Executor, blobs: Blobs) -> Merged:
    """Merge a round and keep what it publishes. Repeating it keeps the same bytes.

    Raises NoContributions, ZeroWeight or UnmergeableRound for inputs that make no mean; NotFound for a missing blob; what
    reading a damaged slice raises; Unavailable where a worker was lost or a GPU failed: later it may be done.
    """
    layout = sizes.layout(task.plan)
    ready = replace(task, plan=task.plan.model_copy(update={"layout": None}), inputs=_shares(task.inputs))
    calls: list[_Call] = [(merge_module, ModuleTask(ready, name, shape)) for name, shape in layout.modules.items()]
    tensor = merge_tensor if task.plan.adapter.head is Head.trained else keep_tensor
    calls += [(tensor, ModuleTask(ready, name, shape)) for name, shape in layout.full.items()]
    with Assembly(task.plan, task.round) as assembly:
        for (_, part), piece in zip(calls, _in_order(executor, calls), strict=True):
            assembly.add(part.name, piece)
        return replace(assembly.publish(blobs), device=devices.name(executor))


def merge_module(task: ModuleTask) -> Piece:
    """One module's next factors, at the cap and cut to every rung."""
    blobs = Blobs.open(task.round.store)
    learn(blobs, {digest for input in task.round.inputs for digest in (input.digest, input.base)})
    with ahead(blobs, _trained(blobs, task)) as trained:
        return _merged(task, _state(blobs, task, trained))


def _merged(task: ModuleTask, state: ModuleRound) -> Piece:
    plan = task.round.plan
    strategy = aggregation.check(plan.strategy)
    w = strategy.combine(state)
    found = truncate(w, plan.global_rank)
    best = kept = found.padded(plan.global_rank)
    ranks = sorted({*plan.ranks.ladder, plan.global_rank})
    shares, short = {rank: found.kept(rank) for rank in ranks}, found.short
    if not strategy.singular:
        # What is handed out, measured and read out is what is kept, which need not be the sum's best.
        kept = strategy.keep(state, w, best)
        own = truncate(Sum(w.shape, [Term(kept, 1.0)]), plan.global_rank)
        best, shares = own.padded(plan.global_rank), held(w, own, found.total, ranks)
        short = max(0.0, found.kept(plan.global_rank) + found.short - shares[plan.global_rank])
    energy = Energy(total=found.total, kept=shares, stacked_rank=found.stacked_rank, short=short)
    return module_piece(plan, task.round.round, task.name, kept, best, energy)


def merge_tensor(task: ModuleTask) -> Piece:
    """One fully trained tensor, T + Σ p γ (t − t₀), summed in float64.

    T is as the adapter keeps it, in float32. Where everybody started from it and γ = 1, this is the weighted mean Σ p t; but t₀ is what
    the wire's dtype made of T, and a mean of what began there would lose, round by round, every step below its rounding.
    """
    blobs = Blobs.open(task.round.store)
    started = lru_cache(maxsize=1)(lambda digest: open_slice(blobs, digest).full(task.name))  # of many the same; a head may be large

    def change(input: Input) -> Tensor:
        given = started(input.base)
        return _opened(blobs, input).trained_full(task.name, lambda: given).double().sub_(given)

    merged = open_slice(blobs, task.round.previous).full(task.name).double()  # no dearer than bringing it elsewhere
    for input in task.round.inputs:
        merged.add_(change(input), alpha=input.weight * input.shrink)
    return tensor_piece(task.round.plan, task.name, merged)


def keep_tensor(task: ModuleTask) -> Piece:
    """One tensor that nobody trains, as it was."""
    return tensor_piece(task.round.plan, task.name, open_slice(Blobs.open(task.round.store), task.round.previous).full(task.name))


def _trained(blobs: Blobs, task: ModuleTask) -> list[TrainedFactors]:
    """What came of the module, in the order of the inputs."""
    started = cache(lambda digest: open_slice(blobs, digest).factors(task.name))  # many began with the same few slices

    def start(input: Input) -> Factors:
        return started(input.base).of(input.directions)

    return [TrainedFactors(_opened(blobs, input), task.name, partial(start, input)) for input in task.round.inputs]


def _state(blobs: Blobs, task: ModuleTask, trained: Sequence[Stored]) -> ModuleRound:
    def stored(digest: str) -> StoredFactors:
        return StoredFactors(open_slice(blobs, digest), task.name)

    n_out, n_in = task.shape
    return ModuleRound(
        shape=(n_out, n_in),
        round=task.round.round,
        adapter=stored(task.round.previous),
        contributions=tuple(
            Contribution(
                factors=factors,
                scale=input.scale,
                weight=input.weight,
                shrink=input.shrink,
                given=Given(input.base, given := stored(input.base), given.reader.header.label.scale),
                directions=input.directions,
            )
            for input, factors in zip(task.round.inputs, trained, strict=True)
        ),
        earlier=stored(task.round.earlier) if task.round.earlier else None,
    )


def _opened(blobs: Blobs, input: Input) -> SliceReader:
    reader = open_slice(blobs, input.digest)
    label = reader.header.label
    if (label.rank, label.scale) != (input.rank, input.scale):
        raise errors.MismatchedSlice(
            f"{input.digest} says rank {label.rank} and scale {label.scale}; {input.rank} and {input.scale} were recorded"
        )
    held = open_slice(blobs, input.base).header.label.rank
    named = range(held) if input.directions is None else input.directions
    if len(named) != input.rank or len(set(named)) < len(named) or not all(0 <= i < held for i in named):
        raise errors.MismatchedSlice(
            f"{input.digest} has rank {input.rank} and is said to have trained {len(named)} of {held} directions, first {list(named)[:20]}"
        )
    return reader


def _shares(inputs: tuple[Input, ...]) -> tuple[Input, ...]:
    """The inputs in the order of their contents, with weights that sum to one; those without weight left out.

    Floating-point addition is not associative, so the order is part of the result: it must not be that of arrival.
    """
    if not inputs:
        raise errors.NoContributions("a round needs at least one contribution")
    for input in inputs:
        if not (math.isfinite(input.weight) and input.weight >= 0 and 0 < input.shrink <= 1):
            raise errors.UnmergeableRound(
                f"{input.digest} has weight {input.weight} and shrink {input.shrink}; finite ≥ 0 and in (0, 1] were expected"
            )
    ordered = sorted(input for input in inputs if input.weight > 0)
    total = math.fsum(input.weight for input in ordered)
    if not total > 0:
        raise errors.ZeroWeight(f"the weights of {len(inputs)} contributions sum to nothing")
    return tuple(replace(input, weight=input.weight / total) for input in ordered)


@runtime_checkable
class Wide(Protocol):
    """An executor whose workers are not this machine's cores."""

    def width(self) -> int:
        """The tasks that it carries out at a time."""
        ...


_Call = tuple[Callable[[ModuleTask], Piece], ModuleTask]


def _in_order(executor: Executor, calls: Iterable[_Call]) -> Iterator[Piece]:
    """The calls' results in their order, a few ahead of the reader: enough for every core, and no more in memory."""
    cores = os.cpu_count() or 1
    ahead = 2 * max(cores, executor.width() if isinstance(executor, Wide) else cores)
    waiting: deque[Future[Piece]] = deque()
    try:
        for function, task in calls:
            waiting.append(executor.submit(function, task))
            if len(waiting) > ahead:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())
    finally:
        for future in waiting:
            future.cancel()


def _result(future: Future[Piece]) -> Piece:
    try:
        return future.result()
    except (BrokenExecutor, CancelledError) as error:
        raise errors.Unavailable("a worker was lost in the middle of it, as it is when its machine runs out of memory") from error
    except devices.FAILED as error:
        raise errors.Unavailable(f"the GPU failed at it: {str(error).partition(chr(10))[0]}") from error
