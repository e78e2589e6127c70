"""Runs: made from a plan, paused, resumed, stopped, finished; and what one look of the conductor does for a run."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from coordinator import access, aggregation, events, handout, ranks, rounds
from coordinator.jobs import ACTIVE, plan_of
from coordinator.tables import Job, Round, Run
from protocol import errors, feasible
from protocol.plan import Plan, Sides
from protocol.states import JobState, RoundState, RunState

ENDED = (RunState.finished, RunState.stopped, RunState.failed)


def check(plan: Plan) -> None:
    """Raises InvalidPlan for a plan that could never be carried out by this coordinator."""
    if plan.layout is None or plan.model.fingerprint is None:
        raise errors.InvalidPlan(
            "the plan is not resolved: it lacks the base model's layout or fingerprint; `python -m admin runs create` resolves it, "
            "`python -m admin plans resolve` writes the resolved plan"
        )
    feasible.check(plan)
    strategy = aggregation.check(plan.strategy)
    strategy.check(plan)
    ranks.check(plan.ranks)
    if plan.buffer is not None:
        _check_buffered(plan, strategy)
    if plan.continues is not None and strategy.sides is not Sides.both:
        raise errors.InvalidPlan(f"strategy {plan.strategy.name} trains b on rows of a that only its seed decides; it continues no adapter")


def _check_buffered(plan: Plan, strategy: aggregation.Strategy) -> None:
    if not strategy.stale:
        able = ", ".join(name for name in aggregation.names() if aggregation.load(name).stale)
        raise errors.InvalidPlan(
            f"strategy {plan.strategy.name} merges what clients have, and an old version would pull the new one back; "
            f"with a buffer take one that merges what they changed: {able}"
        )
    if plan.cohort.over_selection != 1:
        raise errors.InvalidPlan(
            f"cohort.over_selection is {plan.cohort.over_selection:g}, and with a buffer nobody's work is in vain; leave it out, and let "
            "cohort.target be the clients that are at work at a time"
        )


def _check_continued(session: Session, plan: Plan, digest: str) -> None:
    """Raises InvalidPlan where the adapter is not one that this coordinator has published, or is one of something else."""
    wanted = _subject(plan)
    publishers = select(Run).join(Round, Round.run_id == Run.id).where(Round.adapter == digest).order_by(Run.created_at, Run.id)
    others = None
    for run in session.scalars(publishers):  # the same bytes may be round 0 of several
        found = _subject(plan_of(run))
        others = others or (run, [what for what, ours in wanted.items() if found[what] != ours])
        if found == wanted:
            return
    if others is None:
        raise errors.InvalidPlan(
            f"no round of this coordinator has published the adapter {digest} that the plan continues; "
            "`python -m admin rounds show RUN N --json` tells a round's"
        )
    raise errors.InvalidPlan(
        f"the plan continues an adapter of run {others[0].id}, whose {' and '.join(others[1])} are others than the plan's"
    )


def _subject(plan: Plan) -> dict[str, object]:
    """What an adapter's numbers are numbers of."""
    assert plan.layout is not None, "plans of runs are resolved"
    return {
        "model": plan.model.fingerprint,
        "adapted modules": plan.layout.modules,
        "tensors kept whole": plan.layout.full,
        "labels": getattr(plan.task, "labels", None),
    }


def create(session: Session, plan: Plan, key: str | None, now: datetime) -> tuple[Run, bool]:
    """Make a run; gives it and whether it is new: the same idempotency key and plan give the same run.

    Raises InvalidPlan, KeyReused.
    """
    check(plan)
    before = None if key is None else session.scalar(select(Run).where(Run.key == key))
    if before is not None:
        if plan_of(before).digest() != plan.digest():  # not the stored one: an older version may have known fewer options
            raise errors.KeyReused("this idempotency key made a run from another plan; use a fresh key", run=before.id)
        return before, False
    if plan.continues is not None:
        _check_continued(session, plan, plan.continues)
    run = Run(
        id=access.new_id("run"),
        name=plan.name,
        state=RunState.running,
        plan=plan.model_dump(mode="json"),
        plan_digest=plan.digest(),
        key=key,
        created_at=now,
    )
    try:
        with session.begin_nested():
            session.add(run)
    except IntegrityError:  # the same key made a run at this moment; the second look finds it
        return create(session, plan, key, now)
    rounds.begin(session, run, now)
    events.record(session, now, "run-created", run=run.id, name=run.name)
    return run, True


def get(session: Session, id: str) -> Run:
    """A run's row. Raises NotFound."""
    run = session.get(Run, id)
    if run is None:
        raise errors.NotFound(f"there is no run {id}")
    return run


def _mine(session: Session, id: str) -> Run:
    """A run's row, until the transaction ends nobody else's: operators and conductors change it one after the other."""
    run = get(session, id)
    session.refresh(run, with_for_update={"key_share": True})
    return run


