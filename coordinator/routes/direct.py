"""Trained slices by way of the object store: where to put them, and that they are there."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Header

from coordinator import jobs, uploads
from coordinator.arrivals import Arrivals
from coordinator.context import Context
from coordinator.errands import Stored
from coordinator.jobs import Holder
from coordinator.parts import Whole
from coordinator.problems import documented
from coordinator.routes.requests import Parts
from coordinator.routes.slices import HELD, SENT, From, announced, expected, name, store
from protocol import errors
from protocol.messages import SliceReceipt, UploadAddress

router = APIRouter(prefix="/v1", tags=["agents"])
Length = Annotated[int, Header(ge=1, le=2**53, description="bytes of the whole slice")]


@router.post("/jobs/{job}/slice/address", responses=documented(*HELD, errors.TooLarge))
def slice_address(sender: From, context: Parts, upload_length: Length) -> UploadAddress:
    """Where the object store takes the trained slice, in one PUT of just these bytes, without a credential. Then say that it is there."""
    _wanted(context, sender, upload_length)
    return UploadAddress(url=_arrivals(context).address(sender.job, upload_length))


@router.post("/jobs/{job}/slice", responses=documented(*SENT))
async def take_slice(
    sender: From,
    context: Parts,
    upload_length: Length,
    repr_digest: Annotated[str, Header(max_length=300, description="`sha-256=:<base64>:` of the slice (RFC 9530)")],
) -> SliceReceipt:
    """Say that the object store has the slice; it is checked as any other. What cannot count ends the job."""
    whole = announced(repr_digest, upload_length)
    return await name(context, await uploads.in_turn(partial(_take, context, sender, whole)))


def _take(context: Context, sender: Holder, whole: Whole) -> Stored:
    wanted, arrivals = _wanted(context, sender, whole.length), _arrivals(context)
    try:
        with uploads.gathered(arrivals.chunks(sender.job, whole.length), context.settings.spool_folder) as spooled:
            uploads.check_digest(spooled, whole.digest)
            return store(context, sender, wanted, spooled)
    finally:
        with suppress(errors.Unavailable):  # the sweep will take it
            arrivals.drop(sender.job)


def _arrivals(context: Context) -> Arrivals:
    if context.arrivals is None:
        raise errors.Conflict("this coordinator takes slices itself: send it in parts")
    return context.arrivals


def _wanted(context: Context, sender: Holder, length: int) -> jobs.Upload:
    with context.database.read() as session:
        return expected(jobs.upload(session, sender), length)
