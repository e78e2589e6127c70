"""Rank policies: how a client's machine, link, time and data become its rank. The folder is the registry.

A file here is a policy: it holds one class, named after the file, whose fields are the options that a plan may give it and
whose docstring's first line describes it to operators. Packages from outside register such a class as an entry point of the
group `hlora.ranks`. Policies are pure: they know no clock, no database and no other client but by the population.
"""

from __future__ import annotations

import functools
import pkgutil
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points

from pydantic import ValidationError

from coordinator.sizes import held_numbers, layout, start_bytes, strategy, trained_numbers, upload_bytes
from protocol import errors
from protocol.contents import HEADER_SLACK
from protocol.messages import Profile, Usage
from protocol.plan import CausalLM, Plan, Ranks
from protocol.strict import Strict
from protocol.views import Description, RankView

ENTRY_POINTS = "hlora.ranks"
SAFETY = 0.8  # share of the time left that a job is planned to take: estimates err, and loading the model is in none of them


@dataclass(frozen=True)
class Measured:
    """What the client's latest accepted training job of this run cost, and at which rank."""

    rank: int
    usage: Usage
    whole: bool = False  # it started from the whole adapter; says something where the strategy leaves that open


@dataclass(frozen=True)
class Candidate:
    """One client as a policy sees it."""

    name: str
    labels: Mapping[str, str]
    profile: Profile
    measured: Measured | None = None
    previous: int | None = None  # the rank of its last job in this run
    overburdened: bool = False  # such a job started from the whole adapter, and ran out of time or memory


@dataclass(frozen=True)
class Population:
    """What a policy may know of the others: the training rows of all eligible clients, this one's among them."""

    examples: tuple[int, ...]


class Policy(Strict):
    """A rank policy together with its options."""

    def check(self, ladder: Sequence[int]) -> None:
        """Raise InvalidPlan if the options do not go with the plan's ladder."""

    @abstractmethod
    def obstacle(self, plan: Plan, candidate: Candidate, rungs: Sequence[int]) -> str | None:
        """Why the candidate cannot be given any of the rungs, in words for an operator; None if it can.

        `rungs` are those that the device's owner allows, rising, at least one.
        """

    @abstractmethod
    def choose(self, plan: Plan, candidate: Candidate, population: Population, rungs: Sequence[int]) -> RankView:
        """One of the rungs, and why. Called only where there is no obstacle."""

    def burden(self, plan: Plan, candidate: Candidate, rank: int, seconds: float) -> str | None:
        """Why the candidate cannot start from the whole adapter in a job of that rank and time; None if it can.

        Here, if that costs it a step.
        """
        own, whole = (steps_within(plan, candidate, rank, seconds, whole=whole) for whole in (False, True))
        return None if whole >= own else f"the whole adapter would leave time for {whole:,} of {own:,} steps"


def names() -> list[str]:
    """The policies that a plan may name."""
    return sorted({*_inside(), *entry_points(group=ENTRY_POINTS).names})


def _inside() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__)]


@functools.cache  # a conductor asks for every client in every look
def load(name: str) -> type[Policy]:
    """The policy of that name. Raises InvalidPlan if there is none; a name that is not in the registry imports nothing."""
    if name not in names():
        raise errors.InvalidPlan(f"there is no rank policy {name!r}; there are {', '.join(names())}", known=names())
    found: object
    if name in _inside():
        found = getattr(import_module(f"{__name__}.{name}"), name.title().replace("_", ""))
    else:
        found = entry_points(group=ENTRY_POINTS)[name].load()
    assert isinstance(found, type)
    assert issubclass(found, Policy)
    return found


def configured(ranks: Ranks) -> Policy:
    """The plan's policy with its options. Raises InvalidPlan for an unknown name or wrong options."""
    kind = load(ranks.name)
    try:
        policy = kind.model_validate(dict(ranks.options))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(x) for x in first["loc"]) or "options"
        known = ", ".join(kind.model_fields) or "none"
        raise errors.InvalidPlan(f"rank policy {ranks.name!r}, {where}: {first['msg']}; its options are {known}") from None
    policy.check(ranks.ladder)
    return policy


