"""One contestant's run with one seed: its federations carried out, and each published round measured."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Self

from coordinator import aggregation
from coordinator.portions import Portion
from experiments import fleet, records
from experiments.experiment import Contestant, Experiment
from experiments.fleet import Member, Stopwatch
from experiments.material import Material, Part, Places
from experiments.measuring import Measurer, Values
from experiments.plans import plan as plan_of
from experiments.records import Finished, Header, RoundRecord, Seconds, rounded
from modelling.layout import resolve
from protocol import errors
from protocol.plan import Plan
from protocol.states import JobKind, JobState, RunState
from protocol.views import JobView, RoundView
from simulation.federation import Federation, federation

EXECUTOR = "threads://1"  # what a run costs shall not depend on how many cores are free
LOST = (JobState.expired, JobState.released, JobState.rejected, JobState.cancelled)
Told = Callable[[], None]


@dataclass(frozen=True)
class Setup:
    """What all contestants of one seed have in common."""

    experiment: Experiment
    places: Places
    seed: int
    training: Part
    held_out: Part
    data: str  # the digest of the rows that they come of
    commit: str | None  # of the code, before it began to compute
    members: Sequence[Member]

    @classmethod
    def prepared(cls, places: Places, material: Material, seed: int) -> Self:
        """Share the material's rows out with that seed. Raises DataRefusal where there are too few."""
        part, experiment = material.training(seed), material.experiment
        members = fleet.members(experiment, part, seed)
        return cls(experiment, places, seed, part, material.held_out, material.digest, records.commit(), members)


def plans(setup: Setup, contestant: Contestant) -> list[tuple[list[Member], Plan]]:
    """The contestant's federations, each with its plan. Raises InvalidPlan."""
    model = setup.places.model(setup.experiment)
    teams = fleet.teams(contestant, setup.members)
    return [(team, plan_of(setup.experiment, contestant, model, team, setup.seed)) for team in teams]


async def carry_out(setup: Setup, contestant: Contestant, told: Told) -> Finished:
    """Carry out the contestant's federations, one after the other; `told` hears of every round.

    Raises Conflict with the reason if a run does not go on, and whatever plan, model or data are refused for.
    """
    courses = []
    for team, plan in plans(setup, contestant):
        with tempfile.TemporaryDirectory(prefix="hlora-") as folder:
            resolved = resolve(plan)
            course = _Course(setup, team, resolved, Path(folder))
            rounds = []
            async for record in course.rounds():
                told()
                rounds.append(record)
        courses.append(rounds)
    rounds = [_together(round, _headline(resolved)) for round in zip(*courses, strict=True)]
    return Finished(_header(setup, contestant, resolved, rounds), rounds)


def failed(setup: Setup, contestant: Contestant, reason: str) -> Finished:
    """A run that came to nothing, with its reason."""
    _, plan = plans(setup, contestant)[-1]
    return Finished(_header(setup, contestant, resolve(plan), []).model_copy(update={"failed": reason}), [])


class _Course:
    """One federation, from its first round to its last."""

    def __init__(self, setup: Setup, team: Sequence[Member], plan: Plan, folder: Path) -> None:
        self._began = perf_counter()
        self._setup, self._plan = setup, plan
        self._measures = setup.experiment.measures
        self._measurer = Measurer.prepared(plan, setup.held_out, self._measures.batch_size)
        self._stopwatch = Stopwatch()
        self._folder = folder
        rows = folder / "rows"
        rows.mkdir()
        self._devices = fleet.devices(team, setup.training, rows, setup.seed, setup.experiment.disturbances, self._stopwatch)

    async def rounds(self) -> AsyncIterator[RoundRecord]:
        """Each round once it is published."""
        async with federation(self._devices, self._folder, executor=EXECUTOR) as found:
            told, trained, began = -1, 0.0, self._began
            async for run in found.run(self._plan):
                for number in range(told + 1, run.round + 1):
                    view = await found.round(run.id, number)
                    passed = perf_counter() - began
                    yield await self._record(found, run.id, view, passed, self._stopwatch.seconds - trained)
                    told, trained, began = number, self._stopwatch.seconds, perf_counter()
                if run.state not in (RunState.running, RunState.finished):
                    raise errors.Conflict(f"{self._plan.name} is {run.state}: {run.reason}")

    async def _record(self, found: Federation, run: str, view: RoundView, whole: float, train: float) -> RoundRecord:
        began = perf_counter()
        measures = {rank: self._measurer.measure(await found.tensors(run, view.number, rank), rank) for rank in self._ranks(view.number)}
        jobs = [job for job in view.jobs if job.kind is JobKind.train]
        seconds = Seconds(
            whole=rounded(whole), train=rounded(train), merge=view.merge_seconds or 0.0, measure=rounded(perf_counter() - began)
        )
        return RoundRecord(
            round=view.number,
            contributions=view.contributions,
            lost=sum(job.state in LOST for job in jobs),
            ranks=view.ranks,
            bytes_up=view.bytes_up,
            bytes_down=view.bytes_down,
            kept={rank: rounded(share) for rank, share in view.kept_energy.items()},
            measures={rank: {kind: _brief(values) for kind, values in kinds.items()} for rank, kinds in measures.items()},
            seconds=seconds,
            drawn={job.client_name: job.rank.rank for job in sorted(jobs, key=_named)},
            sliced=[job.client_name for job in sorted(jobs, key=_named) if job.rank.whole is False],
            steps={job.client_name: job.usage.steps for job in sorted(jobs, key=_named) if job.state is JobState.accepted and job.usage},
        )

    def _ranks(self, number: int) -> list[int]:
        """The ranks at which a round is measured; before the first round they are all one."""
        if number == self._plan.rounds or (number and number % self._measures.rungs_every == 0):
            rungs = {*self._setup.experiment.ranks, *self._plan.ranks.ladder, self._plan.global_rank}
            return sorted(rank for rank in rungs if rank <= self._plan.global_rank)
        return [] if number % self._measures.every else [_headline(self._plan)]


