"""A job on its way into its client's hands: handed out under a lease, cut to the steps that its time holds, or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from sqlalchemy import bindparam, null, select, update
from sqlalchemy.orm import Session

from coordinator import events, histories, jobs, ranks, sizes
from coordinator.jobs import ACTIVE, Facts, Planned, known_plan, lengths
from coordinator.tables import Client, Job, Round, Run
from protocol import messages
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
    job: Planned | None = None  # the one that was asked about, whoever holds it; also none where it is quicker to look alone


@dataclass(frozen=True)
class Asking:
    """Who asks, by the digest of a credential; and about which job, if any."""

    digest: str
    job: str | None = None


def glances(session: Session, asked: Collection[Asking]) -> dict[Asking, Glance]:
    """The clients behind credentials, whether there may be work for them, and their jobs, in one look; others are left out."""
    found = session.connection().execute(_GLANCES, {"digests": list({each.digest for each in asked})})
    known = {digest: (client, work) for digest, client, work in found}
    planned = jobs.at_hand(session, {each.job for each in asked if each.job is not None})
    return {each: Glance(*known[each.digest], planned.get(each.job or "")) for each in asked if each.digest in known}


_WORK = select(Job.id).where(Job.client_id == Client.id, Job.state.in_(ACTIVE)).exists()
_GLANCES = select(Client.digest, Client.id, _WORK).where(
    Client.digest.in_(bindparam("digests", expanding=True)), Client.state != ClientState.revoked
)


def hand_out(session: Session, client_ids: Collection[str], now: datetime) -> dict[str, messages.Job]:
    """Give each of these clients its next job under a fresh lease; the one it holds already, if its last answer was lost.

    All of them are looked up at once: a round that opens is picked up by a whole fleet in the same seconds. A job that was
    never handed out, and for which there is no time left, is cancelled instead, with the reason.
    """
    found = sorted(session.connection().execute(_NEXT, {"ids": list(client_ids)}), key=_turn)
    desk = _Desk(session, sorted({job.client_id for job in found}), now)
    given: dict[str, messages.Job] = {}
    for job in found:
        if job.client_id not in given and (told := desk.serve(job)) is not None:
            given[job.client_id] = told
    desk.write()
    return given


def _turn(job: Facts) -> tuple[object, ...]:
    """By client; leased before queued, evaluation before training."""
    return job.client_id, job.state, job.created_at, job.kind, job.id


_NEXT = (
    select(
        *(Job.id, Job.client_id, Job.kind, Job.state, Job.epoch, Job.rank, Job.rank_view, Job.base, Job.base_bytes, Job.directions),
        *(Job.created_at, Job.deadline, Job.max_steps, Round.number, Round.run_id, Run.name.label("run_name"), Run.plan_digest),
        *(Client.name.label("client_name"), Client.labels, Client.profile),
    )
    .join(Round, Job.round_id == Round.id)
    .join(Run, Round.run_id == Run.id)
    .join(Client, Job.client_id == Client.id)
    .where(Job.client_id.in_(bindparam("ids", expanding=True)), Job.state.in_(ACTIVE))
    .where(Client.state == ClientState.active, Run.state == RunState.running)
    .order_by(Job.client_id, Job.id)  # in which everybody takes jobs
    .with_for_update(of=Job, key_share=True)  # a job that ends at this moment is not revived
)
_HERE = (Job.id == bindparam("job"), Job.epoch == bindparam("before"), Job.state == bindparam("was"))
_TIMES = {"deadline": bindparam("until", type_=Job.deadline.type)}
_LEASED = (
    update(Job)
    .where(*_HERE)
    .values(
        state=JobState.leased,
        epoch=Job.epoch + 1,
        max_steps=bindparam("most"),
        lease_until=bindparam("lease", type_=Job.lease_until.type),
        progress=null(),
        progress_at=bindparam("at", type_=Job.progress_at.type),
        **_TIMES,
    )
)
_CANCELLED = (
    update(Job)
    .where(*_HERE)
    .values(state=JobState.cancelled, reason=bindparam("why"), ended_at=bindparam("at", type_=Job.ended_at.type), **_TIMES)
)


@dataclass(frozen=True)
class _Term:
    """What a job's time makes of it."""

    deadline: datetime
    max_steps: int | None
    obstacle: str | None = None  # why there is too little of it


