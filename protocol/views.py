"""What operators ask for and see, as JSON. Times are the coordinator's own, in UTC."""

from __future__ import annotations

from datetime import datetime
from typing import Generic, TypeVar

from pydantic import Field, JsonValue

from protocol.messages import (
    BlobRef,
    Bytes,
    Metric,
    Profile,
    Progress,
    Usage,
)
from protocol.plan import Plan
from protocol.states import ClientState, JobKind, JobState, Role, RoundState, RunState
from protocol.strict import Digest, Name, Strict
from protocol.texts import Labels, Told

T = TypeVar("T")


class Page(Strict, Generic[T]):
    """One page of a list; `next` is the cursor of the next page, if there is one."""

    items: list[T]
    next: str | None = None


class RankView(Strict):
    """The rank that was chosen, and why."""

    rank: int
    reason: str = Field(description="one sentence")
    limits: dict[str, int | None] = Field(
        default={}, description="largest rung that each consideration allows; null where it sets no limit"
    )
    whole: bool | None = Field(
        default=None, description="whether it starts from the whole adapter; null where the strategy does not ask what a client carries"
    )


class JobView(Strict):
    """One client's part in a round."""

    id: str
    client: str
    client_name: str
    kind: JobKind
    state: JobState
    reason: str | None
    rank: RankView
    epoch: int
    progress: Progress | None
    slice: BlobRef | None
    examples: int | None
    weight: float | None = Field(description="share of the merged sum")
    change_norm: float | None = Field(description="‖change‖_F over all modules and the tensors kept whole")
    counted_in: int | None = Field(default=None, description="the round that it was merged into: a later one where rounds are buffered")
    staleness: int | None = Field(default=None, description="versions published between its start and its merge; none while not merged")
    max_steps: int | None = Field(default=None, description="optimiser steps to which the job was cut so that it meets its deadline")
    metrics: dict[str, Metric]
    usage: Usage | None


class Energy(Strict):
    """How much of one module's merged update was kept."""

    total: float = Field(description="‖W‖²_F before the cut")
    kept: dict[int, float] = Field(
        description="rank → 1 − ‖W − W_r‖² / ‖W‖², the share of ‖W‖²_F that the leading directions hold; 1 where W is zero, "
        "below 0 where averaged factors are farther from W than nothing is"
    )
    stacked_rank: int = Field(description="directions that entered the sum")
    short: float = Field(
        default=0.0,
        description="share of ‖W‖²_F that the best adapter of the largest rank may hold beyond this one; 0 where this is the best",
    )
    rounding: float | None = Field(
        default=None,
        description="the most that half precision takes off a slice or off what training starts from, as a share of its norm; "
        "none of float32",
    )


class ManifestInput(Strict):
    """One contribution as it was merged."""

    job: str
    client: str = Field(description="the client's name")
    digest: Digest
    rank: int
    scale: float
    weight: float = Field(description="share of the merged sum")
    shrink: float = Field(description="share of its change that counts, by the plan's norm bound and its staleness")
    base: Digest = Field(description="the slice that it started from")
    directions: tuple[int, ...] | None = Field(default=None, description="those of the base that it trained; all if none")
    staleness: int = Field(default=0, description="versions published between its start and its merge")


class Manifest(Strict):
    """Everything that a published round's bytes follow from, and their names: enough to make them again."""

    plan: Digest
    round: int
    previous: Digest | None = Field(description="global adapter before the round; none before round 0")
    earlier: Digest | None = Field(description="global adapter one round before that")
    inputs: list[ManifestInput]
    adapter: BlobRef
    slices: dict[int, BlobRef]
    starts: dict[int, BlobRef] = Field(default={}, description="what training starts from, by rank, where that is not a slice")
    software: dict[str, str] = Field(description="versions of what computed it")
    device: str = Field(default="cpu", description="what it was merged on: cpu, or the name of a GPU")


