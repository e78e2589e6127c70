"""All runs of an experiment, one after the other: what ended before is not done again, what was cut or failed begins anew."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from admin import words
from experiments import course, material, tuning
from experiments.course import Setup, Told
from experiments.experiment import Contestant, Experiment
from experiments.material import Material, Places
from experiments.records import Results
from protocol import errors

Clock = Callable[[], float]  # seconds


@dataclass
class Pace:
    """How long a round takes, and so how long the rest will take; and since when all of it takes time."""

    clock: Clock
    rounds: int = 0  # that are to be done in all
    done: int = 0

    def __post_init__(self) -> None:
        self.began = self.clock()

    def remaining(self, rounds: int) -> float | None:
        """Seconds that so many rounds will take; none before the first."""
        return None if not self.done else (self.clock() - self.began) / self.done * rounds

    def left(self) -> str:
        """What is left, in words."""
        seconds = self.remaining(self.rounds - self.done)
        return "no estimate yet" if seconds is None else f"about {words.duration(seconds)} left"

    def __str__(self) -> str:
        return f"{self.done} of {self.rounds} rounds done; {self.left()}"


@dataclass(frozen=True)
class Due:
    """A run that is to be done."""

    setup: Setup
    contestant: Contestant
    rounds: int  # those before the first training among them

    @property
    def name(self) -> str:
        """What people call it."""
        return f"{self.contestant.name}, seed {self.setup.seed}"


@dataclass(frozen=True)
class Ended:
    """How the work ended: which runs failed, why, and which the budget left for later."""

    failed: Mapping[str, str] = field(default_factory=dict)  # run → reason
    left: Sequence[Due] = ()

    @property
    def whole(self) -> bool:
        """Whether all is done."""
        return not self.failed and not self.left


@dataclass(frozen=True)
class Bench:
    """Carries an experiment out."""

    experiment: Experiment
    places: Places
    results: Results
    console: Console
    trying: bool = False  # a run that fails is a result too
    clock: Clock = monotonic

    def run(self, contestants: Sequence[Contestant], seeds: Sequence[int]) -> Ended:
        """Do what is not done yet, first the tuning, then seed by seed. A run that fails stops no other.

        Every plan is checked before the first run. Raises what plans, models and data are refused for, and Conflict where results
        of other settings, other rows or another experiment are in the way.
        """
        pace = Pace(self.clock)
        found = material.read(self.experiment, self.places)
        self.results.check(self.experiment, found.digest)
        with self._following(pace) as told:
            if self.experiment.tuning is not None:
                ended = self._tuned(contestants, seeds, found, pace, told)
                if not ended.whole:
                    return ended
                trials = self._short().results.all()
                contestants = [tuning.frozen(self.experiment, contestant, trials) for contestant in contestants]
            due = self._due(found, contestants, seeds, self._found)
            self.results.describe()
            return self._each(due, [], pace, told)

    def _short(self) -> Bench:
        """The bench of the short runs."""
        return replace(self, experiment=tuning.shorter(self.experiment), results=Results(self.results.folder / tuning.FOLDER), trying=True)

    def _tuned(self, contestants: Sequence[Contestant], seeds: Sequence[int], found: Material, pace: Pace, told: Told) -> Ended:
        """Do the short runs. The others, whose settings are not known yet, count as rounds that are still to come."""
        short = self._short()
        short.results.check(short.experiment, found.digest)
        names = [name for contestant in contestants for name in tuning.names(self.experiment, contestant)]
        tried = [short.experiment.contestant(name) for name in names]
        due = short._due(replace(found, experiment=short.experiment), tried, [0], short._found)
        likely = [tuning.first(self.experiment, contestant) for contestant in contestants]
        return short._each(due, self._due(found, likely, seeds, self._there), pace, told)

    def _due(
        self, found: Material, contestants: Sequence[Contestant], seeds: Sequence[int], done: Callable[[Contestant, int], bool]
    ) -> list[Due]:
        """The runs that are not done, every plan of them checked."""
        setups = {seed: Setup.prepared(self.places, found, seed) for seed in seeds}
        waiting = [(setups[seed], contestant) for seed in seeds for contestant in contestants if not done(contestant, seed)]
        lengths = [sum(plan.rounds + 1 for _, plan in course.plans(setup, contestant)) for setup, contestant in waiting]
        return [Due(setup, contestant, rounds) for (setup, contestant), rounds in zip(waiting, lengths, strict=True)]

    def _found(self, contestant: Contestant, seed: int) -> bool:
        return self.results.find(contestant, seed, self.experiment.digest(contestant)) is not None

    def _there(self, contestant: Contestant, seed: int) -> bool:
        return self.results.file(contestant.name, seed).exists()

    def _each(self, due: Sequence[Due], later: Sequence[Due], pace: Pace, told: Told) -> Ended:
        """Do these runs, until the budget is used up; `later` are those that come after them."""
        pace.rounds = pace.done + sum(one.rounds for one in [*due, *later])
        failed: dict[str, str] = {}
        for n, one in enumerate(due):
            if self._too_late(pace, one.rounds):
                return Ended(failed, [*due[n:], *later])
            before = pace.done
            reason = self._carry_out(one, told)
            pace.rounds -= one.rounds - (pace.done - before)  # none of a run that failed come any more
            if reason is not None and not self.trying:
                failed[one.name] = reason
            self.console.print(str(pace))
        return Ended(failed)

    def _carry_out(self, one: Due, told: Told) -> str | None:
        """Do a run and keep what came of it; gives the reason if it failed."""
        began = self.clock()
        self.results.keep_partition(one.setup.members, one.setup.training, one.setup.seed)
        try:
            finished = asyncio.run(course.carry_out(one.setup, one.contestant, told))
        except errors.Refusal:
            raise  # model and rows are the same for all: no other run would go better
        except errors.HLoRAError as error:
            self.console.print(f"{one.name}: failed: {error.detail}")
            if self.trying:
                self.results.keep(course.failed(one.setup, one.contestant, error.detail))
            return error.detail
        self.results.keep(finished)
        round, values = finished.values[-1]
        self.console.print(f"{one.name}: {words.metrics(values)} after round {round}, in {words.duration(self.clock() - began)}")
        return None

    def _too_late(self, pace: Pace, rounds: int) -> bool:
        """Whether the budget is used up, or would be before so many rounds were done, as far as that can be told."""
        budget, needed = self.experiment.budget_minutes, pace.remaining(rounds) or 0.0
        return budget is not None and self.clock() - pace.began + needed > 60 * budget

    @contextmanager
    def _following(self, pace: Pace) -> Iterator[Told]:
        """Show a bar while runs go on, where somebody looks; every round moves it."""
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[left]}"))
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            bar = progress.add_task(self.experiment.name, total=None, left=pace.left())

            def told() -> None:
                pace.done += 1
                progress.update(bar, total=pace.rounds, completed=pace.done, left=pace.left())

            yield told
