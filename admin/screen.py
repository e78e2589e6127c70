"""A run as words: a screen that is drawn again and again, or one line for each change."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table

from admin import words
from admin.following import LIVE, Change, Snapshot
from admin.rounds import in_order, overview
from protocol.messages import JobKind, JobState, JobView, RoundState, RoundSummary, RunView

ROUNDS = 10  # lines of past rounds on the screen
BAR = 20  # columns of a job's bar


def screen(now: Snapshot, trouble: str | None = None) -> RenderableType:
    """Everything that matters of a run at one moment."""
    run = now.run
    left = now.remaining_seconds()
    title = f"{run.name}  {run.state}" + (f": {run.reason}" if run.reason else "")
    standing = [f"round {run.round} of {run.rounds} published", words.metrics(run.metrics)]
    standing += [f"about {words.duration(left)} left"] if left and run.state == "running" else []
    past = [now.rounds[key] for key in sorted(now.rounds)][-ROUNDS:]
    parts: list[RenderableType] = [
        title,
        ProgressBar(total=run.rounds, completed=run.round, width=60),
        ", ".join(part for part in standing if part),
        "",
        overview(past),
    ]
    current = current_jobs(now)
    parts += ["", _jobs(current)] if current else []
    parts += ["", trouble] if trouble else []
    return Group(*parts)


def current_jobs(now: Snapshot) -> list[JobView]:
    """The jobs of the newest round, and those of older rounds that are still worked on."""
    newest = now.latest()
    number = newest.number if newest else 0
    return [job for n, job in now.jobs.values() if n == number or job.state is JobState.leased]


def _jobs(jobs: list[JobView]) -> RenderableType:
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("client", "work", "rank", "state", "phase", "", "loss", "why"):
        made.add_column(column, overflow="fold")
    for job in sorted(jobs, key=in_order):
        progress = job.progress
        loss = "" if progress is None or progress.loss is None else f"{progress.loss:.4g}"
        phase = progress.phase if progress and job.state is JobState.leased else ""
        made.add_row(job.client_name, job.kind, str(job.rank.rank), job.state, phase, _bar(job), loss, job.reason or job.rank.reason)
    return made


def _bar(job: JobView) -> RenderableType:
    if job.state in (JobState.submitted, JobState.accepted):
        return ProgressBar(total=1, completed=1, width=BAR)
    if job.state is not JobState.leased or job.progress is None or not job.progress.steps:
        return ""
    return ProgressBar(total=job.progress.steps, completed=job.progress.step, width=BAR)


def line(change: Change) -> str | None:
    """A change as one line; None for one that is only progress within a job."""
    if change.run is not None:
        return _run_line(change.run)
    if change.summary is not None:
        return _round_line(change.summary)
    return None if change.job is None or change.kind == "progress" else _job_line(change.job, change.round)


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
