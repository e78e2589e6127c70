"""The plan: what one federated fine-tuning shall be. Data, never code.

An operator writes a plan as TOML. Before it can run it is *resolved*: the base model is looked at once and its
fingerprint and layout (names and shapes of what will be adapted) are written into the plan, so that the coordinator
needs no model library and every device can check that it trains what the others train.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping
from enum import StrEnum
from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from protocol.course import Buffer, Cohort, Evaluation, NormBound, Times, Training
from protocol.strict import Digest, Name, Share, Strict

LARGEST_RANK = 4096


class Dtype(StrEnum):
    """How the numbers of a slice travel."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"  # of a trained slice: what was changed, in 255 steps for each direction

    @property
    def size(self) -> int:
        """Bytes per number."""
        return {Dtype.float32: 4, Dtype.int8: 1}.get(self, 2)


Float = Literal[Dtype.float32, Dtype.bfloat16, Dtype.float16]


class Sides(StrEnum):
    """Which factors of its directions a client trains, and sends back."""

    both = "both"
    b = "b"  # a stays as it was handed out


class Model(Strict):
    """The base model, by hub id or by a path that is the same on every device."""

    id: str = Field(
        min_length=1, max_length=512, description="hub id, local folder, or `package:NAME` for weights that a Python package carries"
    )
    revision: str | None = Field(default=None, max_length=128, description="hub revision; pin it")
    fingerprint: Digest | None = Field(default=None, description="digest of configuration and weights; filled when the plan is resolved")


class SequenceClassification(Strict):
    """Give a text, or a pair of texts, one of the labels."""

    kind: Literal["sequence-classification"] = "sequence-classification"
    labels: list[str] = Field(
        min_length=2, max_length=10_000, description="label texts as they stand in the data, in the order of the model's outputs"
    )
    text: str = Field(default="text", min_length=1, description="column of the text")
    text_pair: str | None = Field(default=None, description="column of the second text, for pairs")
    label: str = Field(default="label", min_length=1, description="column of the label")
    max_length: int = Field(default=128, ge=4, le=32_768, description="tokens; longer texts are cut")

    @field_validator("labels", mode="before")
    @classmethod
    def _texts(cls, labels: object) -> object:
        """Numbers and truths as agents read them in rows: true is "true"."""
        return [str(x).lower() if isinstance(x, int) else x for x in labels] if isinstance(labels, list) else labels

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: list[str]) -> list[str]:
        if len(set(labels)) < len(labels):
            raise ValueError("labels must be distinct")
        return labels


class CausalLM(Strict):
    """Continue a text; where there is a prompt column, only what follows the prompt is learned."""

    kind: Literal["causal-lm"] = "causal-lm"
    text: str = Field(default="text", min_length=1, description="column of the text that is learned")
    prompt: str | None = Field(default=None, description="column of the prompt, which is read but not learned")
    max_length: int = Field(default=256, ge=4, le=131_072, description="tokens; longer texts are cut")


Task = Annotated[SequenceClassification | CausalLM, Field(discriminator="kind")]


class Scaling(StrEnum):
    """How a slice's scale follows from alpha and its rank."""

    constant = "constant"
    rank = "rank"
    root = "root"


class Split(StrEnum):
    """Where the singular values go when an adapter U S Vᵀ is cut into b and a."""

    balanced = "balanced"
    left = "left"
    right = "right"


class Head(StrEnum):
    """What becomes of tensors that are no factors: those of a freshly made head."""

    trained = "trained"  # by every client, and averaged
    frozen = "frozen"  # handed out and read out as round 0 has them; nobody sends them back


class Adapter(Strict):
    """What is adapted, and by which conventions."""

    modules: list[str] | Literal["all-linear"] = Field(description="name endings of the linear modules to adapt, or all-linear")
    full: list[str] | None = Field(
        default=None, description="modules kept whole, and not as factors; by default the task's freshly made head"
    )
    head: Head = Field(
        default=Head.trained,
        description="these are trained by all and averaged, or stay frozen at first values: the seed's, or what is continued",
    )
    alpha: float = Field(default=2.0, gt=0, le=1e4, description="what the scale follows from; at least 1e-6")
    scaling: Scaling = Field(default=Scaling.constant, description="scale = alpha (constant), alpha / rank, or alpha / √rank (root)")
    split: Split = Field(default=Split.balanced, description="b = U√S, a = √S Vᵀ (balanced); b = US, a = Vᵀ (left); b = U, a = SVᵀ (right)")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="share of the adapter's inputs that is left out in each step")

    def scale(self, rank: int) -> float:
        """The factor s in `s · b @ a` for a slice of this rank."""
        match self.scaling:
            case Scaling.constant:
                return self.alpha
            case Scaling.rank:
                return self.alpha / rank
            case Scaling.root:
                return self.alpha / math.sqrt(rank)

    def trained(self, layout: Layout) -> Layout:
        """What of a layout clients train and send back."""
        return layout if self.head is Head.trained else layout.factors_alone


class BaseFacts(Strict):
    """Sizes of the base model from which memory and time are estimated."""

    parameters: int = Field(gt=0)
    layers: int = Field(gt=0)
    hidden: int = Field(gt=0)
    vocabulary: int = Field(gt=0)


