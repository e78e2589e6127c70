"""A plan and clients small enough to check by hand: two square modules of side 64 in a base of a million parameters."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import JsonValue

from coordinator.ranks import Candidate, Measured
from protocol.course import Cohort, Times, Training
from protocol.messages import Dataset, Limits, Profile, Usage
from protocol.plan import Adapter, BaseFacts, Choice, Dtype, Layout, Model, Plan, Ranks, SequenceClassification

LAYOUT = Layout(modules={"one": (64, 64), "two": (64, 64)}, base=BaseFacts(parameters=1_000_000, layers=2, hidden=64, vocabulary=1_000))


def make_plan(
    name: str = "capacity", ladder: tuple[int, ...] = (2, 4, 8, 16), options: Mapping[str, JsonValue] | None = None, *, job: float = 100.0
) -> Plan:
    """A resolved plan; a job of 100 s, one pass over the rows in steps of eight rows of 16 tokens."""
    return Plan.model_validate(
        {
            "name": "small",
            "model": Model(id="base"),
            "task": SequenceClassification(labels=["no", "yes"], max_length=16),
            "data": "texts",
            "adapter": Adapter(modules=["one", "two"]),
            "layout": LAYOUT,
            "strategy": Choice(name="delta"),
            "training": Training(learning_rate=1e-3, batch_size=8),
            "ranks": Ranks(name=name, ladder=list(ladder), options=options or {}),
            "cohort": Cohort(target=1, quorum=1),
            "times": Times(lease=1, job=job, round=2 * job),
            "rounds": 1,
        }
    )


def make_candidate(
    *,
    memory: int = 10**9,
    speed: float = 1e12,
    link: float | None = None,
    examples: int = 80,
    largest_rank: int | None = None,
    max_bytes: int | None = None,
    max_steps: int | None = None,
    device: str = "cpu",
    precisions: tuple[Dtype, ...] = (Dtype.float32,),
    labels: dict[str, str] | None = None,
    measured: Measured | None = None,
    previous: int | None = None,
) -> Candidate:
    """A client that by default can do everything."""
    profile = Profile(
        memory_bytes=memory,
        training_flops=speed,
        up_bytes_per_second=link,
        down_bytes_per_second=link,
        datasets={"texts": Dataset(train=examples)},
        limits=Limits(largest_rank=largest_rank, max_bytes=max_bytes, max_steps=max_steps),
        device=device,
        precisions=list(precisions),
    )
    return Candidate(name="phone", labels=labels or {}, profile=profile, measured=measured, previous=previous)


def make_measured(rank: int, **usage: float) -> Measured:
    """What an accepted job cost."""
    return Measured(rank=rank, usage=Usage.model_validate(usage))
