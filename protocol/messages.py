"""What agents say and are told, as JSON.

Durations travel, never clock times that another machine would have to agree on.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from protocol import errors
from protocol.course import Training
from protocol.plan import Adapter, Dtype, Float, Layout, Model, Sides, Task
from protocol.states import ClientState, JobKind, JobState
from protocol.strict import Digest, Name, Strict
from protocol.texts import ODD, Storable

Bytes = Annotated[int, Field(ge=0, lt=2**53)]
Count = Annotated[int, Field(ge=0, le=10**12)]
Epoch = Annotated[int, Field(ge=1, lt=2**53, description="of the lease under which this is said")]

MOST_COLUMNS = 2_000  # names of all data sets of a profile together
LONGEST_PROFILE = 1 << 16  # bytes of all that is text in it
LOSS = (0.0, math.inf)  # a cross-entropy
RANGES = {"accuracy": (0.0, 1.0), "f1": (0.0, 1.0), "loss": LOSS, "loss_before": LOSS, "loss_after": LOSS, "perplexity": LOSS}


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
    precisions: list[Float] = Field(default=[Dtype.float32], min_length=1, max_length=3)
    datasets: dict[Annotated[str, Field(max_length=128)], Dataset] = Field(default={}, max_length=1000)
    limits: Limits = Limits()
    software: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=64)]] = Field(default={}, max_length=32)

    def check_extent(self) -> None:
        """Raise InvalidProfile where it says more than a coordinator can keep, and read again whenever it looks who can work.

        It is asked before a profile is sent, and where one comes in; what was taken before there was a bound is still read.
        """
        advice = "offer fewer data sets (`data` in policy.toml), or files with fewer columns"
        columns = [name for dataset in self.datasets.values() for name in dataset.columns]
        if len(columns) > MOST_COLUMNS:
            raise errors.InvalidProfile(
                f"the profile names {len(columns):,} columns of {len(self.datasets):,} data sets; at most {MOST_COLUMNS:,} may be: {advice}"
            )
        words = [self.device, *self.datasets, *columns, *(self.limits.models or ()), *self.software, *self.software.values()]
        if wrong := next((word for word in words if ODD.search(word)), None):
            raise errors.InvalidProfile(
                f"the profile's {wrong[:200]!a} holds the character NUL, which no database keeps: write it otherwise"
            )
        if (size := sum(len(word.encode()) for word in words)) > LONGEST_PROFILE:
            raise errors.InvalidProfile(
                f"the profile's names and patterns have {size:,} bytes together; at most {LONGEST_PROFILE:,} may be: {advice}"
            )


class Enrol(Strict):
    """Redeem an enrolment token."""

    name: Name
    profile: Profile
    key: str | None = Field(
        default=None,
        repr=False,
        pattern=r"^hlc_[A-Za-z0-9_-]{43}$",
        description="a credential of 256 random bits that the caller made for itself; with it the same request may be sent again",
    )


class Enrolled(Strict):
    """The client's identity; the credential is told this once, or as often as it is asked for with its own key."""

    id: str
    credential: str


class Progress(Strict):
    """Renew a lease, and say how far the work is."""

    epoch: Epoch
    phase: Annotated[str, Field(max_length=32), Storable] = Field(default="", description="download, load, train, evaluate, upload")
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
    reason: Annotated[str, Field(min_length=1, max_length=2000), Storable]
    problem: Annotated[str, Field(max_length=64), Storable] | None = Field(default=None, description="slug of the refusal, if it was one")


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

    def check_metrics(self) -> None:
        """Raise InvalidResult for a value that its metric cannot have; what was taken before it was asked for is still read."""
        for name, (low, high) in RANGES.items():
            if name in self.metrics and not low <= (value := self.metrics[name].value) <= high:
                raise errors.InvalidResult(f"{name} is {value:g}, which it cannot be: it lies from {low:g} to {high:g}")


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
    directions: list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None,
        description="those of the slice that are trained, in the order in which they come back; the others stay frozen; all if none",
    )
    sides: Sides = Field(default=Sides.both, description="the factors that are trained and come back")
    lease: Lease
    remaining_seconds: float = Field(description="until the job's deadline")
    max_upload_bytes: Bytes
    model: Model
    task: Task
    data: str
    adapter: Adapter
    layout: Layout
    training: Training
    wire: Float = Field(description="how the numbers of the slice to start from travel")
    uploads: Dtype | None = Field(default=None, description="how those of the trained slice travel; as the others do, if not given")

    @property
    def upload(self) -> Dtype:
        """How the numbers of the trained slice travel."""
        return self.uploads or self.wire

    @property
    def trained(self) -> Layout:
        """What of the layout is trained, and comes back."""
        return self.adapter.trained(self.layout)


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


class UploadAddress(Strict):
    """Where the object store takes a slice for a while: a secret, for whoever has it may put bytes there."""

    url: str = Field(max_length=8192)


class ResultReceipt(Strict):
    """The result is recorded."""

    job: str
    state: JobState


class Problem(Strict):
    """A refusal, after RFC 9457. The facts of the refusal stand beside these members."""

    model_config = Strict.model_config | {"extra": "allow"}

    type: str = Field(description="stable name of the kind of refusal, such as /problems/stale-lease")
    title: str
    status: int
    detail: str = Field(description="what was expected, what came, what to do")
    retryable: bool = Field(description="whether the same request may succeed later")
