"""The JSON bodies of the protocol: what agents and operators send, and what they are answered.

Durations travel, never clock times that another machine would have to agree on; the times in operators' views are the
coordinator's own, in UTC.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Generic, TypeVar

from pydantic import Field, JsonValue

from protocol.plan import Adapter, Digest, Dtype, Layout, Model, Name, Plan, Strict, Task, Training

Bytes = Annotated[int, Field(ge=0, lt=2**53)]
Count = Annotated[int, Field(ge=0, le=10**12)]
Epoch = Annotated[int, Field(ge=1, lt=2**53, description="of the lease under which this is said")]
Labels = Annotated[dict[str, str], Field(max_length=64)]


class RunState(StrEnum):
    """running ⇄ paused → finished | stopped | failed."""

    running = "running"
    paused = "paused"
    finished = "finished"
    stopped = "stopped"
    failed = "failed"


class RoundState(StrEnum):
    """open → merging → published; open → abandoned."""

    open = "open"
    merging = "merging"
    published = "published"
    abandoned = "abandoned"


class JobState(StrEnum):
    """queued → leased → submitted → accepted; or expired, released, rejected, cancelled."""

    queued = "queued"
    leased = "leased"
    submitted = "submitted"
    accepted = "accepted"
    expired = "expired"
    released = "released"
    rejected = "rejected"
    cancelled = "cancelled"


class ClientState(StrEnum):
    """active ⇄ paused → revoked."""

    active = "active"
    paused = "paused"
    revoked = "revoked"


class JobKind(StrEnum):
    """What a client is asked to do."""

    train = "train"
    evaluate = "evaluate"


class Role(StrEnum):
    """What an operator's token may do: everything, or read."""

    admin = "admin"
    viewer = "viewer"


# --- what agents say ---------------------------------------------------------------------------------------------------


class Dataset(Strict):
    """One data set of a device: counts and column names are all that is told of it."""

    train: Count = Field(description="rows to train on")
    held_out: Count = Field(default=0, description="rows kept back for evaluation")
    columns: list[Annotated[str, Field(max_length=256)]] = Field(default=[], max_length=1000)


class Limits(Strict):
    """What the device's owner allows; refusals beyond it need no round trip."""

    largest_rank: int | None = Field(default=None, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    max_bytes: Bytes | None = Field(default=None, description="bytes up and down per job")
    models: list[Annotated[str, Field(max_length=512)]] | None = Field(
        default=None, max_length=100, description="patterns of allowed model ids"
    )


class Profile(Strict):
    """What a client's machine can do and how much data it has."""

    device: str = Field(default="cpu", max_length=128, description="cpu, or the accelerator's name")
    cores: int = Field(default=1, ge=1, le=100_000)
    memory_bytes: Bytes = Field(gt=0, description="memory that training may use: the accelerator's, or the machine's")
    training_flops: float = Field(
        gt=0, le=1e18, description="floating-point operations per second reached in a trial step, forward and backward"
    )
    up_bytes_per_second: float | None = Field(default=None, gt=0, le=1e12)
    down_bytes_per_second: float | None = Field(default=None, gt=0, le=1e12)
    precisions: list[Dtype] = Field(default=[Dtype.float32], min_length=1, max_length=3)
    datasets: dict[Annotated[str, Field(max_length=128)], Dataset] = Field(default={}, max_length=1000)
    limits: Limits = Limits()
    software: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=64)]] = Field(default={}, max_length=32)


class Enrol(Strict):
    """Redeem an enrolment token."""

    name: Name
    profile: Profile


class Enrolled(Strict):
    """The client's identity; the credential is told this once."""

    id: str
    credential: str


class Progress(Strict):
    """Renew a lease, and say how far the work is."""

    epoch: Epoch
    phase: str = Field(default="", max_length=32, description="download, load, train, evaluate, upload")
    step: int = Field(default=0, ge=0, le=10**12)
    steps: int = Field(default=0, ge=0, le=10**12)
    loss: float | None = None


class Verdict(StrEnum):
    """Whether the client shall go on."""

    proceed = "continue"
    cancel = "cancel"


class Renewal(Strict):
    """The answer to a renewal."""

    verdict: Verdict
    lease_seconds: float = Field(description="until the lease runs out unless it is renewed again")
    remaining_seconds: float = Field(description="until the job's deadline")


