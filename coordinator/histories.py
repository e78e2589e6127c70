"""What clients have done in a run: the last rank of each, and what its last accepted job measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from sqlalchemy import ColumnElement, Select, and_, bindparam, func, or_, select, tuple_
from sqlalchemy.orm import Session

from coordinator import ranks
from coordinator.tables import Client, Job, Round
from protocol import errors
from protocol.messages import Profile, Usage
from protocol.states import JobKind, JobState


@dataclass(frozen=True)
class History:
    """One client's part in a run so far."""

    previous: int | None = None  # the last rank
    measured: ranks.Measured | None = None
    overburdened: bool = False  # its last job, or one that measured, started from the whole adapter, and ran out of time or memory


NEW = History()
_Found = Select[str, int, dict[str, Any] | None, list[int] | None, bool]  # client, rank, result, directions, overtaxed


def candidate(name: str, labels: Mapping[str, str], profile: Profile, history: History) -> ranks.Candidate:
    """A client as a rank policy sees it."""
    return ranks.Candidate(name, labels, profile, history.measured, history.previous, history.overburdened)


def of_run(session: Session, run_id: str) -> dict[str, History]:
    """The history of every client that was ever drawn, by its id."""
    found = _histories(session, _OF_RUN, {"run": run_id})
    for client in session.connection().scalars(_MEASURED_TOO_MUCH, {"run": run_id, "refusal": errors.MemoryRefusal.slug()}):
        found[client] = replace(found.get(client, NEW), overburdened=True)
    return found


def of_clients(session: Session, run_id: str, client_ids: Sequence[str]) -> dict[str, History]:
    """The histories of those of these clients that were ever drawn."""
    return _histories(session, _OF_CLIENTS, {"run": run_id, "clients": list(client_ids)})


def _histories(session: Session, latest: _Latest, which: Mapping[str, object]) -> dict[str, History]:
    connection = session.connection()
    measured = {
        row.client_id: ranks.Measured(row.rank, Usage.model_validate(row.result["usage"]), whole=row.directions is not None)
        for row in connection.execute(latest.accepted, which)
        if row.result is not None
    }
    return {
        row.client_id: History(row.rank, measured.get(row.client_id), row.directions is not None and row.overtaxed)
        for row in connection.execute(latest.any, which)
    }


# It was begun, and time or memory ran out.
_OVERTAXED = or_(and_(Job.state == JobState.expired, Job.epoch > 0), Job.refusal == errors.MemoryRefusal.slug()).label("overtaxed")


@dataclass(frozen=True)
class _Latest:
    """The newest training job of each client. Built once: to build such a statement costs more than to carry it out."""

    any: _Found
    accepted: _Found

    @classmethod
    def of(cls, *which: ColumnElement[bool]) -> Self:
        return cls(_latest(*which), _latest(*which, Job.state == JobState.accepted))


def _latest(*which: ColumnElement[bool]) -> _Found:
    mine = (Job.kind == JobKind.train, Round.run_id == bindparam("run"), *which)
    newest = select(func.max(Job.round_id), Job.client_id).join(Round, Job.round_id == Round.id).where(*mine).group_by(Job.client_id)
    these = (Job.kind == JobKind.train, tuple_(Job.round_id, Job.client_id).in_(newest))
    return select(Job.client_id, Job.rank, Job.result, Job.directions, _OVERTAXED).where(*these)


# Since the device was last described, for it may have got more memory. What cannot be measured cannot be trained either.
_MEASURED_TOO_MUCH = (
    select(Job.client_id)
    .join(Round, Job.round_id == Round.id)
    .join(Client, Job.client_id == Client.id)
    .where(Round.run_id == bindparam("run"), Job.kind == JobKind.evaluate, Job.refusal == bindparam("refusal"))
    .where(Job.directions.is_not(None), Job.ended_at >= Client.profiled_at)
    .distinct()
)
_OF_RUN = _Latest.of()
_OF_CLIENTS = _Latest.of(Job.client_id.in_(bindparam("clients", expanding=True)))
