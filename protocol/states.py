"""The states of runs, rounds, jobs and clients, and the kinds of jobs and operators: the words that both sides share."""

from __future__ import annotations

from enum import StrEnum


class RunState(StrEnum):
    """running ⇄ paused → finished | stopped | failed."""

    running = "running"
    paused = "paused"
    finished = "finished"
    stopped = "stopped"
    failed = "failed"


class RoundState(StrEnum):
    """open → merging → published; open → abandoned."""

    open = "open"
    merging = "merging"
    published = "published"
    abandoned = "abandoned"


class JobState(StrEnum):
    """queued → leased → submitted → accepted; or expired, released, rejected, cancelled."""

    queued = "queued"
    leased = "leased"
    submitted = "submitted"
    accepted = "accepted"
    expired = "expired"
    released = "released"
    rejected = "rejected"
    cancelled = "cancelled"


class ClientState(StrEnum):
    """active ⇄ paused → revoked."""

    active = "active"
    paused = "paused"
    revoked = "revoked"


class JobKind(StrEnum):
    """What a client is asked to do."""

    train = "train"
    evaluate = "evaluate"


class Role(StrEnum):
    """What an operator's token may do: everything, or read."""

    admin = "admin"
    viewer = "viewer"
