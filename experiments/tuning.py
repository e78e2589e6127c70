"""Every contestant with settings of its own: tried in short runs, which are an experiment themselves, and then frozen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import JsonValue

from experiments.experiment import Contestant, Experiment, Settings
from experiments.plans import overlaid
from experiments.records import Finished
from experiments.summary import better

FOLDER = "tuning"  # within an experiment's results: those of the short runs


class Trial(NamedTuple):
    """Settings that a contestant tried, and the last value that it came to: none before that run has ended, the worst if it failed."""

    settings: Settings
    value: float | None


def shorter(experiment: Experiment) -> Experiment:
    """The short runs, as an experiment: each contestant as often as there are settings to try. The experiment has a tuning."""
    assert experiment.tuning is not None, "only an experiment with a tuning has short runs"
    rounds = experiment.tuning.rounds
    tries = [
        _trying(contestant, n, settings) for contestant in experiment.contestants for n, settings in enumerate(experiment.tuning.tries)
    ]
    return experiment.model_copy(
        update={
            "name": f"{experiment.name}-tuning",
            "plan": experiment.plan | {"rounds": rounds},
            "measures": experiment.measures.model_copy(update={"every": rounds, "rungs_every": rounds}),
            "tuning": None,
            "contestants": tries,
            "reference": tries[0].name,
            "further_references": [],
            "targets": [],
        }
    )


def names(experiment: Experiment, contestant: Contestant) -> list[str]:
    """What a contestant is called in its short runs, in the order of what it tries."""
    return [_named(contestant, n) for n in range(len(experiment.tuning.tries if experiment.tuning else ()))]


def trials(experiment: Experiment, contestant: Contestant, runs: Sequence[Finished]) -> list[Trial]:
    """What the contestant tried in these short runs."""
    metric = experiment.measures.metric
    worst = -better(experiment) * math.inf
    found = {run.header.contestant: worst if run.header.failed else run.values[-1][1][metric] for run in runs}
    tries = experiment.tuning.tries if experiment.tuning else []
    return [Trial(settings, found.get(_named(contestant, n))) for n, settings in enumerate(tries)]


def best(experiment: Experiment, tried: Sequence[Trial]) -> Trial | None:
    """The settings that came out best, the first of equals; none until all were tried."""
    if not tried or any(trial.value is None for trial in tried):
        return None
    return max(tried, key=lambda trial: better(experiment) * (trial.value or 0.0))


def frozen(experiment: Experiment, contestant: Contestant, runs: Sequence[Finished]) -> Contestant:
    """The contestant with the settings that came out best for it; as it is where nothing was tuned."""
    found = best(experiment, trials(experiment, contestant, runs))
    return contestant if found is None else _with(contestant, found.settings)


def first(experiment: Experiment, contestant: Contestant) -> Contestant:
    """The contestant with the first settings that it tries, while nobody knows which are best; as it is where nothing is tuned."""
    return contestant if experiment.tuning is None else _with(contestant, experiment.tuning.tries[0])


def _named(contestant: Contestant, number: int) -> str:
    return f"{contestant.name} try {number + 1}"


def _trying(contestant: Contestant, number: int, settings: Mapping[str, JsonValue]) -> Contestant:
    return _with(contestant, settings).model_copy(update={"name": _named(contestant, number)})


def _with(contestant: Contestant, settings: Mapping[str, JsonValue]) -> Contestant:
    """As from a file: what was set counts as set, and so for the digest."""
    return Contestant.model_validate(contestant.model_dump(exclude_unset=True) | {"plan": overlaid(contestant.plan, settings)})
