"""The tables of an experiment's results, for a terminal and for a page alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from admin import words
from experiments import tuning
from experiments.cells import NONE, arrived, complete, settings, signed, told
from experiments.experiment import Contestant, Experiment
from experiments.intervals import difference, interval, standing
from experiments.records import Finished
from experiments.summary import BySeed, Line, better, lines, shares

FEWEST = 3  # measured rounds, beside the untrained adapter, from which on a mean over all rounds says something
STANDS = " †"  # behind a difference that stands among all of its table
BY_CHANCE = 20  # one in so many 95 % intervals leaves out zero where nothing differs


@dataclass(frozen=True)
class Table:
    """A title, a sentence about how to read it, rows of text below column names, and what is to be said of them all."""

    title: str
    reading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        """The table on a page."""
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        body = "\n".join(f"| {' | '.join(row)} |" for row in (self.columns, rule, *self.rows))
        return f"### {self.title}\n\n{self.reading}\n\n{body}\n" + (f"\n{self.note}\n" if self.note else "")


def tables(experiment: Experiment, runs: Sequence[Finished], tuned: Sequence[Finished] = ()) -> list[Table]:
    """All tables that say something. There is at least one run; `tuned` are those with which the contestants were tuned."""
    found = lines(experiment, runs)
    targets = [line for name in experiment.targets if (line := _line(found, name)) is not None]
    made = [_ends(experiment, found)]
    if len(found) > 1:
        made.append(_apart(experiment, found))
    if len(found) > 1 and _followed(found):
        made.append(_ahead(experiment, found))
    made += [*(_soon(experiment, found, target) for target in targets), _rungs(experiment, found)]
    if experiment.partition.kind not in ("iid", "quantity") or any(line.whole for line in found):
        made.append(_classes(experiment, found))  # otherwise classes have the same mix, and it would say what the rungs say
        made.append(_gains(experiment, found))
    made.append(_costs(found))
    if experiment.tuning is not None:
        made.append(_tuning(experiment, [experiment.contestant(line.name) for line in found], tuned))
    return [table for table in made if len(table.columns) > 1]  # no reference has run yet, perhaps


def _ends(experiment: Experiment, found: Sequence[Line]) -> Table:
    metrics = found[0].metrics()
    curve = _followed(found)
    guess = "" if experiment.majority is None else f" Whoever always says the commonest label is right in {experiment.majority:.3f}."
    area = (
        f" The {metrics[0]}'s mean over all rounds is the height of its curve, by straight lines between measured rounds." if curve else ""
    )
    rows = [
        [line.name, str(len(line.runs)), *(told(line.last(metric)) for metric in metrics), *([told(line.mean())] if curve else [])]
        for line in found
    ]
    return Table(
        "Where it ended",
        f"Held-out {_listed(metrics)} after the last round, as the largest devices hold the adapter; mean ± 95 % interval over seeds "
        f"(Student's t; none from one seed). {'Smaller' if better(experiment) < 0 else 'Larger'} {metrics[0]} is better.{guess}{area}",
        ["contestant", "seeds", *metrics, *(["mean over all rounds"] if curve else [])],
        rows,
    )


def _apart(experiment: Experiment, found: Sequence[Line]) -> Table:
    return _differences(
        "How far they ended apart",
        f"A row's last {experiment.measures.metric} less that of the column's contestant, seed by seed; in bold where the interval leaves "
        "out zero.",
        experiment,
        found,
        Line.final,
    )


def _ahead(experiment: Experiment, found: Sequence[Line]) -> Table:
    return _differences(
        "How far apart they were on the way",
        f"The same of the {experiment.measures.metric}'s mean over all rounds: who learns sooner, and not only who ends where.",
        experiment,
        found,
        Line.mean,
    )


def _differences(title: str, reading: str, experiment: Experiment, found: Sequence[Line], value: Callable[[Line], BySeed]) -> Table:
    """Every contestant against every reference, seed by seed, with what of so many differences would be one by chance."""
    references = [line for name in experiment.references if (line := _line(found, name)) is not None]
    against = {(a.name, b.name): None if a is b else difference(value(a), value(b)) for a in found for b in references}
    pairs = {frozenset(pair): x for pair, x in against.items() if x is not None and x.half is not None}  # each of two references once
    apart, stand = sum(x.apart for x in pairs.values()), standing(pairs)

    def cell(a: Line, b: Line) -> str:
        return signed(against[a.name, b.name]) + (STANDS if frozenset((a.name, b.name)) in stand else "")

    note = (
        f"{_counted(len(pairs), 'difference')} in this table, those between two of its columns counted once; the intervals of {apart} "
        f"leave out zero. If nothing differed, one in {BY_CHANCE} would do so by chance, of so many about {len(pairs) / BY_CHANCE:.1f}. "
        f"Corrected for how many there are (Holm's procedure, 5 %), {len(stand)} of them stand"
        f"{', marked †' if stand else ''}."
    )
    return Table(
        title,
        reading,
        ["contestant", *(f"against {line.name}" for line in references)],
        [[line.name, *(cell(line, other) for other in references)] for line in found],
        note if pairs else "",
    )


def _soon(experiment: Experiment, found: Sequence[Line], target: Line) -> Table:
    end, sign = target.final(), better(experiment)
    own_rounds, own_bytes = target.rounds_to(end, sign), target.bytes_to(end, sign)
    rows = []
    for line in found:
        rounds, size = line.rounds_to(end, sign), line.bytes_to(end, sign)
        of_rounds, of_bytes = (told(complete(shares(x, own)), "{:.2f}".format) for x, own in ((rounds, own_rounds), (size, own_bytes)))
        rows.append([line.name, arrived(rounds, "{:.1f}".format), of_rounds, arrived(size, words.size), of_bytes])
    return Table(
        f"How soon it was where {target.name} ended",
        f"Rounds until the {experiment.measures.metric} first was as good as the last one of *{target.name}* with the same seed, by "
        "straight lines between measured rounds, and bytes up and down until then. The shares are of what it took that contestant itself "
        "to be as good for the first time, seed by seed. Numbers stand only where every seed came so far.",
        ["contestant", "rounds", "share of its rounds", "bytes", "share of its bytes"],
        rows,
    )


def _rungs(experiment: Experiment, found: Sequence[Line]) -> Table:
    smallest = experiment.ranks[0]
    ranks = sorted({rank for line in found for run in line.runs.values() for rank in run.rounds[-1].measures})
    rows = [[line.name, *(told(line.at(rank)) for rank in ranks), told(line.beyond(smallest), words.share)] for line in found]
    return Table(
        "The same adapter, cut to smaller ranks",
        f"The {experiment.measures.metric} of the last adapter as a device of that rank reads it out; and the share of the last update's "
        f"energy that lies beyond rank {smallest}, the smallest.",
        ["contestant", *(f"rank {rank}" for rank in ranks), f"energy beyond {smallest}"],
        rows,
    )


def _classes(experiment: Experiment, found: Sequence[Line]) -> Table:
    kinds = [kind.name for kind in experiment.classes]
    return Table(
        "Each class of devices",
        f"The {experiment.measures.metric} of the last adapter as the class holds it: at its own rank, or whole where the strategy hands "
        "out all of it and most of its devices carry that. No device has held-out rows of its own: these are the ones that all share, "
        f"weighted by the class's average mix of {experiment.partition.over}s.",
        ["contestant", *kinds],
        [[line.name, *(told(line.by_class(kind)) for kind in kinds)] for line in found],
    )


def _gains(experiment: Experiment, found: Sequence[Line]) -> Table:
    """What each class has of a contestant more, or less, than of the reference."""
    kinds, reference = [kind.name for kind in experiment.classes], _line(found, experiment.reference)
    own = {} if reference is None else {kind: reference.by_class(kind) for kind in kinds}
    rows = [
        [line.name, *(signed(difference(line.by_class(kind), values)) for kind, values in own.items())]
        for line in found
        if line is not reference
    ]
    return Table(
        f"What each class gains over {experiment.reference}",
        f"The same less what the class has of *{experiment.reference}*, seed by seed; in bold where the interval leaves out zero. "
        f"{'Below' if better(experiment) < 0 else 'Above'} zero the class gains.",
        ["contestant", *own],
        rows,
    )


def _costs(found: Sequence[Line]) -> Table:
    rows = []
    for line in found:
        train, merge, overhead = (interval(list(line.seconds(part).values())).mean for part in ("train", "merge", "overhead"))
        traffic = arrived(line.bytes(), words.size)
        rows.append([line.name, traffic, words.duration(train), words.duration(merge), words.share(overhead / (train + merge))])
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


def _followed(found: Sequence[Line]) -> bool:
    """Whether the way to the end was measured often enough to speak of it."""
    return any(len(run.values) > FEWEST for line in found for run in line.runs.values())


def _line(found: Sequence[Line], name: str) -> Line | None:
    return next((line for line in found if line.name == name), None)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _counted(count: int, what: str) -> str:
    return f"There is {count} {what}" if count == 1 else f"There are {count} {what}s"