def _headline(plan: Plan) -> int:
    """The rank of the adapter as the largest devices hold it: all of it, where the strategy hands out all of it."""
    return plan.ranks.ladder[-1] if aggregation.load(plan.strategy.name).portion is Portion.leading else plan.global_rank


def _named(job: JobView) -> str:
    return job.client_name


def _brief(values: Values) -> Values:
    return {name: rounded(value) for name, value in values.items()}


def _header(setup: Setup, contestant: Contestant, plan: Plan, rounds: Sequence[RoundRecord]) -> Header:
    named = plan.model_copy(update={"model": plan.model.model_copy(update={"id": setup.experiment.model})})
    assert plan.model.fingerprint is not None, "a resolved plan has its model's fingerprint"
    return Header(
        experiment=setup.experiment.name,
        contestant=contestant.name,
        seed=setup.seed,
        settings=setup.experiment.digest(contestant),
        plan=named.digest(),
        model=plan.model.fingerprint,
        ranks=_by_class(setup, contestant, rounds),
        mixes={name: _brief(mix) for name, mix in fleet.mixes(setup.members, setup.training).items()},
        headline=_headline(plan),
        sliced=_sliced(setup, rounds) if contestant.kind == "federated" else [],
        software=records.software(),
        machine=records.machine(),
        rounds=plan.rounds,
        data=setup.data,
        commit=setup.commit,
    )


def _by_class(setup: Setup, contestant: Contestant, rounds: Sequence[RoundRecord]) -> dict[str, int]:
    """Each class's rank; where a policy of the plan's own gives ranks, that of most of the class's jobs, the smaller of equals."""
    if contestant.kind != "federated":
        return {}
    if "ranks" not in {*setup.experiment.plan, *contestant.plan}:
        return {kind.name: contestant.rank or kind.rank for kind in setup.experiment.classes}
    given: dict[str, Counter[int]] = {kind.name: Counter() for kind in setup.experiment.classes}
    kinds = {member.name: member.kind.name for member in setup.members}
    for name, rank in (pair for round in rounds for pair in round.drawn.items()):
        given[kinds[name]][rank] += 1
    return {kind: min(counts, key=lambda rank: (-counts[rank], rank)) for kind, counts in given.items() if counts}


def _sliced(setup: Setup, rounds: Sequence[RoundRecord]) -> list[str]:
    """The classes of which most jobs started from a slice because the whole adapter was too much."""
    kinds = {member.name: member.kind.name for member in setup.members}
    jobs = Counter(kinds[name] for round in rounds for name in round.drawn)
    sliced = Counter(kinds[name] for round in rounds for name in round.sliced)
    return sorted(kind for kind, count in sliced.items() if 2 * count > jobs[kind])


def _together(rounds: Sequence[RoundRecord], headline: int) -> RoundRecord:
    """The same round of federations that never meet: measures as means, each at its own rank; counts and seconds as sums."""
    if len(rounds) == 1:
        return rounds[0]
    measured = [round.measures[max(round.measures)] for round in rounds if round.measures]  # each at its own rank
    return RoundRecord(
        round=rounds[0].round,
        contributions=sum(round.contributions for round in rounds),
        lost=sum(round.lost for round in rounds),
        ranks={},
        bytes_up=sum(round.bytes_up for round in rounds),
        bytes_down=sum(round.bytes_down for round in rounds),
        kept={},
        measures={headline: _means(measured)} if measured else {},
        seconds=Seconds(**{name: rounded(sum(getattr(r.seconds, name) for r in rounds)) for name in Seconds.model_fields}),
        drawn={name: rank for round in rounds for name, rank in round.drawn.items()},
        sliced=[name for round in rounds for name in round.sliced],
        steps={name: steps for round in rounds for name, steps in round.steps.items()},
    )


def _means(measures: Sequence[dict[str, Values]]) -> dict[str, Values]:
    return {
        kind: {name: rounded(sum(m[kind][name] for m in measures) / len(measures)) for name in values}
        for kind, values in measures[0].items()
    }
