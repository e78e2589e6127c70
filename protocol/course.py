"""The course of a run's rounds, as a plan has it: who makes them, what each client does, how long they last, what is measured."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from protocol.strict import Seconds, Strict


class Cohort(Strict):
    """How many clients make a round."""

    target: int = Field(
        ge=1, le=1_000_000, description="contributions that close the round at once; with a buffer, clients at work at a time"
    )
    quorum: int = Field(ge=1, le=1_000_000, description="contributions that suffice at the deadline")
    over_selection: float = Field(
        default=1.0, ge=1, le=10, description="clients drawn = target × this, rounded up; has no meaning with a buffer"
    )
    attempts: int = Field(default=3, ge=1, le=100, description="how often a round is tried before the run pauses")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.quorum > self.target:
            raise ValueError(f"the quorum of {self.quorum} is more than the target of {self.target}")
        return self


class Training(Strict):
    """One client's work in one round."""

    learning_rate: float = Field(gt=0, le=10, description="of AdamW, which begins anew with every job")
    epochs: float = Field(default=1.0, gt=0, le=1_000, description="passes over the client's training rows")
    max_steps: int | None = Field(default=None, ge=1, description="optimiser steps at most")
    batch_size: int = Field(default=8, ge=1, le=65_536, description="rows per forward pass")
    accumulate: int = Field(default=1, ge=1, le=65_536, description="forward passes per optimiser step")
    warmup: float = Field(default=0.0, ge=0, lt=1, description="share of the steps over which the learning rate rises")
    decay: bool = Field(default=True, description="let the learning rate fall linearly to zero within the job")
    cooling: float = Field(default=1.0, gt=0, le=1, description="learning rate of the last round, as a share of the first's; it falls")
    weight_decay: float = Field(default=0.0, ge=0, le=10, description="of AdamW")
    clip_norm: float | None = Field(default=1.0, gt=0, description="longest gradient of a step; longer ones are scaled down to it")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(default="auto", description="auto: what the device does well")

    def steps(self, examples: int) -> int:
        """Optimiser steps for that many rows."""
        wanted = max(1, math.ceil(self.epochs * examples / (self.batch_size * self.accumulate)))
        return min(wanted, self.max_steps or wanted)


class Times(Strict):
    """The four times, in seconds; there are no others."""

    lease: Seconds = Field(default=60.0, description="a job whose lease is not renewed for so long is given to another")
    no_progress: Seconds = Field(default=600.0, description="a job that reports the same phase and step for so long is given to another")
    job: Seconds = Field(default=3600.0, description="a client's whole work on one job")
    round: Seconds = Field(default=7200.0, description="a round is closed or abandoned after this")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.job > self.round:
            raise ValueError(f"a job of {self.job:g} s does not fit a round of {self.round:g} s")
        if self.lease > self.job:
            raise ValueError(f"a lease of {self.lease:g} s is longer than a job of {self.job:g} s")
        return self


class Evaluation(Strict):
    """Whether and how clients measure published adapters on their own held-out rows."""

    every: int = Field(
        default=1, ge=0, description="rounds between evaluations; 0 for none; the first and the last are always measured otherwise"
    )
    rank: int | None = Field(
        default=None,
        ge=1,
        description="rank of the slices that are measured; by default each client measures what it would train from next",
    )


class NormBound(Strict):
    """A limit on the norm of one contribution's change, √(Σ ‖s b a − s₀ b₀ a₀‖²_F + Σ ‖t − t₀‖²_F), over all that was trained of it.

    b a are a module's factors, t the tensors kept whole, such as a head.
    """

    bound: float = Field(
        gt=0,
        description="the largest norm that a contribution's change may have, over its modules and the tensors kept whole; at least 1e-6",
    )
    action: Literal["clip", "reject"] = Field(
        default="clip", description="clip: what is larger counts as if it were as large; reject: not at all"
    )


class Buffer(Strict):
    """Buffered asynchronous rounds: every `size` contributions are merged, whichever version each of them started from.

    Of what a contribution changed that started s versions ago counts the part (1 + s)^−exponent (FedBuff, Nguyen et al. 2022): where all
    are stale the step is shorter.
    """

    size: int = Field(ge=1, le=1_000_000, description="contributions that make the next version")
    exponent: float = Field(
        default=0.5, ge=0, le=10, description="how fast what a contribution changed loses weight with its staleness; 0 for not at all"
    )
    largest_staleness: int = Field(default=20, ge=0, le=100_000, description="a contribution that started longer ago is rejected")

    def discount(self, staleness: int) -> float:
        """The part in (0, 1] of a change that counts, so many versions after it began."""
        return float((1 + staleness) ** -self.exponent)
