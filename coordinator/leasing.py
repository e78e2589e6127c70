"""A job on its way into its client's hands: handed out under a lease, cut to the steps that its time holds, or not at all."""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta

from sqlalchemy import select
from sqlalchemy.orm import Session

from coordinator import clients, events, histories, ranks
from coordinator.jobs import ACTIVE, plan_of
from coordinator.tables import Client, Job, Round, Run
from protocol import messages
from protocol.messages import Profile
from protocol.plan import Plan
from protocol.slices import largest_length
from protocol.states import ClientState, JobKind, JobState, RunState


def seed(plan: Plan, round: int, client: str, kind: str) -> int:
    """The seed of a job: the same for the same plan, round and client name, whatever else happened."""
    return int.from_bytes(hashlib.sha256(f"{plan.seed}/{round}/{client}/{kind}".encode()).digest()[:6], "big")


def waiting(session: Session, client_id: str) -> bool:
    """Whether there may be a job for the client: a look that changes nothing."""
    query = select(Job.id).where(Job.client_id == client_id, Job.state.in_(ACTIVE)).limit(1)
    return session.scalar(query) is not None


def next_for(session: Session, client_id: str, now: datetime) -> messages.Job | None:
    """Give the client its next job under a fresh lease; the one it holds already, if its last answer was lost.

    A job that was never handed out, and for which there is no time left, is cancelled instead, with the reason.
    """
    client = clients.get(session, client_id)
    if client.state != ClientState.active:
        return None
    query = (
        select(Job, Round, Run)
        .join(Round, Job.round_id == Round.id)
        .join(Run, Round.run_id == Run.id)
        .where(Job.client_id == client_id, Job.state.in_(ACTIVE), Run.state == RunState.running)
        .order_by(Job.state, Job.created_at, Job.kind, Job.id)  # leased before queued; evaluation before training
        .with_for_update(of=Job, key_share=True)  # a job that ends at this moment is not revived
    )
    for job, round, run in session.execute(query):
        if job.state == JobState.queued:
            job.deadline = min(job.deadline, now + timedelta(seconds=plan_of(run).times.job))
        if job.epoch or job.kind == JobKind.evaluate or _in_time(session, client, job, round, run, now):
            return _lease(session, client, job, round, run, now)
    return None


def _in_time(session: Session, client: Client, job: Job, round: Round, run: Run, now: datetime) -> bool:
    """Cut the job to the steps that its time holds, once and for all its leases; cancel it where that is not one."""
    plan, left = plan_of(run), (job.deadline - now).total_seconds()
    history = histories.of_client(session, run.id, client.id)
    candidate = histories.candidate(client, Profile.model_validate(client.profile), history)
    steps = ranks.steps_within(plan, candidate, job.rank, left)
    if steps:
        job.max_steps = steps if steps < plan.training.steps(ranks.examples(plan, candidate)) else None
        return True
    job.state, job.ended_at = JobState.cancelled, now
    job.reason = f"too little time to hand it out: {left:.3g} s are left; {ranks.needs(plan, candidate, job.rank)}"
    events.record(session, now, "job-cancelled", run=run.id, round=round.number, client=client.name, reason=job.reason)
    return False


def _lease(session: Session, client: Client, job: Job, round: Round, run: Run, now: datetime) -> messages.Job:
    plan = plan_of(run)
    job.state, job.epoch = JobState.leased, job.epoch + 1
    job.lease_until = now + timedelta(seconds=plan.times.lease)
    job.progress, job.progress_at = None, now
    client.last_seen = now
    session.flush()
    return _message(plan, client, job, round, run, now)


def _message(plan: Plan, client: Client, job: Job, round: Round, run: Run, now: datetime) -> messages.Job:
    assert plan.layout is not None, "a plan without layout is refused when the run is made"
    kind = JobKind(job.kind)
    cut = {} if job.max_steps is None else {"max_steps": job.max_steps}
    return messages.Job(
        id=job.id,
        run=run.id,
        run_name=run.name,
        round=round.number,
        kind=kind,
        rank=job.rank,
        rank_reason=reason(job),
        scale=plan.adapter.scale(job.rank),
        seed=seed(plan, round.number, client.name, kind),
        slice=messages.BlobRef(digest=job.base, bytes=job.base_bytes),
        lease=messages.Lease(epoch=job.epoch, seconds=plan.times.lease, no_progress_seconds=plan.times.no_progress),
        remaining_seconds=max(0.0, (job.deadline - now).total_seconds()),
        max_upload_bytes=largest_length(plan.layout, job.rank, plan.wire),
        model=plan.model,
        task=plan.task,
        data=plan.data,
        adapter=plan.adapter,
        layout=plan.layout,
        training=plan.training.model_copy(update=cut),
        wire=plan.wire,
    )


def reason(job: Job) -> str:
    """Why the job has its rank, and its number of steps where that is not the plan's."""
    why = str(job.rank_view["reason"])
    return why if job.max_steps is None else f"{why}; cut to {job.max_steps} steps, which its time holds"