def pause(session: Session, id: str, now: datetime) -> Run:
    """running → paused: work in hand goes on, none is handed out. Raises NotFound, Conflict."""
    run = _in(session, id, (RunState.running, RunState.paused), "pause")
    if run.state == RunState.running:
        rounds.pause(session, run, "by an operator", now)
    return run


def resume(session: Session, id: str, now: datetime) -> Run:
    """paused → running; a failed run goes on from its last published round. The time between counts for nobody who waited.

    Raises NotFound, Conflict.
    """
    run = _in(session, id, (RunState.running, RunState.paused, RunState.failed), "resume")
    if run.state != RunState.running:
        if run.waiting_since is not None:
            handout.give_time_back(session, run, run.waiting_since, now)
        run.state, run.reason, run.ended_at, run.waiting_since = RunState.running, None, None, None
        session.execute(update(Round).where(Round.run_id == id, Round.state == RoundState.merging).values(merge_failures=0))
        events.record(session, now, "run-resumed", run=run.id)
    return run


def stop(session: Session, id: str, now: datetime) -> Run:
    """End a run for good; what was published stays. Raises NotFound, Conflict."""
    run = _in(session, id, (RunState.running, RunState.paused, RunState.failed, RunState.stopped), "stop")
    if run.state != RunState.stopped:
        run.state, run.reason, run.ended_at = RunState.stopped, "by an operator", now
        session.execute(
            update(Round)
            .where(Round.run_id == id, Round.state.in_((RoundState.open, RoundState.merging)))
            .values(state=RoundState.abandoned, reason="the run was stopped", ended_at=now)
            .execution_options(synchronize_session=False)
        )
        own = select(Round.id).where(Round.run_id == id)
        handout.end(session, Job.round_id.in_(own), state=JobState.cancelled, reason="the run was stopped", now=now)
        events.record(session, now, "run-stopped", run=run.id)
    return run


def _in(session: Session, id: str, states: tuple[RunState, ...], verb: str) -> Run:
    run = _mine(session, id)
    if run.state not in states:
        raise errors.Conflict(f"run {run.name} is {run.state}; a run that is {run.state} cannot {verb}", state=run.state)
    return run


def alive(session: Session) -> list[str]:
    """The ids of all runs that go on, or whose last jobs have not ended, oldest first."""
    working = select(Round.run_id).join(Job, Job.round_id == Round.id).where(Job.state.in_(ACTIVE))
    query = select(Run.id).where(or_(Run.state == RunState.running, Run.id.in_(working)))
    return list(session.scalars(query.order_by(Run.created_at, Run.id)))


def answered(session: Session) -> bool:
    """Whether a round is open that has jobs, and all of them are over: it can go on at once."""
    return session.connection().execute(_ANSWERED).first() is not None


_JOBS = select(Job.id).where(Job.round_id == Round.id)
# Built once: the conductor asks this twenty times a second while a fleet answers.
_ANSWERED = (
    select(Round.id)
    .join(Run, Round.run_id == Run.id)
    .where(Run.state == RunState.running, Round.state == RoundState.open)
    .where(_JOBS.exists(), ~_JOBS.where(Job.state.in_(ACTIVE)).exists())
    .limit(1)
)


def fail(session: Session, id: str, reason: str, now: datetime) -> None:
    """running → failed, because of a defect that it met; it can be resumed when that is mended."""
    rounds.fail(session, _mine(session, id), reason, now)


def advance(session: Session, id: str, now: datetime, pace: float) -> list[str]:
    """Take the run one step on: end what is overdue; open, fill, close or abandon a round, or finish; gives the clients to wake."""
    run = _mine(session, id)
    handout.expire(session, run, now)
    round = rounds.current(session, id)
    if run.state != RunState.running or round is None or round.state == RoundState.merging:
        return []
    if round.state == RoundState.open:
        return _carry_on(session, run, round, now, pace)
    if round.state == RoundState.published and round.number >= plan_of(run).rounds:
        _finish(session, run, round, now)
        return []
    return rounds.open_next(session, run, round, now, pace)


def _carry_on(session: Session, run: Run, round: Round, now: datetime, pace: float) -> list[str]:
    """Close or abandon an open round, or fill it up."""
    decided = rounds.verdict(session, run, round, now)
    if decided is None:
        woken = handout.refill(session, run, round, now, pace)
        decided = None if woken else rounds.last_verdict(session, run, round)
        if decided is None:
            return woken
    if decided.close:
        rounds.close(session, run, round, decided.reason, now)
    else:
        rounds.abandon(session, run, round, decided.reason, now)
    return []


def _finish(session: Session, run: Run, last: Round, now: datetime) -> None:
    """running → finished, when the last adapter has been measured."""
    query = select(Job.id).where(Job.round_id == last.id, Job.state.in_(ACTIVE)).limit(1)
    if session.scalar(query) is not None:
        run.reason = "waits for the last evaluation"
        return
    run.state, run.reason, run.ended_at = RunState.finished, None, now
    events.record(session, now, "run-finished", run=run.id)
