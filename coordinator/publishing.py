"""From a closed round to a published one: claim it, say what is to be merged, publish what came out.

Merging is a pure function of stored bytes, so a claim is a lease and no lock: a round left in merging by a crash is
claimed again when its time is over, and gives the same bytes, or on another device others that mean the same: what counts is what
the holder of the newest claim publishes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, cast

from sqlalchemy import CursorResult, or_, select, update
from sqlalchemy.orm import Session

from coordinator import clients, counting, events, handout, manifests, published, rounds, sweeping
from coordinator.assembly import Merged
from coordinator.blobs import Blobs
from coordinator.jobs import lock, plan_of
from coordinator.manifests import Origin
from coordinator.merge import Input, RoundTask
from coordinator.tables import Client, Job, PublishedSlice, PublishedStart, Round, Run
from protocol import errors
from protocol.course import NormBound
from protocol.plan import Plan
from protocol.states import JobKind, JobState, RoundState, RunState

CLAIM = timedelta(seconds=6)  # prolonged while the merge goes on; so long nobody takes over from a coordinator that died
FAILURES = 3  # a round whose merging failed so often fails its run; dying at it, or losing a worker, is no failure
# What follows from the contributions and the plan, and would follow again.
LASTING = (errors.InvalidSlice, errors.UnmergeableRound, errors.InvalidRequest)


@dataclass(frozen=True)
class Claim:
    """The right to merge a round, until somebody claims it later."""

    round_id: int
    epoch: int


def due(session: Session, now: datetime) -> list[int]:
    """Rounds that wait to be merged."""
    free = or_(Round.merge_until.is_(None), Round.merge_until <= now)
    query = select(Round.id).join(Run, Round.run_id == Run.id).where(Round.state == RoundState.merging, free, Run.state == RunState.running)
    return list(session.scalars(query.order_by(Round.id)))


def claim(session: Session, round_id: int, now: datetime) -> Claim | None:
    """Claim a round for merging, unless somebody else holds it."""
    free = or_(Round.merge_until.is_(None), Round.merge_until <= now)
    statement = (
        update(Round)
        .where(Round.id == round_id, Round.state == RoundState.merging, free)
        .values(merge_epoch=Round.merge_epoch + 1, merge_until=now + CLAIM)
        .returning(Round.merge_epoch)
    )
    epoch = session.scalar(statement)
    return None if epoch is None else Claim(round_id, epoch)


def prolong(session: Session, claim: Claim, now: datetime) -> bool:
    """Hold the claim for longer; false if it was lost."""
    return _update(session, claim, merge_until=now + CLAIM)


def give_back(session: Session, claim: Claim, now: datetime, reason: str | None = None) -> None:
    """Let go of a round that cannot be merged now; operators are told the reason, if there is one."""
    round = session.get_one(Round, claim.round_id)
    if reason is not None:  # the run before the round, as everywhere
        session.get_one(Run, round.run_id, with_for_update={"key_share": True})
    if _update(session, claim, merge_until=now) and reason is not None:
        waits = f"round {round.number} waits to be merged: {reason}"
        session.execute(update(Run).where(Run.id == round.run_id, Run.state == RunState.running).values(reason=waits))


def _update(session: Session, claim: Claim, **values: object) -> bool:
    held = (Round.id == claim.round_id, Round.merge_epoch == claim.epoch, Round.state == RoundState.merging)
    statement = update(Round).where(*held).values(**values).execution_options(synchronize_session=False)
    return cast(CursorResult[Any], session.execute(statement)).rowcount == 1


def task(session: Session, claim: Claim, store: str) -> RoundTask | Plan:
    """What is to be merged; for round 0, the plan from which the first adapter is made."""
    round = session.get_one(Round, claim.round_id)
    return task_of(session, round, counting.counted(session, round.id), store)


def task_of(session: Session, round: Round, jobs: Sequence[Job], store: str) -> RoundTask | Plan:
    """The round's task, given the jobs that count in it."""
    run = session.get_one(Run, round.run_id)
    plan = plan_of(run)
    if round.number == 0:
        return plan
    before = published.round_of(session, run.id, round.number - 1)
    assert before is not None, "a round opens only after the one before it was published"
    assert before.adapter is not None, "a published round has an adapter"
    earlier = published.round_of(session, run.id, round.number - 2)
    rounds = session.execute(select(Round.id, Round.number).where(Round.id.in_({job.round_id for job in jobs})))
    begun = {row.id: row.number for row in rounds}
    return RoundTask(
        store=store,
        plan=plan,
        round=round.number,
        previous=before.adapter,
        inputs=tuple(_input(job, plan, round.number - begun[job.round_id]) for job in jobs),
        earlier=None if earlier is None else earlier.adapter,
    )


