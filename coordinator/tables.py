"""The tables. What must never be is a constraint here, not only a line of Python elsewhere."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import JSON, CheckConstraint, ForeignKey, Index, Integer, String, UniqueConstraint, false, text
from sqlalchemy.orm import Mapped, mapped_column

from coordinator.columns import Base, Document, Serial
from protocol.states import ClientState, JobKind, JobState, Role, RoundState, RunState


def _state(kind: type[RunState | RoundState | JobState | ClientState | JobKind | Role]) -> CheckConstraint:
    column = {"RunState": "state", "RoundState": "state", "JobState": "state", "ClientState": "state", "JobKind": "kind", "Role": "role"}
    name = column[kind.__name__]
    return CheckConstraint(f"{name} in ({', '.join(repr(str(member)) for member in kind)})", name=name)


class Token(Base):
    """An operator's token."""

    __tablename__ = "tokens"
    __table_args__ = (_state(Role),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str]
    role: Mapped[str] = mapped_column(String(16))
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[datetime]
    revoked: Mapped[bool] = mapped_column(default=False)


class Enrolment(Base):
    """A token with which machines become clients."""

    __tablename__ = "enrolments"
    __table_args__ = (CheckConstraint("uses_left >= 0", name="uses_left"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    uses_left: Mapped[int]
    expires_at: Mapped[datetime]
    revoked: Mapped[bool] = mapped_column(default=False)
    labels: Mapped[Document]
    created_at: Mapped[datetime]


class Client(Base):
    """A participating machine."""

    __tablename__ = "clients"
    __table_args__ = (_state(ClientState),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    state: Mapped[str] = mapped_column(String(16), default=ClientState.active)
    reason: Mapped[str | None]
    labels: Mapped[Document]
    profile: Mapped[Document]
    profiled_at: Mapped[datetime]
    rejections: Mapped[int] = mapped_column(default=0)
    last_seen: Mapped[datetime | None]
    enrolled_at: Mapped[datetime]
    enrolment_id: Mapped[str | None] = mapped_column(ForeignKey("enrolments.id"))


class Run(Base):
    """One federated fine-tuning."""

    __tablename__ = "runs"
    __table_args__ = (_state(RunState),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16), index=True)
    reason: Mapped[str | None]
    plan: Mapped[Document]
    plan_digest: Mapped[str] = mapped_column(String(71))
    key: Mapped[str | None] = mapped_column(String(255), unique=True)
    created_at: Mapped[datetime] = mapped_column(index=True)
    ended_at: Mapped[datetime | None]
    waiting_since: Mapped[datetime | None]  # for clients while it is running, for an operator while it is paused or failed


class Round(Base):
    """One attempt at one round of a run."""

    __tablename__ = "rounds"
    __table_args__ = (UniqueConstraint("run_id", "number", "attempt"), _state(RoundState))

    id: Mapped[int] = mapped_column(Serial, primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), index=True)
    number: Mapped[int]
    attempt: Mapped[int]
    state: Mapped[str] = mapped_column(String(16), index=True)
    reason: Mapped[str | None]
    opened_at: Mapped[datetime]
    closes_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    merge_epoch: Mapped[int] = mapped_column(default=0)
    merge_failures: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    merge_until: Mapped[datetime | None]
    merge_seconds: Mapped[float | None]
    adapter: Mapped[str | None] = mapped_column(String(71), index=True)
    adapter_bytes: Mapped[int | None]
    energy: Mapped[Document | None]
    manifest: Mapped[Document | None] = mapped_column(deferred=True)  # long, and looked at only when somebody asks
    forgotten: Mapped[bool] = mapped_column(default=False, server_default=false())


class PublishedSlice(Base):
    """The slice of one rank that a round published."""

    __tablename__ = "slices"

    round_id: Mapped[int] = mapped_column(ForeignKey("rounds.id"), primary_key=True)
    rank: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(String(71), index=True)
    bytes: Mapped[int]


class PublishedStart(Base):
    """What training at one rank starts from after a round, where that is not the slice of that rank."""

    __tablename__ = "starts"

    round_id: Mapped[int] = mapped_column(ForeignKey("rounds.id"), primary_key=True)
    rank: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(String(71), index=True)
    bytes: Mapped[int]


class Job(Base):
    """One client's part in a round: the unique triple makes repeated requests one."""

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("round_id", "client_id", "kind"),
        _state(JobState),
        _state(JobKind),
        CheckConstraint("state != 'submitted' or kind != 'train' or slice is not null", name="no_result_without_slice"),
        Index("ix_jobs_client_state", "client_id", "state"),
        Index("ix_jobs_state", "state"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    round_id: Mapped[int] = mapped_column(ForeignKey("rounds.id"))
    client_id: Mapped[str] = mapped_column(ForeignKey("clients.id"))
    kind: Mapped[str] = mapped_column(String(16))
    state: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str | None]
    refusal: Mapped[str | None] = mapped_column(String(64))
    rank: Mapped[int]
    rank_view: Mapped[Document]
    base: Mapped[str] = mapped_column(String(71), index=True)
    base_bytes: Mapped[int]
    directions: Mapped[list[int] | None] = mapped_column(JSON(none_as_null=True))  # those of the base that are trained; all if none
    epoch: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime]
    deadline: Mapped[datetime]
    lease_until: Mapped[datetime | None]
    progress: Mapped[Document | None]
    progress_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]
    slice: Mapped[str | None] = mapped_column(String(71), index=True)
    slice_bytes: Mapped[int | None]
    fetched_bytes: Mapped[int] = mapped_column(default=0)
    change_norm: Mapped[float | None]
    result: Mapped[Document | None]
    known_rows: Mapped[int | None]  # to train on, or to measure on: as the client's profile said when it was drawn
    weight: Mapped[float | None]
    counted_in: Mapped[int | None] = mapped_column(ForeignKey("rounds.id"), index=True)
    max_steps: Mapped[int | None]


