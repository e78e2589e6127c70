"""A job in hand: how far it is, what ended it, and how much time it leaves for another step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Self

from agent.learning import Enough
from agent.training import Standing
from protocol import errors
from protocol.messages import Job

RECENT = 8  # steps; the slowest of them is what the next one may take
MARGIN_SECONDS = 10.0  # for what cannot be foreseen; less for a job that has little time
MARGIN_SHARE = 0.05
TELLING_BYTES = 1 << 20  # a transfer of fewer says more of the way to and fro than of what the link carries


@dataclass
class Link:
    """What the link carries up, as far as it is known."""

    bytes_per_second: float | None = None

    def measured(self, count: int, seconds: float) -> None:
        """Note that so many bytes took so long."""
        if count >= TELLING_BYTES and seconds > 0:
            self.bytes_per_second = count / seconds

    def seconds(self, count: int) -> float:
        """How long so many bytes will take; nothing where that is not known."""
        return count / self.bytes_per_second if self.bytes_per_second else 0.0


@dataclass
class Held:
    """A job in hand. The worker thread says how far it is; whoever ends the job puts the reason here."""

    job: Job
    clock: Callable[[], float]
    until: float  # of the clock: the job's deadline
    sending_seconds: float  # that are kept free before it
    standing: Standing = field(default_factory=lambda: Standing("download"))
    ended: errors.HLoRAError | None = None
    finished: bool = False  # the work is in the outbox; only the coordinator has not got it yet
    answering: bool = False  # the result is on its way: the lease is needed no longer, and may be gone when it is there
    marks: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT + 1))

    @classmethod
    def begin(cls, job: Job, clock: Callable[[], float], link: Link) -> Self:
        """The job as it was handed out just now."""
        margin = min(MARGIN_SECONDS, MARGIN_SHARE * job.remaining_seconds)
        return cls(job, clock, clock() + job.remaining_seconds, link.seconds(job.max_upload_bytes) + margin)

    def remains(self, seconds: float) -> None:
        """Take note of the time until the deadline."""
        self.until = self.clock() + seconds

    def tell(self, standing: Standing) -> None:
        """Take note of the worker's progress. Raises what ended the job; Enough, if another training step could come too late."""
        if self.ended is not None:
            raise self.ended
        if standing.phase != self.standing.phase:
            self.marks.clear()
        self.standing = standing
        self.marks.append(self.clock())
        if standing.phase == "train" and 0 < standing.step < standing.steps and self._late():
            raise Enough

    def _late(self) -> bool:
        marks = list(self.marks)
        slowest = max((late - early for early, late in pairwise(marks)), default=0.0)
        return marks[-1] + slowest + self.sending_seconds > self.until