def check(ranks: Ranks) -> None:
    """Raise InvalidPlan unless the policy exists and takes these options and this ladder."""
    configured(ranks)


def describe() -> list[Description]:
    """Every policy with the JSON schema of its options."""
    return [_description(name, load(name)) for name in names()]


def _description(name: str, kind: type[Policy]) -> Description:
    return Description(name=name, summary=(kind.__doc__ or name).splitlines()[0], options=kind.model_json_schema())


def fits(plan: Plan, candidate: Candidate) -> str | None:
    """Why the candidate cannot be given even the smallest rank that the policy would give; None if it can."""
    rungs, most = allowed(plan, candidate.profile), candidate.profile.limits.max_steps
    if not rungs:
        return f"{owner_words(candidate.profile)}, and the plan's smallest rank {plan.ranks.ladder[0]} is more than that"
    if most is not None and (steps := plan.training.steps(examples(plan, candidate))) > most:
        return f"the device's owner allows at most {most:,} steps a job; the plan takes {steps:,} unless training.max_steps says less"
    return configured(plan.ranks).obstacle(plan, candidate, rungs) or _too_slow(plan, candidate, rungs[0])


def _too_slow(plan: Plan, candidate: Candidate, rank: int) -> str | None:
    """Why a job at that rank can never end in time, unless an accepted job of this run has shown that it does."""
    if candidate.measured is not None or steps_within(plan, candidate, rank, plan.times.job):
        return None
    return f"a job has {plan.times.job:g} s; {needs(plan, candidate, rank)}"


def choose(plan: Plan, candidate: Candidate, population: Population) -> RankView:
    """The candidate's rank in the next round, and why. Raises PolicyRefusal where `fits` gives a reason against it."""
    obstacle = fits(plan, candidate)
    if obstacle is not None:
        raise errors.PolicyRefusal(obstacle)
    return configured(plan.ranks).choose(plan, candidate, population, allowed(plan, candidate.profile))


def begin(plan: Plan, candidate: Candidate, view: RankView, seconds: float) -> RankView:
    """The rank that was chosen for a training job of that time, and whether it starts from the whole adapter, if the strategy asks that."""
    if not strategy(plan).portion.optional:
        return view
    why = None if view.rank == plan.global_rank else _burden(plan, candidate, view.rank, seconds)  # a slice at the cap is the whole
    told = "it starts from the whole adapter" if why is None else f"it starts from its slice: {why}"
    return view.model_copy(update={"whole": why is None, "reason": f"{view.reason}; {told}"})


def _burden(plan: Plan, candidate: Candidate, rank: int, seconds: float) -> str | None:
    if candidate.overburdened:
        return "a job that started from the whole adapter ran out of time or memory"
    if not _within_bytes(plan, candidate.profile, rank, whole=True):
        return f"{owner_words(candidate.profile)}, and the whole adapter takes more"
    return configured(plan.ranks).burden(plan, candidate, rank, seconds)


# --- what every policy obeys -------------------------------------------------------------------------------------------


def examples(plan: Plan, candidate: Candidate) -> int:
    """The client's rows to train on."""
    dataset = candidate.profile.datasets.get(plan.data)
    return dataset.train if dataset else 0


def allowed(plan: Plan, profile: Profile) -> list[int]:
    """The rungs of the ladder within the owner's limits on the rank and on a job's bytes (one file down, one up)."""
    largest = profile.limits.largest_rank
    rungs = plan.ranks.ladder if largest is None else [r for r in plan.ranks.ladder if r <= largest]
    return [r for r in rungs if _within_bytes(plan, profile, r)]


def _within_bytes(plan: Plan, profile: Profile, rank: int, *, whole: bool = False) -> bool:
    most = profile.limits.max_bytes
    return most is None or start_bytes(plan, rank, whole=whole) + upload_bytes(plan, rank) + HEADER_SLACK <= most


