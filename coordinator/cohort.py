"""Who takes part in a round, at which rank: eligibility, the seeded draw, and the rank policy's choice."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import datetime
from fnmatch import fnmatchcase

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from coordinator import clients, histories, ranks, sizes
from coordinator.histories import NEW, History, candidate
from coordinator.tables import Client, Job, Round
from protocol import errors
from protocol.messages import Profile
from protocol.plan import Plan, SequenceClassification
from protocol.states import JobKind, JobState
from protocol.views import RankView


def eligible(session: Session, run_id: str, plan: Plan, kind: JobKind, now: datetime, pace: float) -> tuple[list[Client], dict[str, str]]:
    """The clients that can do such a job of this run, by name; and for every other one why not."""
    refusals, known = _refusals(session, run_id, plan), histories.of_run(session, run_id)
    able: list[Client] = []
    reasons: dict[str, str] = {}
    everybody = clients.active(session)
    given = clients.pace(pace, clients.crowd(everybody, now))
    for client in everybody:
        reason = _absence(client, now, given) or _obstacle(client, plan, kind, refusals.get(client.id), known.get(client.id, NEW))
        if reason is None:
            able.append(client)
        else:
            reasons[client.name] = reason
    return able, reasons


def _absence(client: Client, now: datetime, pace: float) -> str | None:
    return None if clients.available(client, now, pace) else "not seen lately"


def _obstacle(client: Client, plan: Plan, kind: JobKind, refused: tuple[datetime, str] | None, history: History) -> str | None:
    profile = Profile.model_validate(client.profile)
    dataset = profile.datasets.get(plan.data)
    if dataset is None:
        return f"has no data set {plan.data!r}"
    if (dataset.train if kind is JobKind.train else dataset.held_out) < 1:
        return f"data set {plan.data!r} has no rows to {kind}"
    missing = [column for column in _columns(plan) if dataset.columns and column not in dataset.columns]
    if missing:
        return f"data set {plan.data!r} lacks column {missing[0]!r}"
    allowed = profile.limits.models
    if allowed is not None and not any(fnmatchcase(plan.model.id, pattern) for pattern in allowed):
        return f"its owner does not allow model {plan.model.id}"
    if refused is not None and refused[0] >= client.profiled_at:
        return f"refused: {refused[1]}"
    return ranks.fits(plan, candidate(client.name, client.labels, profile, history))


def _columns(plan: Plan) -> list[str]:
    task = plan.task
    extra = (task.text_pair, task.label) if isinstance(task, SequenceClassification) else (task.prompt,)
    return [column for column in (task.text, *extra) if column is not None]


def _refusals(session: Session, run_id: str, plan: Plan) -> dict[str, tuple[datetime, str]]:
    """When and why each client last refused a job of the run, unless it may have room for a smaller start."""
    query = (
        select(Job.client_id, Job.ended_at, Job.reason)
        .join(Round, Job.round_id == Round.id)
        .where(Round.run_id == run_id, Job.state == JobState.released, Job.refusal.is_not(None))
        .order_by(Job.ended_at)
    )
    if sizes.strategy(plan).portion.optional:
        query = query.where(or_(Job.directions.is_(None), Job.refusal != errors.MemoryRefusal.slug()))
    return {client: (at, reason or "") for client, at, reason in session.execute(query) if at is not None}


def draw(plan: Plan, round: int, attempt: int, already: int, pool: Sequence[Client], count: int) -> list[Client]:
    """`count` clients of the pool, which is in the order of names; the same for the same plan, round, attempt and draw."""
    generator = random.Random(f"{plan.seed}/{round}/{attempt}/{already}")
    return generator.sample(list(pool), min(count, len(pool)))


def assign(
    session: Session, run_id: str, plan: Plan, chosen: Sequence[Client], able: Sequence[Client], seconds: float
) -> dict[str, RankView]:
    """The rank of each chosen client, by its id, and whether in a job of so many seconds it starts from the whole adapter.

    `able` are the clients among which the policy compares.
    """
    population = ranks.Population(examples=tuple(_examples(client, plan) for client in able))
    known = histories.of_run(session, run_id)
    views: dict[str, RankView] = {}
    for client in chosen:
        seen = candidate(client.name, client.labels, Profile.model_validate(client.profile), known.get(client.id, NEW))
        views[client.id] = ranks.begin(plan, seen, ranks.choose(plan, seen, population), seconds)
    return views


def _examples(client: Client, plan: Plan) -> int:
    dataset = Profile.model_validate(client.profile).datasets.get(plan.data)
    return dataset.train if dataset else 0
