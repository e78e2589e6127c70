"""All runs of an experiment, one after the other: what ended before is not done again, what was cut begins anew."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from admin import words
from experiments import course, fleet, material, tuning
from experiments.course import Setup, Told
from experiments.experiment import Contestant, Experiment
from experiments.material import Places
from experiments.records import Results
from protocol import errors


@dataclass
class Pace:
    """How long a round takes, and so how long the rest will take."""

    rounds: int  # that are to be done in all
    done: int = 0
    began: float = field(default_factory=monotonic)

    def remaining(self, rounds: int) -> float | None:
        """Seconds that so many rounds will take; none before the first."""
        return None if not self.done else (monotonic() - self.began) / self.done * rounds

    def left(self) -> str:
        """What is left, in words."""
        seconds = self.remaining(self.rounds - self.done)
        return "" if seconds is None else f"about {words.duration(seconds)} left"


@dataclass(frozen=True)
class Bench:
    """Carries an experiment out."""

    experiment: Experiment
    places: Places
    results: Results
    console: Console
    trying: bool = False  # a run that fails is a result too
    began: float = field(default_factory=monotonic)

    def run(self, contestants: Sequence[Contestant], seeds: Sequence[int]) -> bool:
        """Do what is not done yet, first the tuning, then seed by seed; says whether all is done.

        Every plan is checked before the first run. Raises what plans, models and data are refused for, and Conflict where results
        of other settings, or of another experiment, are in the way.
        """
        self.results.check(self.experiment)
        if self.experiment.tuning is not None:
            short = replace(
                self, experiment=tuning.shorter(self.experiment), results=Results(self.results.folder / tuning.FOLDER), trying=True
            )
            tried = [short.experiment.contestant(name) for contestant in contestants for name in tuning.names(self.experiment, contestant)]
            if not short.run(tried, [0]):
                return False
            contestants = [tuning.frozen(self.experiment, contestant, short.results.all()) for contestant in contestants]
        setups = {seed: self._setup(seed) for seed in seeds}
        waiting = [(setups[seed], contestant) for seed in seeds for contestant in contestants if not self._found(contestant, seed)]
        lengths = [sum(plan.rounds + 1 for _, plan in course.plans(setup, contestant)) for setup, contestant in waiting]
        self.results.describe()
        pace = Pace(sum(lengths))
        with self._following(pace) as told:
            for (setup, contestant), rounds in zip(waiting, lengths, strict=True):
                if self._too_late(pace, rounds):
                    self.console.print("The budget is used up; the same command goes on from here.")
                    return False
                self._carry_out(setup, contestant, told)
                self.console.print(f"{pace.done} of {pace.rounds} rounds done; {pace.left()}")
        return True

    def _found(self, contestant: Contestant, seed: int) -> bool:
        return self.results.find(contestant, seed, self.experiment.digest(contestant)) is not None

    def _setup(self, seed: int) -> Setup:
        part = material.training(self.experiment, self.places, seed)
        held_out = material.held_out(self.experiment, self.places)
        return Setup(self.experiment, self.places, seed, part, held_out, fleet.members(self.experiment, part, seed))

    def _carry_out(self, setup: Setup, contestant: Contestant, told: Told) -> None:
        began = monotonic()
        self.results.keep_partition(setup.members, setup.training, setup.seed)
        try:
            finished = asyncio.run(course.carry_out(setup, contestant, told))
        except (errors.NonFiniteSlice, errors.Conflict) as error:
            if not self.trying:
                raise
            self.results.keep(course.failed(setup, contestant, error.detail))
            self.console.print(f"{contestant.name}, seed {setup.seed}: failed: {error.detail}")
            return
        self.results.keep(finished)
        round, values = finished.values[-1]
        found = f"{words.metrics(values)} after round {round}"
        self.console.print(f"{contestant.name}, seed {setup.seed}: {found}, in {words.duration(monotonic() - began)}")

    def _too_late(self, pace: Pace, rounds: int) -> bool:
        budget, needed = self.experiment.budget_minutes, pace.remaining(rounds)
        return budget is not None and needed is not None and monotonic() - self.began + needed > 60 * budget

    @contextmanager
    def _following(self, pace: Pace) -> Iterator[Told]:
        """Show a bar while runs go on, where somebody looks; every round moves it."""
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[left]}"))
        with Progress(*columns, console=self.console, transient=True) as progress:
            bar = progress.add_task(self.experiment.name, total=pace.rounds, left="")

            def told() -> None:
                pace.done += 1
                progress.update(bar, completed=pace.done, left=pace.left())

            yield told