def owner_words(profile: Profile) -> str:
    """What the device's owner allows, as the beginning of a sentence."""
    largest, most = profile.limits.largest_rank, profile.limits.max_bytes
    parts = [] if largest is None else [f"rank {largest}"]
    parts += [] if most is None else [f"{most:,} bytes a job"]
    return f"the device's owner allows at most {' and '.join(parts)}"


# --- what a job takes of a client's time -------------------------------------------------------------------------------


def steps_within(plan: Plan, candidate: Candidate, rank: int, seconds: float, *, whole: bool = False) -> int:
    """How many of the plan's optimiser steps, with one file down and one up, that time can hold; 0 if not even one.

    One step may fill it; more are given only as they fit its share SAFETY.
    """
    link, step = link_seconds(plan, candidate, rank, whole=whole), step_seconds(plan, candidate, rank, whole=whole)
    wanted, room = plan.training.steps(examples(plan, candidate)), SAFETY * seconds - link
    if link + step > seconds:
        return 0
    if room < step:  # where a client says that its link takes all of the room, and a step next to nothing, the quotient has no end
        return 1
    return wanted if wanted * step <= room else min(wanted, int(room / step))


def needs(plan: Plan, candidate: Candidate, rank: int, *, whole: bool = False) -> str:
    """What the least job takes of the client's time, in words for an operator."""
    step, link = step_seconds(plan, candidate, rank, whole=whole), link_seconds(plan, candidate, rank, whole=whole)
    return f"a single step at rank {rank} takes about {step:.3g} s, and slices {link:.3g} s on the link"


def link_seconds(plan: Plan, candidate: Candidate, rank: int, *, whole: bool = False) -> float:
    """One file down and one up; a direction of unknown speed takes no time."""
    down, up = speeds(candidate)
    return (start_bytes(plan, rank, whole=whole) / down if down else 0.0) + (upload_bytes(plan, rank) / up if up else 0.0)


def speeds(candidate: Candidate) -> tuple[float | None, float | None]:
    """Bytes per second down and up: as the last accepted job reached them, or else as declared; None where neither is known."""
    down, up = candidate.profile.down_bytes_per_second, candidate.profile.up_bytes_per_second
    usage = candidate.measured.usage if candidate.measured else Usage()
    if usage.download_bytes and usage.download_seconds:
        down = usage.download_bytes / usage.download_seconds
    if usage.upload_bytes and usage.upload_seconds:
        up = usage.upload_bytes / usage.upload_seconds
    return down, up


def step_seconds(plan: Plan, candidate: Candidate, rank: int, *, whole: bool = False) -> float:
    """One optimiser step: the measured one times F(rank) / F(its rank), or else F(rank) / training_flops.

    A step of B · accumulate rows of T tokens costs F(r) = B · accumulate · T · (4 P + 4 D(r) + 2 N(r)) operations: the base and
    all that was handed out forward (2) and backward to its inputs (2), what is trained also to its weights (2). D(r) are the
    numbers of what is handed out, N(r) those that are trained; P those of the base, without the embedding table where a
    classifier only looks it up.
    """
    measured = candidate.measured
    if measured is not None and measured.usage.step_seconds:
        return measured.usage.step_seconds * _operations(plan, rank, whole) / _operations(plan, measured.rank, measured.whole)
    return _operations(plan, rank, whole) / candidate.profile.training_flops


def _operations(plan: Plan, rank: int, whole: bool) -> float:
    training, base = plan.training, layout(plan).base
    used = base.parameters if isinstance(plan.task, CausalLM) else max(0, base.parameters - base.vocabulary * base.hidden)
    return (
        training.batch_size
        * training.accumulate
        * plan.task.max_length
        * (4 * used + 4 * held_numbers(plan, rank, whole=whole) + 2 * trained_numbers(plan, rank))
    )