class Upload(Base):
    """A slice that comes in parts: how far it is. The offset moves only together with a part's row."""

    __tablename__ = "uploads"
    __table_args__ = (CheckConstraint('"offset" <= length', name="offset"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    digest: Mapped[str] = mapped_column(String(71))
    length: Mapped[int]
    offset: Mapped[int] = mapped_column(default=0)
    touched_at: Mapped[datetime] = mapped_column(index=True)


class Part(Base):
    """One durable part of an upload; its bytes are a blob."""

    __tablename__ = "parts"

    job_id: Mapped[str] = mapped_column(ForeignKey("uploads.job_id", ondelete="CASCADE"), primary_key=True)
    start: Mapped[int] = mapped_column(primary_key=True)
    bytes: Mapped[int]
    digest: Mapped[str] = mapped_column(String(71), index=True)


class Quarantined(Base):
    """A contribution that was set apart."""

    __tablename__ = "quarantine"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    at: Mapped[datetime] = mapped_column(index=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    client_id: Mapped[str] = mapped_column(ForeignKey("clients.id"), index=True)
    problem: Mapped[str] = mapped_column(String(64))
    reason: Mapped[str]
    digest: Mapped[str | None] = mapped_column(String(71))
    bytes: Mapped[int | None]


class Condemned(Base):
    """A blob that nothing names and that is about to be deleted; whoever wants to name it puts it again first."""

    __tablename__ = "condemned"

    digest: Mapped[str] = mapped_column(String(71), primary_key=True)
    at: Mapped[datetime]


class Beat(Base):
    """When a coordinator was last at work: a single row."""

    __tablename__ = "beats"
    __table_args__ = (CheckConstraint("id = 1", name="single"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    at: Mapped[datetime]


class Housekept(Base):
    """When some coordinator last began to keep house: a single row, made with the table."""

    __tablename__ = "housekeeping"
    __table_args__ = (CheckConstraint("id = 1", name="single"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    at: Mapped[datetime]


class Event(Base):
    """One change of state, for the log that operators follow."""

    __tablename__ = "events"

    id: Mapped[int] = mapped_column(Serial, primary_key=True)
    at: Mapped[datetime]
    kind: Mapped[str] = mapped_column(String(64))
    run_id: Mapped[str | None] = mapped_column(String(40), index=True)
    round: Mapped[int | None]
    client: Mapped[str | None] = mapped_column(String(64))
    facts: Mapped[Document]
