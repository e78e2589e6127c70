"""An experiment's numbers for scripts: what the tables say, unrounded, and the values of every seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments import intervals
from experiments.experiment import Experiment
from experiments.records import Finished, Record
from experiments.summary import BySeed, Line, better, lines, shares


class Estimate(Record):
    """A mean over seeds with half of its 95 % interval (none from one seed), and what it is the mean of."""

    mean: float
    half: float | None
    by_seed: dict[int, float]


class Reach(Record):
    """How soon a run was where another ended: rounds and bytes by seed, none for a seed that never was; no bytes where nothing travels."""

    rounds: dict[int, float | None]
    bytes: dict[int, float | None]
    share_of_rounds: dict[int, float | None]  # of what it took that other contestant to be there first
    share_of_bytes: dict[int, float | None]


class Figures(Record):
    """One contestant."""

    contestant: str
    final: Estimate  # the metric after the last round, of the adapter as the largest devices hold it
    last: dict[str, Estimate]  # all metrics then
    difference: Estimate | None  # to the reference, seed by seed; none for itself, and without a common seed
    differences: dict[str, Estimate]  # to the further references
    mean: Estimate | None  # of the metric over all rounds; none where it was not followed from the beginning
    targets: dict[str, Reach]
    ranks: dict[int, Estimate]  # the last adapter cut to that rank
    classes: dict[str, Estimate]  # the last adapter as a class of devices holds it
    beyond: Estimate | None  # share of the last update's energy beyond the smallest rank
    bytes: Estimate | None  # up and down; none where nothing travels
    seconds: dict[str, float]  # train, merge, overhead: of a whole run


class Report(Record):
    """All contestants of an experiment that have runs, in its order; none where the budget went into tuning."""

    experiment: str
    question: str
    answer: str | None
    metric: str
    better: str  # smaller, or larger
    reference: str
    contestants: list[Figures]


def report(experiment: Experiment, runs: Sequence[Finished]) -> Report:
    """The figures of these runs."""
    found = {line.name: line for line in lines(experiment, runs)}
    return Report(
        experiment=experiment.name,
        question=experiment.question,
        answer=experiment.answer,
        metric=experiment.measures.metric,
        better="smaller" if better(experiment) < 0 else "larger",
        reference=experiment.reference,
        contestants=[_figures(experiment, line, found) for line in found.values()],
    )


def _figures(experiment: Experiment, line: Line, found: Mapping[str, Line]) -> Figures:
    ranks = sorted({rank for run in line.runs.values() for rank in run.rounds[-1].measures})
    others = {name: found[name] for name in experiment.references if name in found and name != line.name}
    apart = {name: _estimate(x) for name, other in others.items() if (x := intervals.paired(line.final(), other.final()))}
    classes = {kind.name: line.by_class(kind.name) for kind in experiment.classes}
    beyond = line.beyond(experiment.ranks[0])
    return Figures(
        contestant=line.name,
        final=_estimate(line.final()),
        last={metric: _estimate(line.last(metric)) for metric in line.metrics()},
        difference=apart.get(experiment.reference),
        differences={name: apart[name] for name in experiment.further_references if name in apart},
        mean=_estimate(mean) if (mean := line.mean()) else None,
        targets={name: _reach(line, found[name], better(experiment)) for name in experiment.targets if name in found},
        ranks={rank: _estimate(values) for rank in ranks if (values := line.at(rank))},
        classes={name: _estimate(values) for name, values in classes.items() if values},
        beyond=_estimate(beyond) if beyond else None,
        bytes=_estimate(traffic) if (traffic := line.bytes()) else None,
        seconds={part: _estimate(line.seconds(part)).mean for part in ("train", "merge", "overhead")},
    )


def _estimate(values: BySeed) -> Estimate:
    found = intervals.interval(list(values.values()))
    return Estimate(mean=found.mean, half=found.half, by_seed=dict(values))


def _reach(line: Line, target: Line, sign: int) -> Reach:
    end = target.final()
    rounds, size = line.rounds_to(end, sign), line.bytes_to(end, sign)
    return Reach(
        rounds=rounds,
        bytes=size,
        share_of_rounds=shares(rounds, target.rounds_to(end, sign)),
        share_of_bytes=shares(size, target.bytes_to(end, sign)),
    )
