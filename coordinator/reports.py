"""What operators see of runs and rounds, computed from the rows when somebody looks."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from coordinator import counting, leasing, published
from coordinator.jobs import plan_of
from coordinator.tables import Client, Job, Round, Run
from protocol import errors
from protocol.messages import BlobRef, Progress, Result
from protocol.plan import CausalLM, Plan
from protocol.states import JobKind, JobState, RoundState, RunState
from protocol.views import Energy, JobView, Manifest, Page, RankView, RoundSummary, RoundView, RunDetail, RunView

OF_TOKENS = ("loss", "loss_before", "loss_after", "perplexity")  # a language model's, weighted by what was learned


def run_view(session: Session, run: Run) -> RunView:
    """A run and where it stands."""
    newest = published.round_of(session, run.id)
    sums = (
        select(func.sum(Job.slice_bytes), func.sum(Job.fetched_bytes)).join(Round, Job.round_id == Round.id).where(Round.run_id == run.id)
    )
    up, down = session.execute(sums).one()
    return RunView(
        id=run.id,
        name=run.name,
        state=RunState(run.state),
        reason=run.reason,
        round=newest.number if newest else 0,
        rounds=plan_of(run).rounds,
        created_at=run.created_at,
        ended_at=run.ended_at,
        metrics=_newest_metrics(session, run),
        bytes_up=int(up or 0),
        bytes_down=int(down or 0),
    )


def run_detail(session: Session, run: Run) -> RunDetail:
    """A run with its plan."""
    return RunDetail(**run_view(session, run).model_dump(), plan=plan_of(run), plan_digest=run.plan_digest)


def _newest_metrics(session: Session, run: Run) -> dict[str, float]:
    measured = (
        select(Round.id)
        .join(Job, Job.round_id == Round.id)
        .where(Round.run_id == run.id, Job.kind == JobKind.evaluate, Job.state == JobState.accepted)
        .order_by(Round.number.desc())
        .limit(1)
    )
    round_id = session.scalar(measured)
    if round_id is None:
        return {}
    jobs = _jobs(session, [round_id])[round_id]
    return _metrics(run, jobs, JobKind.evaluate)


def summaries(session: Session, run: Run, cursor: str | None, limit: int) -> Page[RoundSummary]:
    """Rounds with all their attempts, oldest first; the cursor is the number of rows to pass over."""
    if cursor is not None and not (cursor.isascii() and cursor.isdigit() and len(cursor) < 10):
        raise errors.InvalidRequest("the cursor is not one that this coordinator gave out; begin without one")
    start = int(cursor or 0)
    query = select(Round).where(Round.run_id == run.id).order_by(Round.number, Round.attempt).offset(start).limit(limit + 1)
    rows = list(session.scalars(query))
    jobs = _jobs(session, [row.id for row in rows[:limit]])
    items = [_summary(run, row, jobs[row.id]) for row in rows[:limit]]
    return Page(items=items, next=str(start + limit) if len(rows) > limit else None)


def round_view(session: Session, run: Run, number: int, attempt: int | None) -> RoundView:
    """One attempt at a round, whole; by default the last one. Raises NotFound."""
    query = select(Round).where(Round.run_id == run.id, Round.number == number)
    if attempt is not None:
        query = query.where(Round.attempt == attempt)
    row = session.scalar(query.order_by(Round.attempt.desc()).limit(1))
    if row is None:
        raise errors.NotFound(f"run {run.name} has no round {number}" + (f", attempt {attempt}" if attempt else ""))
    jobs = _jobs(session, [row.id])[row.id]
    known = session.execute(select(Client.id, Client.name).where(Client.id.in_({job.client_id for job in jobs})))
    names = {row.id: row.name for row in known}
    listed = {id for job in jobs for id in (job.round_id, job.counted_in) if id is not None}
    numbers = {row.id: row.number for row in session.execute(select(Round.id, Round.number).where(Round.id.in_(listed)))}
    adapter = None if row.adapter is None or row.adapter_bytes is None else BlobRef(digest=row.adapter, bytes=row.adapter_bytes)
    return RoundView(
        **_summary(run, row, jobs).model_dump(),
        jobs=[_job_view(job, names[job.client_id], numbers) for job in jobs],
        adapter=adapter,
        slices=published.slices(session, row.id),
        energy={module: Energy.model_validate(view) for module, view in (row.energy or {}).items()},
        manifest=None if row.manifest is None else Manifest.model_validate(row.manifest),
        forgotten=row.forgotten,
    )


def _jobs(session: Session, round_ids: Sequence[int]) -> dict[int, list[Job]]:
    """By round, the jobs that were handed out in it and those that were merged into it."""
    found: dict[int, list[Job]] = {id: [] for id in round_ids}
    mine = or_(Job.round_id.in_(round_ids), Job.counted_in.in_(round_ids))
    for job in session.scalars(select(Job).where(mine).order_by(Job.created_at, Job.id)):
        for id in found.keys() & {job.round_id, job.counted_in}:
            found[id].append(job)
    return found


def _summary(run: Run, row: Round, jobs: Sequence[Job]) -> RoundSummary:
    own = [job for job in jobs if job.round_id == row.id]
    counted = [job for job in jobs if job.kind == JobKind.train and _counts(job, row)]
    return RoundSummary(
        number=row.number,
        attempt=row.attempt,
        state=RoundState(row.state),
        reason=row.reason,
        opened_at=row.opened_at,
        ended_at=row.ended_at,
        cohort=sum(job.kind == JobKind.train for job in own),
        contributions=len(counted),
        ranks=dict(sorted(Counter(job.rank for job in counted).items())),
        bytes_up=sum(job.slice_bytes or 0 for job in own),
        bytes_down=sum(job.fetched_bytes for job in own),
        train_seconds=sum(result.usage.seconds for result in map(_result, counted) if result is not None),
        merge_seconds=row.merge_seconds,
        metrics=_metrics(run, own, JobKind.evaluate),
        train_metrics=_metrics(run, counted, JobKind.train),
        kept_energy=_kept([Energy.model_validate(view) for view in (row.energy or {}).values()]),
    )


def _counts(job: Job, row: Round) -> bool:
    """Whether the job's contribution is merged into the round, or waits for it as its own."""
    if job.counted_in is None and row.state in (RoundState.open, RoundState.abandoned):
        return job.state == JobState.submitted and job.round_id == row.id
    return job.counted_in == row.id and job.state in (JobState.submitted, JobState.accepted)


