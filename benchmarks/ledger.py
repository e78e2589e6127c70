"""What was acknowledged, held against what was merged: nothing lost, nothing twice, no other bytes than undisturbed."""

from __future__ import annotations

from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.undisturbed import Published, published
from benchmarks.victims import ACKNOWLEDGED, Acknowledgement
from protocol.states import JobKind, JobState, RoundState
from protocol.views import JobView, RoundView

Run = Sequence[RoundView]  # all rounds of a run with all their attempts, in order


def acknowledgements(homes: Iterable[Path]) -> list[Acknowledgement]:
    """What the agents wrote down; a line that was cut off by a kill is none."""
    books = [home / ACKNOWLEDGED for home in homes]
    lines = [line for book in books if book.exists() for line in book.read_text("utf-8").splitlines(keepends=True)]
    return [Acknowledgement.model_validate_json(line) for line in lines if line.endswith("\n")]


@dataclass(frozen=True)
class Ledger:
    """The acknowledged results and the rounds that should hold them."""

    acknowledged: Sequence[Acknowledgement]
    runs: Sequence[Run]

    def lost(self) -> list[str]:
        """Jobs whose acknowledged result is in no merged round, and of which nothing says why."""
        views = {job.id: (job, round) for run in self.runs for round in run for job in round.jobs}
        merged = {(entry.job, entry.digest) for run in self.runs for round in run if round.manifest for entry in round.manifest.inputs}
        return sorted({line.job for line in self.acknowledged if not self._accounted_for(line, views, merged)})

    def _accounted_for(self, line: Acknowledgement, views: dict[str, tuple[JobView, RoundView]], merged: set[tuple[str, str]]) -> bool:
        if line.job not in views:
            return False
        job, round = views[line.job]
        if job.kind is JobKind.evaluate:
            return job.state is JobState.accepted
        if job.state is JobState.accepted:
            return (line.job, line.slice) in merged
        return bool(job.state is JobState.rejected and job.reason) or bool(round.state is RoundState.abandoned and round.reason)

    def counted_twice(self) -> list[str]:
        """Jobs that are in the sum of more than one round, or twice in one, and clients that are."""
        inputs = [
            (run, round.number, entry)
            for run in range(len(self.runs))
            for round in self.runs[run]
            if round.manifest
            for entry in round.manifest.inputs
        ]
        jobs = Counter(entry.job for _, _, entry in inputs)
        clients = Counter((run, number, entry.client) for run, number, entry in inputs)
        return [job for job, times in jobs.items() if times > 1] + [client for (_, _, client), times in clients.items() if times > 1]

    def differing(self, expected: Sequence[Published]) -> list[str]:
        """Rounds whose published bytes are not those of the undisturbed run, and rounds that are missing."""
        found: list[str] = []
        for index, run in enumerate(self.runs):
            came = {round.number: published(round) for round in run if round.state is RoundState.published}
            found += [f"run {index} round {number}" for number, digests in enumerate(expected) if came.get(number) != digests]
        return found

    def rounds(self) -> int:
        """Published rounds, without those that only begin a run."""
        return sum(round.state is RoundState.published and round.number > 0 for run in self.runs for round in run)

    def longest_recovery(self, blows: Sequence[float]) -> float:
        """The longest time, in seconds, from the end of a blow to the next acknowledged result."""
        times = sorted(line.at for line in self.acknowledged)
        waits = [times[bisect(times, blow)] - blow for blow in blows if bisect(times, blow) < len(times)]
        return max(waits, default=0.0)
