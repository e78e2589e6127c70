"""What changes in a run, seen by looking at it again and again; pure but for the looks themselves.

Looking is enough: whatever happened between two looks is in the second one, also after the connection was lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from admin.client import Client
from protocol import errors
from protocol.states import JobKind, JobState, RoundState, RunState
from protocol.strict import Strict
from protocol.views import JobView, RoundSummary, RoundView, RunDetail, RunView

LIVE = (JobState.queued, JobState.leased)
PACE = 5  # published rounds from which the time of the next ones is estimated


@dataclass(frozen=True)
class Snapshot:
    """A run as one look found it."""

    run: RunDetail
    rounds: Mapping[tuple[int, int], RoundSummary] = field(default_factory=dict)  # by number and attempt
    jobs: Mapping[str, tuple[int, JobView]] = field(default_factory=dict)  # id → number of its round, job

    def latest(self) -> RoundSummary | None:
        """The newest round's newest attempt."""
        return self.rounds[max(self.rounds)] if self.rounds else None

    def remaining_seconds(self) -> float | None:
        """An estimate of the time to the last round, from the last published ones; None until there are two."""
        ends = sorted(r.ended_at for r in self.rounds.values() if r.state is RoundState.published and r.ended_at)[-PACE - 1 :]
        if len(ends) < 2:
            return None
        return (ends[-1] - ends[0]).total_seconds() / (len(ends) - 1) * (self.run.rounds - self.run.round)


def settled(now: Snapshot) -> Snapshot:
    """The same without the newest round's measures while evaluations of it are still to come, each of which changes them."""
    number = now.run.round
    awaited = any(n == number and job.kind is JobKind.evaluate and job.state in LIVE for n, job in now.jobs.values())
    if now.run.state is not RunState.running or not awaited:
        return now
    unmeasured: dict[str, object] = {"metrics": {}}
    rounds = {key: found.model_copy(update=unmeasured) if key[0] == number else found for key, found in now.rounds.items()}
    return Snapshot(now.run.model_copy(update=unmeasured), rounds, now.jobs)


class Change(Strict):
    """One thing that is not as it was."""

    kind: Literal["run", "round", "job", "progress"]
    round: int | None = None
    run: RunView | None = None
    summary: RoundSummary | None = None
    job: JobView | None = None


def look(client: Client, run_id: str, before: Snapshot | None) -> Snapshot:
    """The run as it is now. Rounds in which nothing can change any more are not asked for again."""
    run = client.run(run_id)
    if before is None:
        rounds = {(found.number, found.attempt): found for found in client.rounds(run_id)}
        wanted = {run.round, run.round + 1}
        jobs: dict[str, tuple[int, JobView]] = {}
    else:
        rounds, jobs = dict(before.rounds), dict(before.jobs)
        wanted = {*range(before.run.round, run.round + 2), *(number for number, job in jobs.values() if job.state in LIVE)}
    for number in sorted(wanted):
        for view in _attempts(client, run_id, number, max((a for n, a in rounds if n == number), default=None)):
            rounds[number, view.attempt] = view
            jobs.update({job.id: (number, job) for job in view.jobs})
    return Snapshot(run, rounds, jobs)


def _attempts(client: Client, run_id: str, number: int, known: int | None) -> Iterator[RoundView]:
    """The round's attempts from the one last known; a round that was never opened has none."""
    try:
        latest = client.round(run_id, number)
    except errors.NotFound:
        return
    for attempt in range(known or latest.attempt, latest.attempt):
        yield client.round(run_id, number, attempt)
    yield latest


def changes(before: Snapshot | None, after: Snapshot) -> Iterator[Change]:
    """What is new or not as it was: rounds, then jobs, then the run. Counters that only grow are no change."""
    old = before or Snapshot(after.run)
    for key, summary in sorted(after.rounds.items()):
        if key not in old.rounds or _gist_of_round(old.rounds[key]) != _gist_of_round(summary):
            yield Change(kind="round", round=key[0], summary=summary)
    for id, (number, job) in after.jobs.items():
        known = old.jobs[id][1] if id in old.jobs else None
        if known is None or (known.state, known.reason) != (job.state, job.reason):
            yield Change(kind="job", round=number, job=job)
        elif known.progress != job.progress:
            yield Change(kind="progress", round=number, job=job)
    if before is None or _gist_of_run(old.run) != _gist_of_run(after.run):
        yield Change(kind="run", run=after.run)


def _gist_of_round(summary: RoundSummary) -> tuple[object, ...]:
    return summary.state, summary.reason, summary.contributions, summary.metrics


def _gist_of_run(run: RunView) -> tuple[object, ...]:
    return run.state, run.reason, run.round, run.metrics
