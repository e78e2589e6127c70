"""What the bench costs beside what it is there for: the time outside the agents' training steps and the coordinator's merging."""

from __future__ import annotations

import asyncio

from pydantic import BaseModel

from admin import words
from experiments import course, material, records
from experiments.course import Setup
from experiments.experiment import Contestant, Experiment
from experiments.material import Places


class Overhead(BaseModel):
    """Seconds of the first rounds of one run, without the time that measuring takes."""

    contestant: str
    agents: int  # that train in a round
    rounds: int
    jobs: int  # of all rounds
    train: float
    merge: float
    once: float  # of the other time, before the first round: machines enrolled, models and rows read
    other: float
    measure: float  # beside all of these
    machine: dict[str, str]

    @property
    def share(self) -> float:
        """The other time, as a share of training and merging."""
        return self.other / (self.train + self.merge)

    @property
    def job(self) -> float:
        """The other time of one job, beside what is done once."""
        return (self.other - self.once) / self.jobs

    @property
    def steady(self) -> float:
        """The share in a run so long that what is done once counts for nothing."""
        return (self.other - self.once) / (self.train + self.merge)

    def __str__(self) -> str:
        return (
            f"{self.rounds} rounds of {self.agents} agents, {self.contestant}: training {words.duration(self.train)}, merging "
            f"{words.duration(self.merge)}, everything else {words.duration(self.other)}: {words.share(self.share)} of the two. "
            f"Of that {words.duration(self.once)} were before the first round; without them it is {words.share(self.steady)}, "
            f"{1000 * self.job:.0f} ms a job. "
            f"Measuring beside it took {words.duration(self.measure)}."
        )


def timed(experiment: Experiment, contestant: Contestant, places: Places, rounds: int) -> Overhead:
    """Time so many rounds of a contestant. What is made once, before the first round, is counted too.

    Raises what plans, models and data are refused for.
    """
    short = experiment.model_copy(update={"plan": {**experiment.plan, "rounds": rounds}})
    setup = Setup.prepared(places, material.read(short, places), 0)
    finished = asyncio.run(course.carry_out(setup, contestant, lambda: None))
    spent = [round.seconds for round in finished.rounds]
    train, merge = sum(s.train for s in spent), sum(s.merge for s in spent[1:])
    other = max(0.0, sum(s.whole for s in spent) - train - merge)
    return Overhead(
        contestant=contestant.name,
        agents=max(round.contributions for round in finished.rounds),
        rounds=rounds,
        jobs=sum(round.contributions for round in finished.rounds),
        train=train,
        merge=merge,
        once=min(spent[0].whole, other),
        other=other,
        measure=sum(s.measure for s in spent),
        machine=records.machine(),
    )
