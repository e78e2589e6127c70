"""A slice that comes in parts: how far it is, and what is noted of each part.

A part is a blob, durable before the row that names it; the upload's offset moves in the transaction that writes that row, and
only while the client holds the job. So any coordinator on the same database and blob store continues any upload. The last
part gets no row: with it the slice is whole, is stored, and the upload is over.

What is here knows no bytes: only where they begin, how many they are, and the blob that holds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, cast

from sqlalchemy import CursorResult, delete, func, or_, select, update
from sqlalchemy.orm import Session

from coordinator import jobs, sweeping
from coordinator.blobs import Blobs
from coordinator.jobs import Holder
from coordinator.tables import Job, Part, Upload
from protocol import errors
from protocol.messages import BlobRef
from protocol.states import JobState

LONGEST = 256 << 20  # bytes of one part
MOST = 10_000  # parts of one upload
IDLE = timedelta(days=1)  # an upload that nobody continued for so long is given up


@dataclass(frozen=True)
class Whole:
    """What is announced of a slice before all of it is there."""

    digest: str
    length: int  # bytes


@dataclass(frozen=True)
class Standing:
    """How much of a slice is here for good, and of which."""

    offset: int
    whole: Whole | None

    @property
    def complete(self) -> bool:
        return self.whole is not None and self.offset == self.whole.length


def standing(session: Session, sender: Holder) -> Standing:
    """How far the slice of a held job is. Raises NotFound, StaleLease, JobOver; Conflict for a job that takes no slice."""
    job = jobs.training(session, sender)
    upload = session.get(Upload, sender.job)
    if upload is not None:
        return Standing(upload.offset, Whole(upload.digest, upload.length))
    if job.slice is not None and job.slice_bytes is not None:
        return Standing(job.slice_bytes, Whole(job.slice, job.slice_bytes))
    return Standing(0, None)


def expect(session: Session, sender: Holder, whole: Whole, offset: int) -> Standing:
    """How far that very slice is: complete, or as far as the sender says. Another slice than the one under way begins anew.

    Raises OffsetMismatch, NotFound, StaleLease, JobOver, Conflict.
    """
    found = standing(session, sender)
    if found.whole != whole:
        found = Standing(0, whole)
    if offset != found.offset and not found.complete:
        raise mismatch(found.offset, whole, f"the upload stands at byte {found.offset}, yours begins at {offset}; go on from there")
    return found


def mismatch(offset: int, whole: Whole, detail: str) -> errors.OffsetMismatch:
    """The refusal that says from where to go on."""
    return errors.OffsetMismatch(detail, offset=offset, length=whole.length)


def add(session: Session, blobs: Blobs, sender: Holder, whole: Whole, start: int, part: BlobRef, now: datetime) -> int:
    """Note a part that is stored; gives the offset behind it, or 0 where there were too many: then the upload begins anew.

    Raises OffsetMismatch, NotFound, StaleLease, JobOver; Unavailable, to put the blob again.
    """
    sweeping.hold(session, blobs, part.digest)
    _alone(session, sender)  # two first parts at once would both make the upload's row
    if start == 0:
        _begin(session, sender, whole, now)
    here = (Upload.job_id == sender.job, Upload.digest == whole.digest, Upload.length == whole.length, Upload.offset == start)
    held = select(Job.id).where(jobs.held(sender.client, sender.job, sender.epoch)).exists()
    move = update(Upload).where(*here, held).values(offset=start + part.bytes, touched_at=now)
    moved = cast(CursorResult[Any], session.execute(move.execution_options(synchronize_session=False)))
    session.expire_all()
    if moved.rowcount == 0:  # unless that is refused, somebody else was quicker, and the slice is whole
        return expect(session, sender, whole, start).offset
    if (session.scalar(select(func.count()).where(Part.job_id == sender.job)) or 0) >= MOST:
        drop(session, sender.job)
        return 0
    session.add(Part(job_id=sender.job, start=start, bytes=part.bytes, digest=part.digest))
    return start + part.bytes


def _begin(session: Session, sender: Holder, whole: Whole, now: datetime) -> None:
    other = or_(Upload.digest != whole.digest, Upload.length != whole.length)
    session.execute(delete(Upload).where(Upload.job_id == sender.job, other))
    if session.get(Upload, sender.job) is None:
        session.add(Upload(job_id=sender.job, digest=whole.digest, length=whole.length, offset=0, touched_at=now))
        session.flush()


def stored(session: Session, sender: Holder, whole: Whole, offset: int) -> list[str] | None:
    """The blobs that hold a slice up to the offset, in order; None where the whole is stored by now. Raises as `expect` does."""
    _alone(session, sender)  # between the two looks nobody else ends the upload
    if expect(session, sender, whole, offset).complete:
        return None
    query = select(Part.digest).where(Part.job_id == sender.job, Part.start < offset).order_by(Part.start)
    return list(session.scalars(query))


def _alone(session: Session, sender: Holder) -> None:
    """Until the transaction ends, nobody else changes the job or its upload."""
    session.get(Job, sender.job, with_for_update={"key_share": True})


def drop(session: Session, job: str) -> None:
    """Forget how far a job's upload was; the blobs of its parts are left to the sweep."""
    session.execute(delete(Upload).where(Upload.job_id == job))


def sweep(session: Session, now: datetime) -> int:
    """Forget the uploads of jobs that ended, and those that nobody continued; gives how many."""
    over = select(Job.id).where(
        Job.id == Upload.job_id, Job.state.in_((JobState.submitted, JobState.accepted, JobState.rejected, JobState.cancelled))
    )
    gone = delete(Upload).where(or_(over.exists(), Upload.touched_at < now - IDLE))
    return cast(CursorResult[Any], session.execute(gone.execution_options(synchronize_session=False))).rowcount
