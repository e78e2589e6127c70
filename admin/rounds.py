"""Rounds: who took part at which rank and why, what it cost, and what it gave."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Group, RenderableType

from admin import energies, words
from admin.command import AsJson, answer, connect, facts, group, table
from admin.naming import Run, run_id
from protocol.states import JobKind
from protocol.views import JobView, Manifest, ManifestInput, RoundSummary, RoundView

app = group("Look at the rounds of a run.")


@app.command("list")
def list_(ctx: typer.Context, run: Run, as_json: AsJson = False) -> None:
    """A run's rounds with all their attempts, oldest first."""
    with connect(ctx) as client:
        found = list(client.rounds(run_id(client, run)))
    answer(found, as_json, overview(found))


@app.command()
def show(
    ctx: typer.Context,
    run: Run,
    number: Annotated[int | None, typer.Argument(metavar="[N]", help="by default the newest", min=0)] = None,
    attempt: Annotated[int | None, typer.Option(help="by default the last", min=1)] = None,
    as_json: AsJson = False,
) -> None:
    """One round: jobs, ranks and why, weights, bytes, seconds, metrics, what its bytes follow from, and the energy that each rank keeps."""
    with connect(ctx) as client:
        id = run_id(client, run)
        if number is None:
            number = max((known.number for known in client.rounds(id)), default=0)
        found = client.round(id, number, attempt)
    parts: list[RenderableType] = [facts(_standing(found))]
    parts += ["", _jobs(found.jobs)] if found.jobs else []
    parts += ["", energies.by_rank(found)] if found.energy else []
    parts += ["", _manifest(found.manifest)] if found.manifest else []
    parts += ["", energies.by_module(found)] if found.energy else []
    answer(found, as_json, Group(*parts))


def overview(rounds: Sequence[RoundSummary]) -> RenderableType:
    """One line for each round, with a column for each metric."""
    metrics = measured(rounds)
    columns = ("round", "state", "jobs", "ranks", "up", "down", "trained", "merged", *metrics, "kept energy", "reason")
    right = ["round", "jobs", "up", "down", "trained", "merged", *metrics]
    return table(*columns, rows=[_line(found, metrics) for found in rounds], right=right)


def measured(rounds: Sequence[RoundSummary]) -> list[str]:
    """The names of all metrics of the rounds."""
    return sorted({name for found in rounds for name in found.metrics})


def called(found: RoundSummary) -> str:
    """3, and 3.2 for the second attempt."""
    return f"{found.number}.{found.attempt}" if found.attempt > 1 else f"{found.number}"


def in_order(job: JobView) -> tuple[bool, str]:
    """Training before evaluation, and clients by their names."""
    return job.kind is not JobKind.train, job.client_name


def _line(found: RoundSummary, metrics: Sequence[str]) -> tuple[str, ...]:
    return (
        called(found),
        found.state,
        f"{found.contributions}/{found.cohort}",
        words.ranks(found.ranks),
        words.size(found.bytes_up),
        words.size(found.bytes_down),
        words.duration(found.train_seconds),
        words.duration(found.merge_seconds),
        *(f"{found.metrics[name]:.4g}" if name in found.metrics else "" for name in metrics),
        words.kept(found.kept_energy),
        found.reason or "",
    )


def _standing(found: RoundView) -> list[tuple[str, str]]:
    return [
        ("round", f"{found.number}, attempt {found.attempt}: {found.state}" + (f", {found.reason}" if found.reason else "")),
        ("opened", words.moment(found.opened_at)),
        ("ended", words.moment(found.ended_at) if found.ended_at else ""),
        ("contributions", _contributions(found) if found.cohort or found.contributions else ""),
        ("bytes", f"{words.size(found.bytes_up)} up, {words.size(found.bytes_down)} down"),
        ("seconds", f"{words.duration(found.train_seconds)} of training in all, {words.duration(found.merge_seconds)} of merging"),
        ("training", words.metrics(found.train_metrics)),
        ("metrics", words.metrics(found.metrics)),
        ("rounded off", _rounded(found)),
        ("adapter", found.adapter.digest if found.adapter else ""),
        ("given up", "contributions and slices, by the retention policy; the adapter stays" if found.forgotten else ""),
    ]


def _rounded(found: RoundView) -> str:
    """What the plan's number formats cost: as clients say it, and as slices are known to be."""
    up = found.train_metrics.get("rounding")
    modules = [(energy.rounding**2, energy.total * max(0.0, *energy.kept.values())) for energy in found.energy.values() if energy.rounding]
    down = math.sqrt(math.fsum(r * e for r, e in modules) / (math.fsum(e for _, e in modules) or 1.0)) if modules else None
    parts = [] if up is None else [f"{words.share(up)} of a client's change, as clients say"]
    parts += [] if down is None else [f"at most {words.share(down)} of what clients are given"]
    return "; ".join(parts)


def _contributions(found: RoundView) -> str:
    """Merged ones and jobs handed out: with a buffer, neither are all of the other."""
    return f"{found.contributions}, ranks {words.ranks(found.ranks)}; {found.cohort} jobs handed out"


def _jobs(jobs: list[JobView]) -> RenderableType:
    columns = ("client", "work", "state", "rank and why", "rows", "weight", "‖change‖", "seconds", "metrics", "reason")
    return table(*columns, rows=[_job(job) for job in sorted(jobs, key=in_order)], right=["rows", "weight", "‖change‖", "seconds"])


def _job(job: JobView) -> tuple[str, ...]:
    return (
        job.client_name,
        job.kind,
        job.state,
        job.rank.reason,
        "" if job.examples is None else f"{job.examples:,}",
        "" if job.weight is None else words.share(job.weight),
        "" if job.change_norm is None else f"{job.change_norm:.3g}",
        "" if job.usage is None else words.duration(job.usage.seconds),
        words.metrics({name: metric.value for name, metric in job.metrics.items()}),
        job.reason or (f"merged into round {job.counted_in}, {job.staleness} versions later" if job.staleness else ""),
    )


def _manifest(manifest: Manifest) -> RenderableType:
    """What the round's bytes follow from; `--json` has the digests whole."""
    software = ", ".join(f"{name} {version}" for name, version in manifest.software.items())
    before = [
        ("plan", manifest.plan),
        ("made from", manifest.previous or ""),
        ("and from", manifest.earlier or ""),
        ("made with", f"{software}; merged on {manifest.device}"),
    ]
    columns = ("merged", "rank", "share", "of its change", "versions ago", "slice", "started from")
    rows = [_input(input) for input in manifest.inputs]
    parts: list[RenderableType] = [facts(before)]
    parts += ["", table(*columns, rows=rows, right=["rank", "share", "of its change", "versions ago"])] if rows else []
    return Group(*parts)


def _input(input: ManifestInput) -> tuple[str, ...]:
    return (
        input.client,
        str(input.rank),
        words.share(input.weight),
        words.share(input.shrink),
        str(input.staleness),
        words.digest(input.digest),
        words.digest(input.base),
    )