class RoundSummary(Strict):
    """One attempt at one round, in short. Round 0 publishes what training begins with."""

    number: int
    attempt: int
    state: RoundState
    reason: str | None
    opened_at: datetime
    ended_at: datetime | None
    cohort: int = Field(description="training jobs handed out, re-draws included")
    contributions: int
    ranks: dict[int, int] = Field(description="rank → accepted contributions")
    bytes_up: Bytes = Field(description="trained slices that came and were found good")
    bytes_down: Bytes = Field(description="what clients fetched for the jobs that they answered, as they say")
    train_seconds: float = Field(description="sum over clients")
    merge_seconds: float | None
    metrics: dict[str, float] = Field(description="evaluation of the adapter that this round published, weighted mean over clients")
    train_metrics: dict[str, float] = Field(description="weighted mean over training jobs")
    kept_energy: dict[int, float] = Field(description="rank → kept share of the energy of all modules together")


class RoundView(RoundSummary):
    """One attempt at one round, whole."""

    jobs: list[JobView]
    adapter: BlobRef | None
    slices: dict[int, BlobRef]
    energy: dict[str, Energy]
    manifest: Manifest | None = Field(default=None, description="of a published round")
    forgotten: bool = Field(default=False, description="its contributions and slices were given up by the retention policy")


class RunView(Strict):
    """A run and where it stands."""

    id: str
    name: str
    state: RunState
    reason: str | None = Field(description="why it is not running, or what it waits for")
    round: int = Field(description="the last published round")
    rounds: int
    created_at: datetime
    ended_at: datetime | None
    metrics: dict[str, float] = Field(description="the newest evaluation")
    bytes_up: Bytes = Field(description="trained slices that came and were found good")
    bytes_down: Bytes = Field(description="what clients fetched for the jobs that they answered, as they say")


class RunDetail(RunView):
    """A run with its plan."""

    plan: Plan
    plan_digest: Digest


class ClientView(Strict):
    """A client as operators see it."""

    id: str
    name: str
    state: ClientState
    reason: str | None
    labels: dict[Told, Told]
    available: bool = Field(description="seen within the pace that it was given")
    last_seen: datetime | None
    enrolled_at: datetime
    rejections: int
    rank: RankView | None = Field(description="the last rank that it was given")
    profile: Profile


class ClientChange(Strict):
    """What an operator changes of a client; what is left out stays."""

    labels: Labels | None = None
    state: ClientState | None = None
    rotate: bool = Field(default=False, description="issue a new credential and void the old one")


class ClientChanged(Strict):
    """The client after the change, with its new credential if one was issued."""

    client: ClientView
    credential: str | None = None


class EnrolmentRequest(Strict):
    """Make an enrolment token."""

    uses: int = Field(default=1, ge=1, le=100_000)
    seconds: float = Field(default=86_400, gt=0, le=365 * 86_400, description="time to live")
    labels: Labels = Field(default={}, description="given to every client that enrols with it")


class EnrolmentView(Strict):
    """An enrolment token, without the token."""

    id: str
    uses_left: int
    expires_at: datetime
    revoked: bool
    labels: dict[Told, Told]


class EnrolmentMade(EnrolmentView):
    """An enrolment token; it is told this once."""

    token: str


class TokenRequest(Strict):
    """Make an operator's token."""

    name: Name
    role: Role = Role.viewer


class TokenView(Strict):
    """An operator's token, without the token."""

    id: str
    name: str
    role: Role
    created_at: datetime
    revoked: bool


class TokenMade(TokenView):
    """An operator's token; it is told this once."""

    token: str


class QuarantineView(Strict):
    """A contribution that was set apart, and why."""

    id: str
    at: datetime
    run: str
    round: int
    job: str
    client: str
    client_name: str
    problem: str = Field(description="slug of the refusal; `suspicious-change` for a sound slice that is far from the others")
    reason: str
    slice: BlobRef | None = Field(description="the bytes, if they came whole and are still kept")


class Description(Strict):
    """A strategy or rank policy that plans may name."""

    name: str
    summary: str
    options: dict[str, JsonValue] = Field(description="JSON schema of its options")
    properties: dict[str, JsonValue] = Field(default={}, description="what it promises, such as exact, linear, gauge-free")


class Event(Strict):
    """One change of state."""

    id: int
    at: datetime
    kind: str
    run: str | None = None
    round: int | None = None
    client: str | None = None
    facts: dict[str, JsonValue] = {}


class Health(Strict):
    """Whether the coordinator works."""

    status: str
    version: str
    checks: dict[str, str] = {}
