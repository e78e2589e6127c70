"""Every refusal of this project, in one tree; the class is the contract, on both sides of the wire.

HLoRAError
├── InvalidRequest            the body or a parameter is not what the route takes
│   ├── InvalidPlan             a plan that could never be carried out
│   ├── InvalidProfile          a profile that contradicts itself, or says too much
│   └── InvalidResult           counts or metrics that cannot be true
├── Unauthenticated           no credential, or one that nobody issued or that was revoked
├── Forbidden                 the credential is good, its role is not
├── NotFound                  no such thing, or none that this credential may see
├── Conflict                  the thing is not in the state that the request needs
│   ├── StaleLease              somebody else holds the job now
│   ├── DifferentResult         the job was already answered, otherwise
│   ├── NameTaken               another client has the name
│   ├── OffsetMismatch          the upload stands at another offset; the fact `offset` says at which
│   └── KeyReused               an idempotency key came with another body
├── Over                      it was there; it has ended
│   ├── EnrolmentOver           the enrolment token is expired, used up or revoked
│   └── JobOver                 the job ended without this client: expired, cancelled, rejected
├── OutdatedAgent             the agent is too old for this coordinator
├── TooLarge                  the body is longer than an honest one can be
├── TruncatedBody             fewer bytes came than were announced
├── StalledBody               no byte came for too long
├── InvalidSlice              a slice that cannot count
│   ├── DigestMismatch          its bytes are not those that were announced
│   ├── MalformedSlice          it is no well-formed safetensors file
│   ├── MismatchedSlice         names, shapes, dtypes, rank or scale are not the job's
│   ├── NonFiniteSlice          it holds NaN or infinity
│   └── ExcessiveChange         its change is larger than the plan allows
├── UnmergeableRound          contributions that no strategy can merge
│   ├── NoContributions         there is nothing to merge
│   └── ZeroWeight              the weights sum to nothing
├── Unavailable               not now; later
│   └── InsufficientStorage     no room for what came; nothing was changed
├── InternalError             a defect of the coordinator; its log has the trace
└── Refusal                   the device says no
    ├── PolicyRefusal           its owner's policy forbids the job
    ├── DataRefusal             the data set or a column is missing, or holds nothing of use
    ├── ModelRefusal            the base model cannot be loaded or is not the plan's
    ├── MemoryRefusal           the job does not fit the device's memory
    └── InsecureTransport       a credential would travel in the clear
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar


class HLoRAError(Exception):
    """Something was refused.

    `detail` is one sentence for a person: what was expected, what came, what to do. The keyword facts are the same for
    a program. The first line of a class's docstring is the title of its problem.
    """

    retryable: ClassVar[bool] = False

    def __init__(self, detail: str = "", **facts: object) -> None:
        super().__init__(detail)
        self.detail = detail or self.title()
        self.facts: Mapping[str, object] = facts

    def __str__(self) -> str:
        return self.detail

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.detail, dict(self.facts))

    @classmethod
    def title(cls) -> str:
        """The class's first docstring line, which is the problem's title."""
        return (cls.__doc__ or cls.__name__).strip().splitlines()[0].rstrip(".")

    @classmethod
    def slug(cls) -> str:
        """The stable name of the problem on the wire: `StaleLease` is `stale-lease`."""
        name = cls.__name__.replace("HLoRA", "Hlora")
        return "".join(f"-{c.lower()}" if c.isupper() else c for c in name).lstrip("-")


def _rebuild(kind: type[HLoRAError], detail: str, facts: dict[str, object]) -> HLoRAError:
    return kind(detail, **facts)


class InvalidRequest(HLoRAError):
    """The request is not what this route takes."""


class InvalidPlan(InvalidRequest):
    """The plan cannot be carried out."""


class InvalidProfile(InvalidRequest):
    """The profile contradicts itself, or says more than a profile may."""


class InvalidResult(InvalidRequest):
    """The result cannot be true."""


class Unauthenticated(HLoRAError):
    """A valid credential is needed."""


class Forbidden(HLoRAError):
    """This credential's role may not do that."""


class NotFound(HLoRAError):
    """There is no such thing, or none that this credential may see."""


class MethodNotAllowed(HLoRAError):
    """The path does not take this method."""


class Conflict(HLoRAError):
    """The state of the thing does not allow that."""


class StaleLease(Conflict):
    """The lease is no longer this client's."""


class DifferentResult(Conflict):
    """The job was already answered with another result."""


class NameTaken(Conflict):
    """Another client has that name."""


class OffsetMismatch(Conflict):
    """The upload stands at another offset."""


class KeyReused(Conflict):
    """The idempotency key was used with another body."""


class Over(HLoRAError):
    """It has ended."""


class EnrolmentOver(Over):
    """The enrolment token is expired, used up or revoked."""


class JobOver(Over):
    """The job has ended without this client's result."""


class OutdatedAgent(HLoRAError):
    """The agent is too old for this coordinator."""


class TooLarge(HLoRAError):
    """The body is longer than an honest one can be."""


class RangeNotSatisfiable(HLoRAError):
    """The byte range lies outside the blob."""


class TruncatedBody(HLoRAError):
    """Fewer bytes came than were announced."""

    retryable = True


class StalledBody(HLoRAError):
    """No byte came for too long."""

    retryable = True


class InvalidSlice(HLoRAError):
    """The slice cannot count."""


class DigestMismatch(InvalidSlice):
    """The bytes are not those that were announced."""

    retryable = True


class MalformedSlice(InvalidSlice):
    """The slice is no well-formed safetensors file."""


class MismatchedSlice(InvalidSlice):
    """The slice is not the one that the job asked for."""


class NonFiniteSlice(InvalidSlice):
    """The slice holds NaN or infinity."""


class ExcessiveChange(InvalidSlice):
    """The slice changes more than the plan allows."""


class UnmergeableRound(HLoRAError):
    """The contributions cannot be merged."""


class NoContributions(UnmergeableRound):
    """There is nothing to merge."""


class ZeroWeight(UnmergeableRound):
    """The weights sum to nothing."""


class Unavailable(HLoRAError):
    """The coordinator cannot answer now."""

    retryable = True


class InsufficientStorage(Unavailable):
    """There is no room for what came; nothing was changed."""


class InternalError(HLoRAError):
    """The coordinator met a defect of its own."""

    retryable = True


class Refusal(HLoRAError):
    """The device refuses the job."""


class PolicyRefusal(Refusal):
    """The device's policy forbids the job."""


class DataRefusal(Refusal):
    """The device's data do not fit the job."""


class ModelRefusal(Refusal):
    """The base model cannot be used."""


class MemoryRefusal(Refusal):
    """The job does not fit the device's memory."""


class InsecureTransport(Refusal):
    """A credential would travel in the clear."""


def every_error(root: type[HLoRAError] = HLoRAError) -> Iterator[type[HLoRAError]]:
    """All classes of the tree, parents first, in the order of their definition."""
    yield root
    for child in root.__subclasses__():
        yield from every_error(child)


def by_slug(slug: str) -> type[HLoRAError]:
    """The class that a problem's slug names; `HLoRAError` itself for a slug from a newer coordinator."""
    return next((kind for kind in every_error() if kind.slug() == slug), HLoRAError)