def _input(job: Job, plan: Plan, staleness: int) -> Input:
    assert job.slice is not None, "a submitted job has a slice"
    assert job.weight is not None, "weights are settled when a round closes"
    shrink = _shrink(plan.norm, job.change_norm or 0.0) * (1.0 if plan.buffer is None else plan.buffer.discount(staleness))
    scale = plan.adapter.scale(job.rank)
    directions = None if job.directions is None else tuple(job.directions)
    return Input(job.slice, job.rank, scale, job.weight, shrink, job.base, directions, job=job.id)


def _shrink(norm: NormBound | None, change: float) -> float:
    """The factor in (0, 1] that brings a change of that norm within the plan's bound."""
    return 1.0 if norm is None or change <= norm.bound else norm.bound / change


def publish(
    session: Session, blobs: Blobs, claim: Claim, task: RoundTask | Plan, merged: Merged, seconds: float, now: datetime, pace: float
) -> list[str]:
    """merging → published, in one transaction with manifest, slices and evaluation jobs; gives the clients to wake.

    Does nothing if the claim was lost: somebody else publishes the round. Raises Unavailable, to put the blobs again.
    """
    made = (merged.adapter, *merged.slices.values(), *merged.starts.values())
    sweeping.hold(session, blobs, *dict.fromkeys(blob.digest for blob in made))
    energy = {module: view.model_dump(mode="json") for module, view in merged.energy.items()}
    facts = {"adapter": merged.adapter.digest, "adapter_bytes": merged.adapter.bytes, "energy": energy, "merge_seconds": seconds}
    round = session.get_one(Round, claim.round_id)
    # Before the round, as everywhere: a run that is stopped at this moment gets no more evaluations.
    run = session.get_one(Run, round.run_id, with_for_update={"key_share": True})
    if not _update(session, claim, state=RoundState.published, ended_at=now, merge_until=None, **facts):
        return []
    session.refresh(round)
    origins = _accept(session, round, () if isinstance(task, Plan) else task.inputs)
    round.manifest = manifests.describe(task, merged, run.plan_digest, origins).model_dump(mode="json")
    for rank, blob in merged.slices.items():
        session.add(PublishedSlice(round_id=round.id, rank=rank, digest=blob.digest, bytes=blob.bytes))
    for rank, blob in merged.starts.items():
        session.add(PublishedStart(round_id=round.id, rank=rank, digest=blob.digest, bytes=blob.bytes))
    session.flush()
    events.record(session, now, "round-published", run=run.id, round=round.number, adapter=merged.adapter.digest, seconds=round_to(seconds))
    # Round 0 is measured when the first round opens: machines may not be there yet when a run is made.
    return [] if round.number == 0 else handout.evaluate(session, run, round, now, pace)


def _accept(session: Session, round: Round, inputs: Sequence[Input]) -> dict[str, Origin]:
    """submitted → accepted, for the jobs that were merged; gives where each contribution came from."""
    own = or_(Job.round_id == round.id, Job.counted_in == round.id)
    lock(session, own, Job.kind == JobKind.train)
    query = select(Job, Client.name, Round.number).join(Client, Job.client_id == Client.id).join(Round, Job.round_id == Round.id).where(own)
    found = {job.id: (job, Origin(client, number)) for job, client, number in session.execute(query)}
    merged = [found[input.job][0] for input in inputs]
    for job in merged:
        job.state = JobState.accepted
    clients.clear_rejections(session, sorted(job.client_id for job in merged))
    return {id: origin for id, (_, origin) in found.items()}


def round_to(seconds: float) -> float:
    """Seconds as a person reads them."""
    return float(f"{seconds:.3g}")


def fail(session: Session, claim: Claim, reason: str, now: datetime, *, tries: int = FAILURES) -> None:
    """Free the claim after a failed merge, so that the round is tried again; when that happened `tries` times, the run fails."""
    round = session.get_one(Round, claim.round_id)
    run = session.get_one(Run, round.run_id, with_for_update={"key_share": True})
    failures = round.merge_failures + 1
    if _update(session, claim, merge_until=now, merge_failures=failures) and failures >= tries:
        rounds.fail(session, run, f"round {round.number} could not be merged: {reason}", now)


def tries(error: Exception) -> int:
    """How often a merge may fail like this before its run does: once, where what went in is to blame and repeating cannot help."""
    return 1 if isinstance(error, LASTING) and not error.retryable else FAILURES