class _Desk:
    """Hands jobs out to some clients; what it needs of a run is read once."""

    def __init__(self, session: Session, client_ids: Sequence[str], now: datetime) -> None:
        self._session, self._now = session, now
        self._histories = cache(lambda run_id: histories.of_clients(session, run_id, client_ids))
        self._leased: list[dict[str, object]] = []
        self._cancelled: list[dict[str, object]] = []

    def serve(self, job: Facts) -> messages.Job | None:
        """The job under a fresh lease; nothing if its time does not hold a single step."""
        plan = known_plan(self._session, job)
        term = self._term(plan, job)
        same = {"job": job.id, "before": job.epoch, "was": job.state, "until": term.deadline, "at": self._now}
        if term.obstacle is not None:
            self._cancelled.append(same | {"why": term.obstacle})
            told = (self._session, self._now, "job-cancelled")
            events.record(*told, run=job.run_id, round=job.number, client=job.client_name, reason=term.obstacle)
            return None
        self._leased.append(same | {"most": term.max_steps, "lease": self._now + timedelta(seconds=plan.times.lease)})
        return _message(plan, job, term, self._now)

    def write(self) -> None:
        """Change the rows of the jobs that were served."""
        for change, rows in ((_LEASED, self._leased), (_CANCELLED, self._cancelled)):
            changed = self._session.connection().execute(change, rows).rowcount if rows else 0
            assert changed == len(rows), "these rows are locked since they were read"

    def _term(self, plan: Plan, job: Facts) -> _Term:
        """Its time; a job to train is cut to the steps that this holds, once and for all its leases."""
        deadline = job.deadline
        if job.state == JobState.queued:
            deadline = min(deadline, self._now + timedelta(seconds=plan.times.job))
        if job.epoch or job.kind == JobKind.evaluate:
            return _Term(deadline, job.max_steps)
        left = (deadline - self._now).total_seconds()
        history = self._histories(job.run_id).get(job.client_id, histories.NEW)
        candidate = histories.candidate(job.client_name, job.labels, Profile.model_validate(job.profile), history)
        whole = job.directions is not None
        steps = ranks.steps_within(plan, candidate, job.rank, left, whole=whole)
        if steps:
            return _Term(deadline, steps if steps < plan.training.steps(ranks.examples(plan, candidate)) else None)
        needs = ranks.needs(plan, candidate, job.rank, whole=whole)
        return _Term(deadline, None, f"too little time to hand it out: {left:.3g} s are left; {needs}")


def _message(plan: Plan, job: Facts, term: _Term, now: datetime) -> messages.Job:
    assert plan.layout is not None, "a plan without layout is refused when the run is made"
    kind = JobKind(job.kind)
    own = {"learning_rate": plan.learning_rate(job.number)} | ({} if term.max_steps is None else {"max_steps": term.max_steps})
    return messages.Job(
        id=job.id,
        run=job.run_id,
        run_name=job.run_name,
        round=job.number,
        kind=kind,
        rank=job.rank,
        rank_reason=reason(job.rank_view, term.max_steps),
        scale=plan.adapter.scale(job.rank),
        seed=seed(plan, job.number, job.client_name, kind),
        slice=messages.BlobRef(digest=job.base, bytes=job.base_bytes),
        directions=job.directions,
        sides=sizes.strategy(plan).sides if kind is JobKind.train else Sides.both,
        lease=messages.Lease(epoch=job.epoch + 1, seconds=plan.times.lease, no_progress_seconds=plan.times.no_progress),
        remaining_seconds=max(0.0, (term.deadline - now).total_seconds()),
        max_upload_bytes=lengths(plan, job)[0],
        model=plan.model,
        task=plan.task,
        data=plan.data,
        adapter=plan.adapter,
        layout=plan.layout,
        training=plan.training.model_copy(update=own),
        wire=plan.wire,
        uploads=plan.uploads,
    )


def reason(rank_view: Mapping[str, Any], max_steps: int | None) -> str:
    """Why a job has its rank, and its number of steps where that is not the plan's."""
    why = str(rank_view["reason"])
    return why if max_steps is None else f"{why}; cut to {max_steps} steps, which its time holds"
