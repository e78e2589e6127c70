"""Named places where a process can be told to die at once, so that tests can prove that nothing is lost there.

A process that was not armed when it started passes every one of them. On the coordinator's side each event is such a place
too, under its own name, right after the transaction that records it.
"""

from __future__ import annotations

import os
import signal
from enum import StrEnum
from threading import Lock

from protocol import errors


class Point(StrEnum):
    """Where something has just become durable. The agent's points begin with `agent-`."""

    # blobs that no row names yet
    slice_blob_kept = "slice-blob-kept"
    part_blob_kept = "part-blob-kept"
    quarantine_blob_kept = "quarantine-blob-kept"
    first_blob_kept = "first-blob-kept"
    adapter_blob_kept = "adapter-blob-kept"
    # commits that record no event
    job_leased = "job-leased"
    lease_renewed = "lease-renewed"
    part_committed = "part-committed"
    slice_committed = "slice-committed"
    merge_claimed = "merge-claimed"
    beat_committed = "beat-committed"
    # commits that record an event, by its kind
    run_created = "run-created"
    run_paused = "run-paused"
    run_resumed = "run-resumed"
    run_finished = "run-finished"
    round_opened = "round-opened"
    round_closed = "round-closed"
    round_published = "round-published"
    job_submitted = "job-submitted"
    job_accepted = "job-accepted"
    job_released = "job-released"
    job_rejected = "job-rejected"
    # the agent's: files, and what the coordinator has said
    agent_checkpoint_kept = "agent-checkpoint-kept"
    agent_work_kept = "agent-work-kept"
    agent_slice_acknowledged = "agent-slice-acknowledged"
    agent_result_acknowledged = "agent-result-acknowledged"


_armed: dict[str, int] = {}  # how often each point is passed until the process dies, that time included
_lock = Lock()


def arm(at: str) -> None:
    """Let this process die at a point, given as NAME, or as NAME:N for the n-th time. Raises InvalidRequest for any other name."""
    name, _, times = at.partition(":")
    if name not in set(Point) or not (times or "1").isdecimal() or int(times or 1) < 1:
        raise errors.InvalidRequest(f"a point to crash at is NAME or NAME:N; {at!r} came, and the names are {', '.join(Point)}")
    _armed[name] = int(times or 1)


def reached(point: str) -> None:
    """Die here, as by `kill -9`, if the process was armed for it."""
    if point not in _armed:
        return
    with _lock:
        _armed[point] -= 1
        if _armed[point] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
