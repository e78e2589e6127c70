"""A job on its way into its client's hands: handed out under a lease, cut to the steps that its time holds, or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache

from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from coordinator import events, histories, ranks, sizes
from coordinator.jobs import ACTIVE, plan_of
from coordinator.tables import Client, Job, Round, Run
from protocol import messages
from protocol.contents import largest_length
from protocol.messages import Profile
from protocol.plan import Plan, Sides
from protocol.states import ClientState, JobKind, JobState, RunState


def seed(plan: Plan, round: int, client: str, kind: str) -> int:
    """The seed of a job: the same for the same plan, round and client name, whatever else happened."""
    return int.from_bytes(hashlib.sha256(f"{plan.seed}/{round}/{client}/{kind}".encode()).digest()[:6], "big")


@dataclass(frozen=True)
class Glance:
    """What a request of a client's needs to know before anything is read or written for it."""

    client: str
    work: bool  # there may be a job


def glances(session: Session, digests: Collection[str]) -> dict[str, Glance]:
    """The clients behind credentials of these digests, and whether there may be work for them, in one look; others are left out."""
    found = session.connection().execute(_GLANCES, {"digests": list(digests)})
    return {digest: Glance(client, work) for digest, client, work in found}


_WORK = select(Job.id).where(Job.client_id == Client.id, Job.state.in_(ACTIVE)).exists()
_GLANCES = select(Client.digest, Client.id, _WORK).where(
    Client.digest.in_(bindparam("digests", expanding=True)), Client.state != ClientState.revoked
)


def hand_out(session: Session, client_ids: Collection[str], now: datetime) -> dict[str, messages.Job]:
    """Give each of these clients its next job under a fresh lease; the one it holds already, if its last answer was lost.

    All of them are looked up at once: a round that opens is picked up by a whole fleet in the same seconds. A job that was
    never handed out, and for which there is no time left, is cancelled instead, with the reason.
    """
    wanted = select(Client).where(Client.id.in_(client_ids), Client.state == ClientState.active)
    able = {client.id: client for client in session.scalars(wanted)}
    query = (
        select(Job, Round, Run)
        .join(Round, Job.round_id == Round.id)
        .join(Run, Round.run_id == Run.id)
        .where(Job.client_id.in_(able), Job.state.in_(ACTIVE), Run.state == RunState.running)
        .order_by(Job.client_id, Job.state, Job.created_at, Job.kind, Job.id)  # leased before queued; evaluation before training
        .with_for_update(of=Job, key_share=True)  # a job that ends at this moment is not revived
    )
    desk = _Desk(session, list(able), now)
    given: dict[str, messages.Job] = {}
    for job, round, run in session.execute(query):
        if job.client_id not in given and (told := desk.serve(able[job.client_id], job, round, run)) is not None:
            given[job.client_id] = told
    session.flush()
    return given


class _Desk:
    """Hands jobs out to some clients; what it needs of a run is read once."""

    def __init__(self, session: Session, client_ids: Sequence[str], now: datetime) -> None:
        self._session, self._now = session, now
        self._plan = cache(plan_of)
        self._histories = cache(lambda run_id: histories.of_clients(session, run_id, client_ids))
        self._largest = cache(lambda run, rank: _largest_upload(self._plan(run), rank))

    def serve(self, client: Client, job: Job, round: Round, run: Run) -> messages.Job | None:
        """The job under a fresh lease; nothing if its time does not hold a single step."""
        if job.state == JobState.queued:
            job.deadline = min(job.deadline, self._now + timedelta(seconds=self._plan(run).times.job))
        if not (job.epoch or job.kind == JobKind.evaluate or self._in_time(client, job, round, run)):
            return None
        job.state, job.epoch = JobState.leased, job.epoch + 1
        job.lease_until = self._now + timedelta(seconds=self._plan(run).times.lease)
        job.progress, job.progress_at = None, self._now
        return _message(self._plan(run), client, job, round, run, self._largest(run, job.rank), self._now)

    def _in_time(self, client: Client, job: Job, round: Round, run: Run) -> bool:
        """Cut the job to the steps that its time holds, once and for all its leases; cancel it where that is not one."""
        plan, left = self._plan(run), (job.deadline - self._now).total_seconds()
        history = self._histories(run.id).get(client.id, histories.NEW)
        candidate = histories.candidate(client, Profile.model_validate(client.profile), history)
        steps = ranks.steps_within(plan, candidate, job.rank, left)
        if steps:
            job.max_steps = steps if steps < plan.training.steps(ranks.examples(plan, candidate)) else None
            return True
        job.state, job.ended_at = JobState.cancelled, self._now
        job.reason = f"too little time to hand it out: {left:.3g} s are left; {ranks.needs(plan, candidate, job.rank)}"
        told = (self._session, self._now, "job-cancelled")
        events.record(*told, run=run.id, round=round.number, client=client.name, reason=job.reason)
        return False


def _largest_upload(plan: Plan, rank: int) -> int:
    return largest_length(sizes.layout(plan), rank, plan.upload, sizes.strategy(plan).sides)


def _message(plan: Plan, client: Client, job: Job, round: Round, run: Run, largest: int, now: datetime) -> messages.Job:
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
        directions=job.directions,
        sides=sizes.strategy(plan).sides if kind is JobKind.train else Sides.both,
        lease=messages.Lease(epoch=job.epoch, seconds=plan.times.lease, no_progress_seconds=plan.times.no_progress),
        remaining_seconds=max(0.0, (job.deadline - now).total_seconds()),
        max_upload_bytes=largest,
        model=plan.model,
        task=plan.task,
        data=plan.data,
        adapter=plan.adapter,
        layout=plan.layout,
        training=plan.training.model_copy(update=cut),
        wire=plan.wire,
        uploads=plan.uploads,
    )


def reason(job: Job) -> str:
    """Why the job has its rank, and its number of steps where that is not the plan's."""
    why = str(job.rank_view["reason"])
    return why if job.max_steps is None else f"{why}; cut to {job.max_steps} steps, which its time holds"
