"""Where a training stands, kept on disk from time to time, so that an agent that comes back goes on instead of beginning anew.

A checkpoint fits one job, one start, one machine and one set of library versions; anything else begins at the first step.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from time import monotonic

import structlog
import torch
from torch import Tensor

from agent import durable
from agent.encoding import Example
from agent.learning import Course, Setting
from agent.machine import LIBRARIES
from protocol import VERSION, crash, errors
from protocol.crash import Point
from protocol.messages import Job, Usage

log = structlog.get_logger("agent")
FILE = "checkpoint"
# What torch makes of a file that is no checkpoint, found by damaging some thousands.
UNREADABLE = (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, pickle.UnpicklingError)
PASSING = {"lease", "remaining_seconds", "rank_reason", "run_name"}  # of a job: another when it is handed out again


@dataclass
class Checkpoint:
    """One training's checkpoint."""

    file: Path
    key: str
    every_seconds: float
    clock: Callable[[], float]
    kept_at: float
    began: float
    steps: int = 0  # that were taken before this process
    seconds: float = 0.0  # that they took

    def resume(self, course: Course) -> None:
        """Restore the course, if what was kept is its beginning; whatever else lies there is removed, and logged."""
        try:
            state = torch.load(self.file, map_location="cpu", weights_only=True)
            if state["key"] != self.key:
                raise ValueError("it is of another job, device, version or data set")
            if state["digest"] != digest(state["course"]):
                raise ValueError("its bits are not those that were written")
        except FileNotFoundError:
            return
        except UNREADABLE as error:
            log.warning("checkpoint-refused", error=type(error).__name__, detail=str(error)[:200])
            self.file.unlink()
            return
        course.restore(state["course"])
        self.steps, self.seconds = len(course.losses), float(state["seconds"])
        log.info("training-resumed", step=self.steps)

    def keep(self, course: Course) -> None:
        """Write the course down, if that is due. Where there is no room the training goes on without, and says so."""
        if self.clock() - self.kept_at < self.every_seconds:
            return
        seconds = self.seconds + self.clock() - self.began
        state = course.state()
        try:
            with durable.writing(self.file) as stream:
                torch.save({"key": self.key, "digest": digest(state), "seconds": seconds, "course": state}, stream)
            durable.settle(self.file.parent)
            crash.reached(Point.agent_checkpoint_kept)
        except (errors.InsufficientStorage, OSError, RuntimeError) as error:  # torch makes its own error of the stream's
            log.warning("checkpoint-not-kept", error=type(error).__name__, detail=str(error)[:200])
        self.kept_at = self.clock()

    def added(self, usage: Usage) -> Usage:
        """What the whole training cost, of which this process has done the rest."""
        return usage.model_copy(update={"steps": self.steps + usage.steps, "seconds": self.seconds + usage.seconds})


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of an agent: one per job, in the job's folder."""

    folder: Path
    every_seconds: float = 30.0
    clock: Callable[[], float] = monotonic

    def of(self, job: Job, setting: Setting, examples: Sequence[Example]) -> Checkpoint | None:
        """The checkpoint of a job's training; none where none are wanted."""
        if not self.every_seconds:
            return None
        file = durable.folder(self.folder, job.id) / FILE
        now = self.clock()
        return Checkpoint(file, key(job, setting, examples), self.every_seconds, self.clock, kept_at=now, began=now)


def key(job: Job, setting: Setting, examples: Sequence[Example]) -> str:
    """The digest of all that decides the bits of a training."""
    rows = hashlib.sha256()
    for example in examples:
        rows.update(b"%d:%d:" % (len(example.ids), example.target) + example.ids.tobytes())
    told = {
        "job": job.model_dump(mode="json", exclude=PASSING),
        "rows": rows.hexdigest(),
        "place": f"{setting.device} {setting.half}",
        "software": [VERSION, *(version(name) for name in LIBRARIES)],
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def digest(state: object) -> str:
    """The digest of nested tensors and plain values: torch's file format does not notice a bit that turned."""
    if isinstance(state, Tensor):
        return hashlib.sha256(state.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()
    if isinstance(state, dict):
        state = [(key, digest(value)) for key, value in state.items()]
    elif isinstance(state, list | tuple):
        state = [digest(value) for value in state]
    return hashlib.sha256(repr(state).encode()).hexdigest()