class Layout(Strict):
    """Names and shapes of all that a slice holds."""

    modules: dict[str, tuple[int, int]] = Field(min_length=1, max_length=20_000, description="adapted module → (n_out, n_in)")
    full: dict[str, tuple[int, ...]] = Field(default={}, max_length=1_000, description="tensor kept whole → shape")
    base: BaseFacts

    @field_validator("modules", "full")
    @classmethod
    def _positive(cls, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        for name, shape in shapes.items():
            if not name or "/" in name or len(name) > 512:
                raise ValueError(f"{name!r} is no tensor name")
            if not shape or any(n < 1 or n > 2**31 for n in shape):
                raise ValueError(f"{name} has the impossible shape {list(shape)}")
        return dict(sorted(shapes.items()))

    def smallest_side(self) -> int:
        """The largest rank that every adapted module can have."""
        return min(min(shape) for shape in self.modules.values())

    def numbers(self, rank: int, sides: Sides = Sides.both) -> int:
        """How many numbers a slice of this rank holds: Σ rank (n_out + n_in), without n_in for b alone, and the full tensors."""
        n_out, n_in, full = self.sums
        return rank * (n_out + (n_in if sides is Sides.both else 0)) + full

    @cached_property
    def factors_alone(self) -> Layout:
        """The same without the full tensors."""
        return Layout(modules=self.modules, base=self.base)

    @cached_property  # a large fleet asks for numbers many times a round
    def sums(self) -> tuple[int, int, int]:
        """Σ n_out and Σ n_in over the modules, and the numbers of the full tensors."""
        outs, ins = zip(*self.modules.values(), strict=True)
        return sum(outs), sum(ins), sum(math.prod(s) for s in self.full.values())


class Choice(Strict):
    """A strategy or a rank policy by name, with its own options."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,63}$", description="one of those that the coordinator has")
    options: Mapping[str, JsonValue] = Field(default={}, description="its own options")


class Ranks(Choice):
    """How each client gets its rank."""

    name: str = Field(default="capacity", pattern=r"^[a-z][a-z0-9_]{0,63}$", description="the rank policy")
    ladder: list[Annotated[int, Field(ge=1, le=LARGEST_RANK)]] = Field(
        min_length=1, max_length=64, description="the ranks that may be given, rising"
    )

    @field_validator("ladder")
    @classmethod
    def _rising(cls, ladder: list[int]) -> list[int]:
        if any(low >= high for low, high in itertools.pairwise(ladder)):
            raise ValueError("the ladder must rise: each rank larger than the one before")
        return ladder


class Plan(Strict):
    """One federated fine-tuning, described."""

    name: Name
    model: Model
    task: Task
    data: str = Field(min_length=1, max_length=128, description="alias of the data set on every device")
    adapter: Adapter
    layout: Layout | None = Field(default=None, description="filled when the plan is resolved")
    training: Training
    strategy: Choice = Choice(name="folded")
    cap: int | None = Field(default=None, ge=1, le=LARGEST_RANK, description="rank of the global adapter; by default the ladder's largest")
    ranks: Ranks
    cohort: Cohort
    rounds: int = Field(ge=1, le=100_000, description="how many are to be published")
    continues: Digest | None = Field(default=None, description="digest of the published adapter that it begins with; by default none")
    times: Times = Times()
    evaluation: Evaluation = Evaluation()
    buffer: Buffer | None = Field(default=None, description="merge as contributions come, instead of in rounds that wait for each other")
    norm: NormBound | None = None
    suspicious: float | None = Field(
        default=None, gt=1, le=1e6, description="set a contribution apart whose change is so many times as large as the round's median"
    )
    largest_share: Share = Field(default=1.0, description="no contribution weighs more than this share of a round")
    wire: Float = Field(default=Dtype.float32, description="how the numbers of slices travel")
    uploads: Dtype | None = Field(default=None, description="how those of trained slices travel; as the others do, if not given")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of draws of clients, fresh directions and heads, and the order of rows")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.evaluation.rank is not None and self.evaluation.rank not in self.ranks.ladder:
            raise ValueError(f"evaluation rank {self.evaluation.rank} is not on the ladder {self.ranks.ladder}")
        if self.cap is not None and self.cap < self.ranks.ladder[-1]:
            raise ValueError(f"the cap {self.cap} is below the ladder's largest rank {self.ranks.ladder[-1]}")
        if self.buffer is not None and self.buffer.size > self.cohort.target:
            raise ValueError(f"a buffer of {self.buffer.size} is never filled by {self.cohort.target} clients at work (cohort.target)")
        if self.layout is not None and self.global_rank > self.layout.smallest_side():
            raise ValueError(f"rank {self.global_rank} is more than the smallest side {self.layout.smallest_side()} of the adapted modules")
        return self

    @property
    def global_rank(self) -> int:
        """The rank at which the coordinator keeps the global adapter."""
        return self.cap or self.ranks.ladder[-1]

    @property
    def upload(self) -> Dtype:
        """How the numbers of trained slices travel."""
        return self.uploads or self.wire

    def learning_rate(self, round: int) -> float:
        """That of a round's jobs, from 1: it falls to `cooling` times the plan's along half a cosine (Loshchilov, Hutter 2017, eq. 5)."""
        passed = min(max(0, round - 1) / max(1, self.rounds - 1), 1.0)
        share = self.training.cooling + (1 - self.training.cooling) * (1 + math.cos(math.pi * passed)) / 2
        return self.training.learning_rate * share

    def digest(self) -> str:
        """The plan's own name: SHA-256 of its canonical JSON."""
        return "sha256:" + hashlib.sha256(self.model_dump_json().encode()).hexdigest()
