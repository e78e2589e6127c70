"""The manifest of a round: everything that its bytes follow from, written down when it is published.

Merging is a pure function of stored bytes and of the numbers here, so whoever has the manifest, the plan and the blobs can
make the round again and compare. What computed it is noted too: other versions, or another kind of processor, may round
differently, and a GPU does.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass

import numpy
import torch

from coordinator.assembly import Merged
from coordinator.merge import Input, RoundTask
from protocol import VERSION
from protocol.plan import Plan
from protocol.views import Manifest, ManifestInput


@dataclass(frozen=True)
class Origin:
    """Where a contribution came from."""

    client: str  # the client's name
    round: int  # the round in which its job was handed out


def software() -> dict[str, str]:
    """What computes merges here."""
    return {
        "hlora": VERSION,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def describe(task: RoundTask | Plan, merged: Merged, plan: str, origins: Mapping[str, Origin]) -> Manifest:
    """The manifest of what a task came to, under a plan of that digest; origins by the ids of the inputs' jobs.

    Inputs stand in the order of their contents, in which they were added up, with the weights that the task gave them.
    """
    merging = task if isinstance(task, RoundTask) else None
    return Manifest(
        plan=plan,
        round=merging.round if merging else 0,
        previous=merging and merging.previous,
        earlier=merging and merging.earlier,
        inputs=[_noted(input, merging.round, origins[input.job]) for input in sorted(merging.inputs)] if merging else [],
        adapter=merged.adapter,
        slices=merged.slices,
        starts=merged.starts,
        software=software(),
        device=merged.device,
    )


def _noted(input: Input, round: int, origin: Origin) -> ManifestInput:
    return ManifestInput(
        job=input.job,
        client=origin.client,
        digest=input.digest,
        rank=input.rank,
        scale=input.scale,
        weight=input.weight,
        shrink=input.shrink,
        base=input.base,
        directions=input.directions,
        staleness=round - origin.round,
    )


def task_of(manifest: Manifest, plan: Plan, store: str) -> RoundTask | Plan:
    """The task that the manifest describes, over the blobs at that URL; for round 0 the plan, as everywhere."""
    if manifest.previous is None:
        return plan
    return RoundTask(
        store=store,
        plan=plan,
        round=manifest.round,
        previous=manifest.previous,
        inputs=tuple(Input(**noted.model_dump(exclude={"client", "staleness"})) for noted in manifest.inputs),
        earlier=manifest.earlier,
    )
