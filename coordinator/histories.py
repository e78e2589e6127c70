"""What clients have done in a run: the last rank of each, and what its last accepted job measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Row, func, select, tuple_
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


def candidate(name: str, labels: Mapping[str, str], profile: Profile, history: History) -> ranks.Candidate:
    """A client as a rank policy sees it."""
    return ranks.Candidate(name=name, labels=labels, profile=profile, measured=history.measured, previous=history.previous)


def of_run(session: Session, run_id: str) -> dict[str, History]:
    """The history of every client that was ever drawn, by its id."""
    return _histories(session, Round.run_id == run_id)


def of_clients(session: Session, run_id: str, client_ids: Sequence[str]) -> dict[str, History]:
    """The histories of those of these clients that were ever drawn."""
    return _histories(session, Round.run_id == run_id, Job.client_id.in_(client_ids))


def _histories(session: Session, *which: ColumnElement[bool]) -> dict[str, History]:
    measured = {
        row.client_id: ranks.Measured(rank=row.rank, usage=Usage.model_validate(row.result["usage"]))
        for row in _latest(session, *which, Job.state == JobState.accepted)
        if row.result is not None
    }
    return {row.client_id: History(row.rank, measured.get(row.client_id)) for row in _latest(session, *which)}


def _latest(session: Session, *which: ColumnElement[bool]) -> Sequence[Row[str, int, dict[str, Any] | None]]:
    """The newest such training job of each client."""
    mine = (Job.kind == JobKind.train, *which)
    newest = select(func.max(Job.round_id), Job.client_id).join(Round, Job.round_id == Round.id).where(*mine).group_by(Job.client_id)
    these = (Job.kind == JobKind.train, tuple_(Job.round_id, Job.client_id).in_(newest))
    return session.execute(select(Job.client_id, Job.rank, Job.result).where(*these)).all()
