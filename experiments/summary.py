"""What runs say, in numbers that can be compared: where they ended, how soon they were where others ended, at what cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from coordinator import aggregation
from coordinator.portions import Portion
from experiments.experiment import Contestant, Experiment
from experiments.plans import overlaid
from experiments.records import ALL, Finished
from protocol.plan import Plan

BySeed = Mapping[int, float]


@dataclass(frozen=True)
class Line:
    """All runs of one contestant, by seed."""

    name: str
    runs: Mapping[int, Finished]
    metric: str
    whole: bool = False  # a device holds all of the adapter, of which it trains its rank, unless its class is said to hold slices alone
    kind: str = "federated"

    def final(self) -> BySeed:
        """The last value of the adapter as the largest devices hold it."""
        return self.last(self.metric)

    def last(self, metric: str) -> BySeed:
        """The same of another metric."""
        return {seed: run.values[-1][1][metric] for seed, run in self.runs.items()}

    def metrics(self) -> list[str]:
        """All that was measured, the experiment's own metric first."""
        found = {name for run in self.runs.values() for name in run.values[-1][1]}
        return sorted(found, key=lambda name: (name != self.metric, name))

    def mean(self) -> BySeed:
        """The mean of that value over all rounds: the area under its curve, by the trapezoid rule, through their number.

        Of runs that were measured so from the beginning.
        """
        return {seed: area(self.curve(run)) for seed, run in self._followed().items()}

    def curve(self, run: Finished) -> list[tuple[int, float]]:
        """The rounds that were measured, and the value after each."""
        return [(round, values[self.metric]) for round, values in run.values]

    def at(self, rank: int) -> BySeed:
        """The last value of the adapter cut to that rank; of runs whose adapter has it. Clients that never meet have no one adapter."""
        if self.kind == "local":
            return {}
        last = {seed: run.rounds[-1].measures for seed, run in self.runs.items()}
        return {seed: measures[rank][ALL][self.metric] for seed, measures in last.items() if rank in measures}

    def beyond(self, rank: int) -> BySeed:
        """The share of the last update's energy that a slice of that rank does not hold."""
        last = {seed: run.rounds[-1].kept for seed, run in self.runs.items()}
        return {seed: 1 - kept[rank] for seed, kept in last.items() if rank in kept}

    def by_class(self, kind: str) -> BySeed:
        """The last value for one class of devices: of what it holds of the adapter, on its own mix of rows."""
        if self.kind != "federated":
            return {}
        found = {}
        for seed, run in self.runs.items():
            last = run.rounds[-1].measures
            whole = self.whole and kind not in run.header.sliced
            at = last.get(run.header.headline if whole else run.header.ranks.get(kind, 0))
            if at is not None and run.header.mixes[kind].keys() <= at.keys():
                found[seed] = sum(share * at[rows][self.metric] for rows, share in run.header.mixes[kind].items())
            elif at is not None:
                found[seed] = at[ALL][self.metric]
        return found

    def _followed(self) -> dict[int, Finished]:
        """The runs that have a curve: files of old hold what lies beyond the ladder's largest rank at the end alone."""
        return {seed: run for seed, run in self.runs.items() if run.values[0][0] == 0}

    def rounds_to(self, target: BySeed, better: int) -> dict[int, float | None]:
        """Rounds until the value is as good as the target's of the same seed; none where it never was."""
        return {seed: reached(self.curve(run), target[seed], better) for seed, run in self._followed().items() if seed in target}

    def bytes_to(self, target: BySeed, better: int) -> dict[int, float | None]:
        """Bytes up and down until then; nothing, where nothing travels."""
        rounds = self.rounds_to(target, better) if self.kind == "federated" else {}
        return {seed: None if n is None else _bytes(self.runs[seed], n) for seed, n in rounds.items()}

    def bytes(self) -> BySeed:
        """Bytes up and down in all; nothing, where nothing travels: agents of a federation of one speak with no other machine."""
        return {seed: _bytes(run, len(run.rounds) - 1) for seed, run in self.runs.items()} if self.kind == "federated" else {}

    def seconds(self, part: str) -> BySeed:
        """Seconds of one part of the work, of all rounds together."""
        return {seed: sum(getattr(round.seconds, part) for round in run.rounds) for seed, run in self.runs.items()}


def lines(experiment: Experiment, runs: Sequence[Finished]) -> list[Line]:
    """The contestants that have runs, in the experiment's order."""
    own = {c.name: {run.header.seed: run for run in runs if run.header.contestant == c.name} for c in experiment.contestants}
    metric = experiment.measures.metric
    return [Line(c.name, own[c.name], metric, _holds_all(experiment, c), c.kind) for c in experiment.contestants if own[c.name]]


def _holds_all(experiment: Experiment, contestant: Contestant) -> bool:
    chosen = overlaid(experiment.plan, contestant.plan).get("strategy")
    name = chosen["name"] if isinstance(chosen, dict) else Plan.model_fields["strategy"].default.name
    return aggregation.load(str(name)).portion is not Portion.leading


def better(experiment: Experiment) -> int:
    """1 where a larger value is better, −1 where a smaller one is."""
    return -1 if experiment.measures.metric == "loss" else 1


def shares(ours: Mapping[int, float | None], own: Mapping[int, float | None]) -> dict[int, float | None]:
    """What it took us as a share of what it took the target itself, seed by seed; none where we never were there.

    Nothing at all if it took the target nothing, as it was there before the first round: that measures nobody.
    """
    took = {seed: x for seed, x in own.items() if x}
    return {seed: None if x is None else x / took[seed] for seed, x in ours.items()} if took and len(took) == len(own) else {}


def computed(runs: Sequence[Finished]) -> dict[str, float]:
    """Seconds of computing by part: training, merging, measuring and whatever the bench did beside these."""
    rounds = [round.seconds for run in runs for round in run.rounds]
    return {name: sum(getattr(seconds, name) for seconds in rounds) for name in ("train", "merge", "measure", "overhead")}


def area(curve: Sequence[tuple[int, float]]) -> float:
    """The mean height of a curve of straight pieces."""
    if len(curve) == 1:
        return curve[0][1]
    return sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairwise(curve)) / (curve[-1][0] - curve[0][0])


def reached(curve: Sequence[tuple[int, float]], target: float, better: int) -> float | None:
    """Where a curve of straight pieces first is as good as the target; none if it never is."""
    if better * (curve[0][1] - target) >= 0:
        return float(curve[0][0])
    for (x0, y0), (x1, y1) in pairwise(curve):
        if better * (y1 - target) >= 0:
            return x0 + (x1 - x0) * (target - y0) / (y1 - y0)
    return None


def _bytes(run: Finished, rounds: float) -> float:
    """Bytes of the first so many rounds, a part of a round for its part."""
    sums = [0.0, *accumulate(round.bytes_up + round.bytes_down for round in run.rounds[1:])]
    whole = min(int(rounds), len(sums) - 1)
    part = rounds - whole
    return sums[whole] + (part * (sums[whole + 1] - sums[whole]) if part and whole + 1 < len(sums) else 0.0)
