"""What the owner of a device allows. It has the last word over every plan."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from datetime import time
from pathlib import Path

from pydantic import Field, ValidationError, field_validator

from protocol import errors
from protocol.messages import Bytes, Job, Limits
from protocol.strict import Share, Strict, mistakes

FILE = "policy.toml"
HOURS = re.compile(r"^([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)$")


class Policy(Strict):
    """The owner's policy; without a file everything is allowed, and four fifths of the memory are offered."""

    models: list[str] | None = Field(default=None, description="patterns of allowed model ids, such as sentence-transformers/*")
    data: list[str] | None = Field(default=None, description="data aliases that may be used; by default all in datasets.toml")
    largest_rank: int | None = Field(default=None, ge=1, description="rank that is trained; what is handed out may hold more, frozen")
    max_steps: int | None = Field(default=None, ge=1, description="optimiser steps per job")
    max_bytes: Bytes | None = Field(default=None, description="bytes up and down per job")
    hours: list[str] | None = Field(default=None, description="local times in which it may work, such as 22:00-06:00")
    memory_share: Share = Field(default=0.8, description="share of the device's memory that is offered")
    memory_bytes: Bytes | None = Field(default=None, gt=0, description="most memory that is offered, in bytes")
    up_bytes_per_second: float | None = Field(default=None, gt=0, le=1e12, description="what the link carries up")
    down_bytes_per_second: float | None = Field(default=None, gt=0, le=1e12, description="what the link carries down")
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda or cuda:1")

    @field_validator("hours")
    @classmethod
    def _spans(cls, hours: list[str] | None) -> list[str] | None:
        for span in hours or []:
            if not HOURS.match(span):
                raise ValueError(f"{span!r} is no span of hours such as 22:00-06:00")
        return hours

    def limits(self) -> Limits:
        """What the coordinator may know of the policy, so that it offers nothing that would be refused."""
        return Limits(largest_rank=self.largest_rank, max_steps=self.max_steps, max_bytes=self.max_bytes, models=self.models)

    def offered(self, memory_bytes: int) -> int:
        """How much of a device's memory is offered."""
        return max(1, min(int(memory_bytes * self.memory_share), self.memory_bytes or memory_bytes))

    def may_work(self, now: time) -> bool:
        """Whether the local time lies in the hours; a span may pass midnight, its end is excluded."""
        return self.hours is None or any(_within(span, now) for span in self.hours)

    def check_hours(self, now: time) -> None:
        """Raises Refusal outside the hours. It is a rest and no refusal of the job: like an agent that stops, it goes on where it was."""
        if not self.may_work(now):
            raise errors.Refusal(f"the policy's hours are {', '.join(self.hours or [])}; it is {now:%H:%M}", stopping=True)

    def check_model(self, model: str) -> None:
        """Raises PolicyRefusal unless a model of this id may be used."""
        if self.models is not None and not any(fnmatch.fnmatchcase(model, pattern) for pattern in self.models):
            raise errors.PolicyRefusal(f"the policy's models ({', '.join(self.models)}) do not include {model}", line="models")

    def check(self, job: Job, now: time) -> None:
        """Raises PolicyRefusal, naming the line of the policy, unless the job is allowed; Refusal if only not at this local time."""
        self.check_hours(now)
        self.check_model(job.model.id)
        if self.data is not None and job.data not in self.data:
            raise errors.PolicyRefusal(f"the policy's data ({', '.join(self.data)}) do not include {job.data!r}", line="data")
        if self.largest_rank is not None and job.rank > self.largest_rank:
            raise errors.PolicyRefusal(f"the policy's largest_rank is {self.largest_rank}; the job's is {job.rank}", line="largest_rank")
        moved = job.slice.bytes + (job.max_upload_bytes if job.kind == "train" else 0)
        if self.max_bytes is not None and moved > self.max_bytes:
            raise errors.PolicyRefusal(f"the policy's max_bytes is {self.max_bytes}; the job moves up to {moved}", line="max_bytes")

    def check_steps(self, steps: int) -> None:
        """Raises PolicyRefusal if a job takes more optimiser steps than are allowed."""
        if self.max_steps is not None and steps > self.max_steps:
            raise errors.PolicyRefusal(f"the policy's max_steps is {self.max_steps}; the job takes {steps}", line="max_steps")


def _within(span: str, now: time) -> bool:
    start, end = (time.fromisoformat(part) for part in span.split("-"))
    return start <= now < end if start < end else now >= start or now < end


def load(home: Path) -> Policy:
    """The policy in a home folder; the default where there is no file. Raises PolicyRefusal if it cannot be read, or says what none can."""
    try:
        return Policy.model_validate(tomllib.loads((home / FILE).read_text("utf-8")))
    except FileNotFoundError:
        return Policy()
    except (OSError, UnicodeDecodeError) as error:
        raise errors.PolicyRefusal(f"{home / FILE} cannot be read as UTF-8 ({type(error).__name__}); mend it or its permissions") from None
    except tomllib.TOMLDecodeError as error:
        raise errors.PolicyRefusal(f"{home / FILE} is no TOML: {error}") from None
    except ValidationError as error:
        line = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise errors.PolicyRefusal(f"{home / FILE}: {next(mistakes(error, Policy))}", line=line) from None