def _result(job: Job) -> Result | None:
    return None if job.result is None else Result.model_validate(job.result)


def _metrics(run: Run, jobs: Iterable[Job], kind: JobKind) -> dict[str, float]:
    """Weighted means over clients. Perplexity is that of the mean loss: a mean of perplexities would be none.

    As with contributions, rows that were not in a client's profile add no weight, and none weighs more than the plan's largest share.
    """
    plan, states = plan_of(run), (JobState.submitted, JobState.accepted)
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for job in jobs:
        result = _result(job) if job.kind == kind and job.state in states else None
        if result is None:
            continue
        rows = result.examples if job.known_rows is None else job.known_rows  # older jobs do not say it
        for name, metric in result.metrics.items():
            found[name].append((metric.value, min(metric.weight, _most_weight(plan, kind, name, rows))))
    means = {name: _mean(measured, plan.largest_share) for name, measured in sorted(found.items())}
    if isinstance(plan.task, CausalLM) and means.get("loss", math.inf) < 700:  # exp of more is no float
        means["perplexity"] = math.exp(means["loss"])
    return means


def _most_weight(plan: Plan, kind: JobKind, name: str, known: int) -> float:
    """What a metric may weigh, of a client that has `known` rows: as many as it could see, for a language model's losses their tokens."""
    rows = known if kind is JobKind.evaluate else known * max(1.0, plan.training.epochs)
    return max(1.0, rows) * (plan.task.max_length if isinstance(plan.task, CausalLM) and name in OF_TOKENS else 1)


def _mean(measured: Sequence[tuple[float, float]], largest: float) -> float:
    """Of values and their weights > 0, none of which counts more than that share."""
    weights = counting.shares([weight for _, weight in measured], largest)
    return math.fsum(value * weight for (value, _), weight in zip(measured, weights, strict=True))


def _kept(modules: Sequence[Energy]) -> dict[int, float]:
    """rank → share of the energy of all modules that the leading directions of each hold."""
    total = math.fsum(energy.total for energy in modules)
    ranks = sorted({rank for energy in modules for rank in energy.kept})
    if not total:
        return dict.fromkeys(ranks, 1.0)
    return {rank: min(1.0, math.fsum(energy.kept[rank] * energy.total for energy in modules) / total) for rank in ranks}


def _job_view(job: Job, client_name: str, numbers: Mapping[int, int]) -> JobView:
    """One job, given the numbers of the rounds that it names."""
    result = _result(job)
    counted_in = None if job.counted_in is None else numbers[job.counted_in]
    return JobView(
        id=job.id,
        client=job.client_id,
        client_name=client_name,
        kind=JobKind(job.kind),
        state=JobState(job.state),
        reason=job.reason,
        rank=RankView.model_validate(job.rank_view | {"reason": leasing.reason(job.rank_view, job.max_steps)}),
        epoch=job.epoch,
        # As it was taken: an older version may have taken a text that is refused now.
        progress=None if job.progress is None else Progress.model_construct(**job.progress),
        slice=None if job.slice is None or job.slice_bytes is None else BlobRef(digest=job.slice, bytes=job.slice_bytes),
        examples=result and result.examples,
        weight=job.weight,
        change_norm=job.change_norm,
        counted_in=counted_in,
        staleness=None if counted_in is None else counted_in - numbers[job.round_id],
        max_steps=job.max_steps,
        metrics=result.metrics if result else {},
        usage=result and result.usage,
    )