class GiveBack(Strict):
    """Give a job back, with the reason."""

    epoch: Epoch
    reason: str = Field(min_length=1, max_length=2000)
    problem: str | None = Field(default=None, max_length=64, description="slug of the refusal, if it was one")


class Metric(Strict):
    """One measured value and the weight with which it enters means over clients."""

    value: float = Field(ge=-1e100, le=1e100, description="bounded, so that no sum of values times weights overflows")
    weight: float = Field(gt=0, le=1e15)


class Usage(Strict):
    """What a job cost; it corrects what the profile declared."""

    seconds: float = Field(default=0, ge=0, le=1e9, description="wall time of training or evaluation")
    steps: Count = 0
    step_seconds: float | None = Field(default=None, gt=0, le=1e9, description="median of a step")
    peak_memory_bytes: Bytes | None = None
    download_bytes: Bytes = 0
    download_seconds: float = Field(default=0, ge=0, le=1e9)
    upload_bytes: Bytes = 0
    upload_seconds: float = Field(default=0, ge=0, le=1e9)


class Result(Strict):
    """The end of a job."""

    epoch: Epoch
    slice: Digest | None = Field(default=None, description="the trained slice that was uploaded; none for evaluation")
    examples: int = Field(ge=1, le=10**12, description="rows trained on or measured")
    metrics: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")], Metric] = Field(default={}, max_length=64)
    usage: Usage = Usage()


# --- what agents are told ----------------------------------------------------------------------------------------------


class BlobRef(Strict):
    """Immutable bytes by name."""

    digest: Digest
    bytes: Bytes


class Lease(Strict):
    """The time-limited right to work on a job."""

    epoch: int
    seconds: float
    no_progress_seconds: float


class Job(Strict):
    """What one client is asked to do in one round. It holds all that the work needs and nothing of other clients."""

    id: str
    run: str
    run_name: str
    round: int
    kind: JobKind
    rank: int
    rank_reason: str
    scale: float
    seed: int = Field(description="seed of all randomness of this job")
    slice: BlobRef = Field(description="where to start from")
    lease: Lease
    remaining_seconds: float = Field(description="until the job's deadline")
    max_upload_bytes: Bytes
    model: Model
    task: Task
    data: str
    adapter: Adapter
    layout: Layout
    training: Training
    wire: Dtype


class ClientSelf(Strict):
    """What a client may know of itself."""

    id: str
    name: str
    state: ClientState
    profile: Profile


class SliceReceipt(Strict):
    """The slice is stored under this name."""

    digest: Digest
    bytes: Bytes


class ResultReceipt(Strict):
    """The result is recorded."""

    job: str
    state: JobState


# --- operators ---------------------------------------------------------------------------------------------------------

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
    change_norm: float | None = Field(description="‖change‖_F over all modules")
    metrics: dict[str, Metric]
    usage: Usage | None


class Energy(Strict):
    """How much of one module's merged update was kept."""

    total: float = Field(description="‖W‖²_F before the cut")
    kept: dict[int, float] = Field(description="rank → share of ‖W‖²_F that the leading directions hold; 1 where W is zero")
    stacked_rank: int = Field(description="directions that entered the sum")
    short: float = Field(
        default=0.0,
        description="share of ‖W‖²_F that the best adapter of the largest rank may hold beyond this one; 0 where this is the best",
    )


class RoundSummary(Strict):
    """One attempt at one round, in short. Round 0 publishes the untrained adapter."""

    number: int
    attempt: int
    state: RoundState
    reason: str | None
    opened_at: datetime
    ended_at: datetime | None
    cohort: int = Field(description="training jobs handed out, re-draws included")
    contributions: int
    ranks: dict[int, int] = Field(description="rank → accepted contributions")
    bytes_up: Bytes
    bytes_down: Bytes
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
    bytes_up: Bytes
    bytes_down: Bytes


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
    labels: Labels
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
    labels: Labels


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


class Problem(Strict):
    """A refusal, after RFC 9457. The facts of the refusal stand beside these members."""

    model_config = Strict.model_config | {"extra": "allow"}

    type: str = Field(description="stable name of the kind of refusal, such as /problems/stale-lease")
    title: str
    status: int
    detail: str = Field(description="what was expected, what came, what to do")
    retryable: bool = Field(description="whether the same request may succeed later")
