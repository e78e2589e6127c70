"""Jobs for tiny models, and rows that can be learned."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import time
from pathlib import Path

from agent.data import Catalogue, Source
from modelling.layout import resolve
from protocol import slices
from protocol.contents import largest_length
from protocol.messages import BlobRef, Job, Lease
from protocol.plan import Dtype, Plan, Sides, Task
from protocol.slices import Slice
from protocol.states import JobKind
from tests.modelling.drawn import CLASSES, drawn_slice, tiny_plan

NOON = time(12, 0)
WHOLE = 4  # rank of a slice of which a job trains part
SCALE = 2.0
ROWS: list[Mapping[str, object]] = [
    {"text": f"{filler} the {colour} one {filler}", "label": colour}
    for filler in ("see", "take", "give me", "look at", "we like", "this is", "that was", "all of")
    for colour in ("blue", "green", "red")
]


def resolved(model: Path, task: Task = CLASSES) -> Plan:
    """A resolved plan for a tiny model."""
    return resolve(tiny_plan(model, task))


def make_start(model: Path, rank: int = 2, task: Task = CLASSES) -> Slice:
    """A slice to start from."""
    return drawn_slice(resolved(model, task), rank, SCALE)


def handed_out(model: Path, job: Job) -> Slice:
    """What a job starts from."""
    return make_start(model, job.rank if job.directions is None else WHOLE, job.task)


def make_job(
    model: Path,
    *,
    rank: int = 2,
    kind: JobKind = JobKind.train,
    task: Task = CLASSES,
    seed: int = 1,
    wire: Dtype = Dtype.float32,
    directions: list[int] | None = None,
    sides: Sides = Sides.both,
    **training: object,
) -> Job:
    """A job as the coordinator would hand it out; changes are of the training. Directions are of a slice of rank WHOLE."""
    plan = resolved(model, task)
    assert plan.layout is not None
    rank = rank if directions is None else len(directions)
    data = slices.pack(make_start(model, rank if directions is None else WHOLE, task), plan.layout, wire)
    return Job.model_validate(
        {
            "id": "job-1",
            "run": "run-1",
            "run_name": "tiny",
            "round": 3,
            "kind": kind,
            "rank": rank,
            "rank_reason": "for a test",
            "scale": SCALE,
            "seed": seed,
            "slice": BlobRef(digest=slices.digest(data), bytes=len(data)),
            "directions": directions,
            "sides": sides,
            "lease": Lease(epoch=1, seconds=60, no_progress_seconds=600),
            "remaining_seconds": 600,
            "max_upload_bytes": largest_length(plan.layout, rank, wire),
            "model": plan.model,
            "task": task,
            "data": "things",
            "adapter": plan.adapter,
            "layout": plan.layout,
            "training": {"learning_rate": 5e-3, "batch_size": 4, "precision": "float32", **training},
            "wire": wire,
        }
    )


def catalogue(folder: Path, rows: list[Mapping[str, object]] = ROWS, held_out: float | None = 0.25) -> Catalogue:
    """One data set, `things`."""
    (folder / "things.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(format="jsonl", path="things.jsonl", held_out=held_out, seed=10)  # with this seed a quarter of the 24 is six
    return Catalogue({"things": source}, folder)
