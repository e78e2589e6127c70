"""The tables of an experiment's results, for a terminal and for a page alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from admin import words
from experiments import tuning
from experiments.experiment import Contestant, Experiment
from experiments.intervals import Interval, difference, interval
from experiments.records import Finished
from experiments.summary import BySeed, Line, better, lines

NONE = "–"


@dataclass(frozen=True)
class Table:
    """A title, a sentence about how to read it, and rows of text below column names."""

    title: str
    reading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table on a page."""
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        body = "\n".join(f"| {' | '.join(row)} |" for row in (self.columns, rule, *self.rows))
        return f"### {self.title}\n\n{self.reading}\n\n{body}\n"


def tables(experiment: Experiment, runs: Sequence[Finished], tuned: Sequence[Finished] = ()) -> list[Table]:
    """All tables. There is at least one run; `tuned` are those with which the contestants were tuned."""
    found = lines(experiment, runs)
    made = [_final(experiment, found), _speed(experiment, found), _rungs(experiment, found), _classes(experiment, found), _costs(found)]
    if experiment.tuning is not None:
        made.append(_tuning(experiment, [experiment.contestant(line.name) for line in found], tuned))
    return [table for table in made if len(table.columns) > 1]  # no target has run yet, perhaps


def _final(experiment: Experiment, found: Sequence[Line]) -> Table:
    metric, reference = experiment.measures.metric, _line(found, experiment.reference)
    rows = []
    for line in found:
        against = difference(line.final(), reference.final()) if reference is not None and line is not reference else None
        rows.append([line.name, str(len(line.runs)), told(line.final()), signed(against), told(line.mean())])
    return Table(
        f"Where it ended: held-out {metric}",
        f"After the last round, at the largest rank that any device runs; mean ± 95 % interval over seeds (Student's t; none from one "
        f"seed). The difference to *{experiment.reference}* is taken seed by seed; it is in bold where its interval leaves out zero. "
        f"{'Smaller' if better(experiment) < 0 else 'Larger'} is better.",
        ["contestant", "seeds", metric, f"against {experiment.reference}", "mean over all rounds"],
        rows,
    )


def _speed(experiment: Experiment, found: Sequence[Line]) -> Table:
    targets = [line for name in experiment.targets if (line := _line(found, name)) is not None]
    columns = [f"{what} to {target.name}" for target in targets for what in ("rounds", "bytes")]
    rows = []
    for line in found:
        row = [line.name]
        for target in targets:
            rounds = line.rounds_to(target.final(), better(experiment))
            size = line.bytes_to(target.final(), better(experiment))
            row += [_reached(rounds, lambda x: f"{x:.1f}"), _reached(size, words.size)]
        rows.append(row)
    return Table(
        "How soon it was where others ended",
        "Rounds, and bytes up and down, until the value was as good as the named contestant's last one with the same seed; between "
        "measured rounds by straight lines. Means over the seeds that came there; in brackets, how many did, where not all.",
        ["contestant", *columns],
        rows,
    )


def _rungs(experiment: Experiment, found: Sequence[Line]) -> Table:
    smallest, ranks = (
        experiment.ranks[0],
        sorted({rank for line in found for run in line.runs.values() for rank in run.rounds[-1].measures}),
    )
    rows = [[line.name, *(told(line.at(rank)) for rank in ranks), told(line.beyond(smallest), words.share)] for line in found]
    return Table(
        "The same adapter, cut to smaller ranks",
        "The last adapter as a device of that rank reads it out; and the share of the last update's energy that lies beyond rank "
        f"{smallest}, the smallest.",
        ["contestant", *(f"rank {rank}" for rank in ranks), f"energy beyond {smallest}"],
        rows,
    )


def _classes(experiment: Experiment, found: Sequence[Line]) -> Table:
    kinds = [kind.name for kind in experiment.classes]
    return Table(
        "Each class of devices",
        "The last adapter as the class holds it, on held-out rows in the proportions of its own rows: at its own rank, or whole where the "
        "strategy hands out all of it.",
        ["contestant", *kinds],
        [[line.name, *(told(line.by_class(kind)) for kind in kinds)] for line in found],
    )


def _costs(found: Sequence[Line]) -> Table:
    rows = []
    for line in found:
        train, merge, overhead = (interval(list(line.seconds(part).values())).mean for part in ("train", "merge", "overhead"))
        traffic = interval(list(line.bytes().values())).mean
        rows.append([line.name, words.size(traffic), words.duration(train), words.duration(merge), words.share(overhead / (train + merge))])
    return Table(
        "What it cost",
        "Means over seeds, of a whole run: bytes up and down; seconds that agents spent in training steps, and the coordinator in merging; "
        "and all other time of the bench beside the two. Seconds were taken on a machine that had other work to do.",
        ["contestant", "bytes", "training", "merging", "other time"],
        rows,
    )


def _tuning(experiment: Experiment, contestants: Sequence[Contestant], tuned: Sequence[Finished]) -> Table:
    assert experiment.tuning is not None, "only an experiment with a tuning has this table"
    rows = []
    for contestant in contestants:
        tried = tuning.trials(experiment, contestant, tuned)
        chosen = tuning.best(experiment, tried)
        values = [NONE if trial.value is None else f"{trial.value:.3f}" if math.isfinite(trial.value) else "failed" for trial in tried]
        rows.append([contestant.name, *(f"**{v}**" if trial is chosen else v for v, trial in zip(values, tried, strict=True))])
    return Table(
        "What each was tuned to",
        f"The last {experiment.measures.metric} of runs of {experiment.tuning.rounds} rounds with seed 0, which no other run has. The "
        "settings that came out best for a contestant, in bold, are its own in all other tables.",
        ["contestant", *(settings(tried) for tried in experiment.tuning.tries)],
        rows,
    )


def _line(found: Sequence[Line], name: str) -> Line | None:
    return next((line for line in found if line.name == name), None)


def told(values: BySeed, form: Callable[[float], str] = "{:.3f}".format) -> str:
    """A mean with its interval."""
    if not values:
        return NONE
    found = interval(list(values.values()))
    return form(found.mean) + ("" if found.half is None else f" ± {form(found.half)}")


def signed(found: Interval | None) -> str:
    """A difference with its interval, in bold where it is one."""
    if found is None:
        return NONE
    text = f"{found.mean:+.3f}".replace("-", "−") + ("" if found.half is None else f" ± {found.half:.3f}")
    return f"**{text}**" if found.apart else text


def _reached(values: Mapping[int, float | None], form: Callable[[float], str]) -> str:
    there = [value for value in values.values() if value is not None]
    if not there:
        return NONE if not values else "never"
    some = "" if len(there) == len(values) else f" ({len(there)} of {len(values)})"
    return form(interval(there).mean) + some


def settings(value: object) -> str:
    """Settings as TOML writes them in a line."""
    match value:
        case bool():
            return str(value).lower()
        case dict():
            return ", ".join(
                f"{key} = {{ {settings(x)} }}" if isinstance(x, dict) else f"{key} = {settings(x)}" for key, x in value.items()
            )
        case list():
            return f"[{', '.join(map(settings, value))}]"
        case str():
            return f'"{value}"'
        case _:
            return str(value)
