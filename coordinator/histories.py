"""What clients have done in a run: the last rank of each, and what its last accepted job measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from sqlalchemy import ColumnElement, Select, bindparam, func, select, tuple_
from sqlalchemy.orm import Session

from coordinator import ranks
from coordinator.tables import Job, Round
from protocol.messages import Profile, Usage
from protocol.states import JobKind, JobState


@dataclass(frozen=True)
class History:
    """One client's part in a run so far."""

    previous: int | None = None  # the last rank
    measured: ranks.Measured | None = None


NEW = History()
_Found = Select[str, int, dict[str, Any] | None, list[int] | None]  # client, rank, result, directions


def candidate(name: str, labels: Mapping[str, str], profile: Profile, history: History) -> ranks.Candidate:
    """A client as a rank policy sees it."""
    return ranks.Candidate(name=name, labels=labels, profile=profile, measured=history.measured, previous=history.previous)


def of_run(session: Session, run_id: str) -> dict[str, History]:
    """The history of every client that was ever drawn, by its id."""
    return _histories(session, _OF_RUN, {"run": run_id})


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
    return {row.client_id: History(row.rank, measured.get(row.client_id)) for row in connection.execute(latest.any, which)}


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
    return select(Job.client_id, Job.rank, Job.result, Job.directions).where(*these)


_OF_RUN = _Latest.of()
_OF_CLIENTS = _Latest.of(Job.client_id.in_(bindparam("clients", expanding=True)))
