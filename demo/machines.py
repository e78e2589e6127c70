"""Unequal machines: what each department's owner offers, written as its agent's policy.toml.

The processors are the same, since all agents share this machine; memory, links and owners' limits differ. A slow link is
really slow: its bytes pass a relay (`demo/link.py`). Sizes follow from the base model, so that another model's slices meet
the same limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from protocol.contents import largest_length
from protocol.plan import Dtype, Layout

LADDER = (2, 4, 8, 16)
LINK_SECONDS = 6.0  # that a job's slices may take on the link, down and up together


@dataclass(frozen=True)
class Machine:
    """What a machine's owner offers. A rank stands for the bytes of its slices."""

    memory_gb: float
    largest_rank: int | None = None
    metered_rank: int | None = None  # the most that fits the bytes allowed per job
    link_rank: int | None = None  # the most that the link carries in time


MACHINES: Sequence[Machine] = (
    Machine(memory_gb=16),
    Machine(memory_gb=12),
    Machine(memory_gb=8, largest_rank=8),
    Machine(memory_gb=8, metered_rank=4),
    Machine(memory_gb=6),
    Machine(memory_gb=4, link_rank=2),
    Machine(memory_gb=4),
    Machine(memory_gb=3),
)


def policy(machine: Machine, layout: Layout) -> str:
    """The machine's policy.toml."""
    lines = [f"memory_bytes = {machine.memory_gb * 1e9:.0f}"]
    if machine.largest_rank is not None:
        lines.append(f"largest_rank = {machine.largest_rank}")
    if machine.metered_rank is not None:
        lines.append(f"max_bytes = {between(machine.metered_rank, layout)}  # down and up, in one job")
    if (speed := link_speed(machine, layout)) is not None:
        lines += [f"{way}_bytes_per_second = {speed}" for way in ("down", "up")]
    return "\n".join(lines) + "\n"


def link_speed(machine: Machine, layout: Layout) -> int | None:
    """Bytes per second in each direction; None where the link sets no limit."""
    return None if machine.link_rank is None else round(between(machine.link_rank, layout) / LINK_SECONDS)


def between(rank: int, layout: Layout) -> int:
    """Bytes for a slice of this rank down and up, but too few for the next rung: halfway, so that measured speeds may err."""
    rungs = [r for r in LADDER if r >= rank][:2]
    return sum(2 * largest_length(layout, r, Dtype.float32) for r in rungs) // len(rungs)


def write_policy(machine: Machine, layout: Layout, home: Path) -> None:
    """Put the policy where the agent looks for it."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "policy.toml").write_text(policy(machine, layout))
