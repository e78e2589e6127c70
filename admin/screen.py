"""A run as words: a screen that is drawn again and again, or one line for each change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from admin import words
from admin.following import LIVE, Change, Snapshot
from admin.rounds import called, in_order, measured
from protocol.states import JobKind, JobState, RoundState, RunState
from protocol.views import JobView, RoundSummary, RunView

ROUNDS = 12  # lines of past rounds on the screen
STYLES: Mapping[str, str] = {
    **dict.fromkeys([RunState.running, RoundState.open, RoundState.merging, JobState.leased], "cyan"),
    **dict.fromkeys([RunState.finished, RoundState.published, JobState.submitted, JobState.accepted], "green"),
    **dict.fromkeys([RunState.paused, JobState.queued, JobState.released, JobState.cancelled], "yellow"),
    **dict.fromkeys([RunState.failed, RunState.stopped, RoundState.abandoned, JobState.expired, JobState.rejected], "red"),
}


def screen(now: Snapshot, trouble: str | None = None) -> RenderableType:
    """Everything that matters of a run at one moment; long texts are cut off to keep one line for each round and job."""
    past = [now.rounds[key] for key in sorted(now.rounds)][-ROUNDS:]
    current = current_jobs(now)
    parts: list[RenderableType] = [_head(now), "", _rounds(past)]
    parts += ["", _jobs(current)] if current else []
    parts += ["", Text(words.printable(trouble), "red")] if trouble else []
    return Group(*parts)


def _head(now: Snapshot) -> RenderableType:
    run, left = now.run, now.remaining_seconds()
    title = Text.assemble(
        (run.name, "bold"), "  ", (run.state, STYLES[run.state]), f": {words.printable(run.reason)}" if run.reason else ""
    )
    standing = f"round {run.round} of {run.rounds}"
    standing += f", about {words.duration(left)} left" if left and run.state is RunState.running else ""
    bar = Table.grid(padding=(0, 2, 0, 0))
    bar.add_row(ProgressBar(total=run.rounds, completed=run.round, width=40), standing)
    return Group(title, bar)


def current_jobs(now: Snapshot) -> list[JobView]:
    """The jobs of the newest round, and those of older rounds that are still worked on."""
    newest = now.latest()
    number = newest.number if newest else 0
    return [job for n, job in now.jobs.values() if n == number or job.state is JobState.leased]


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        # Where the screen is narrow the last column gives way, and it alone.
        made.add_column(
            words.printable(column), justify="right" if column in right else "left", overflow="ellipsis", no_wrap=column != columns[-1]
        )
    return made


def _elastic(text: str) -> Text:
    return Text(words.printable(text), no_wrap=True, overflow="ellipsis")


def _rounds(rounds: Sequence[RoundSummary]) -> RenderableType:
    metrics = measured(rounds)
    made = _table("round", "state", "jobs", *metrics, "up", "down", "took", "kept", right=["round", "jobs", *metrics, "up", "down", "took"])
    for found in rounds:
        made.add_row(
            called(found),
            Text(found.state, STYLES[found.state]),
            f"{found.contributions}/{found.cohort}",
            *(f"{found.metrics[name]:.4g}" if name in found.metrics else "" for name in metrics),
            words.size(found.bytes_up),
            words.size(found.bytes_down),
            words.duration((found.ended_at - found.opened_at).total_seconds()) if found.ended_at else "",
            _elastic(words.kept(found.kept_energy)),
        )
    return made


def _jobs(jobs: list[JobView]) -> RenderableType:
    made = _table("client", "work", "state", "progress", "loss", "rank and why")
    for job in sorted(jobs, key=in_order):
        progress = job.progress
        loss = "" if progress is None or progress.loss is None else f"{progress.loss:.4g}"
        made.add_row(
            words.printable(job.client_name),
            job.kind,
            Text(job.state, STYLES[job.state]),
            _bar(job),
            loss,
            _elastic(job.reason or job.rank.reason),
        )
    return made


def _bar(job: JobView) -> RenderableType:
    """A bar where steps are counted, otherwise the phase."""
    if job.state in (JobState.submitted, JobState.accepted):
        return ProgressBar(total=1, completed=1, width=12)
    if job.state is not JobState.leased or job.progress is None:
        return ""
    if not job.progress.steps:
        return words.printable(job.progress.phase)
    return ProgressBar(total=job.progress.steps, completed=job.progress.step, width=12)


def line(change: Change) -> str | None:
    """A change as one line; None for one that is only progress within a job."""
    if change.run is not None:
        return words.printable(_run_line(change.run))
    if change.summary is not None:
        return words.printable(_round_line(change.summary))
    return None if change.job is None or change.kind == "progress" else words.printable(_job_line(change.job, change.round))


def _run_line(run: RunView) -> str:
    said = f"run {run.name} is {run.state}, {run.round} of {run.rounds} rounds published"
    return said + (f": {run.reason}" if run.reason else "") + (f"; {words.metrics(run.metrics)}" if run.metrics else "")


def _round_line(found: RoundSummary) -> str:
    parts = [f"round {found.number} {found.state}" + (f" (attempt {found.attempt})" if found.attempt > 1 else "")]
    parts += [found.reason] if found.reason else []
    parts += [f"{found.contributions} of {found.cohort} contributions"] if found.cohort else []
    if found.state is RoundState.published and found.cohort:
        parts.append(f"{words.size(found.bytes_up)} up, {words.size(found.bytes_down)} down")
        parts.append(f"{words.duration(found.train_seconds)} of training, {words.duration(found.merge_seconds)} of merging")
        parts.append(f"kept {words.kept(found.kept_energy)}")
    parts += [words.metrics(found.metrics)] if found.metrics else []
    return "; ".join(parts)


def _job_line(job: JobView, round: int | None) -> str:
    work = "trains" if job.kind is JobKind.train else "evaluates"
    parts = [f"round {round}: {job.client_name} {work} at rank {job.rank.rank}: {job.state}"]
    parts += [job.reason] if job.reason else []
    parts += [job.rank.reason.partition(": ")[2]] if job.state in LIVE else []
    parts += [f"{job.examples:,} rows"] if job.examples else []
    parts += [words.metrics({name: metric.value for name, metric in job.metrics.items()})] if job.metrics else []
    return "; ".join(parts)
