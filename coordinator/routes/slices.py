"""Trained slices on the wire, whole or in parts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.concurrency import run_in_threadpool

from coordinator import errands, jobs, parts, uploads
from coordinator.context import Context
from coordinator.errands import Stored
from coordinator.jobs import Holder
from coordinator.parts import Standing, Whole
from coordinator.problems import binary, documented
from coordinator.routes.requests import COMMON, Bringer, Device, Id, Parts
from coordinator.uploads import Body, Spooled
from protocol import crash, errors
from protocol.crash import Point
from protocol.messages import SliceReceipt

router = APIRouter(prefix="/v1", tags=["agents"])
HELD = (*COMMON, errors.NotFound, errors.StaleLease, errors.JobOver, errors.Conflict)
SENT = (
    *HELD,
    errors.TruncatedBody,
    errors.StalledBody,
    errors.TooLarge,
    errors.DigestMismatch,
    errors.MalformedSlice,
    errors.MismatchedSlice,
    errors.NonFiniteSlice,
    errors.ExcessiveChange,
    errors.Unavailable,
    errors.InsufficientStorage,
)
BODY = {"requestBody": {"required": True, "content": binary("application/octet-stream")}}
PROGRESS = {"Upload-Offset": {"description": "bytes that are here for good", "schema": {"type": "integer"}}}

AT_ONCE = 4  # slices of one client whose bytes are coming; an agent sends one, and one more where a connection was lost
ContentLength = Annotated[int | None, Header(ge=0, le=2**53)]


Epoch = Annotated[int, Header(ge=1, le=2**53, description="epoch of the lease")]


async def sender(job: Id, caller: Device, lease_epoch: Epoch) -> Holder:
    """Who sends the slice of the job that the path names."""
    return Holder(caller.client, job, lease_epoch)


From = Annotated[Holder, Depends(sender)]


@router.put("/jobs/{job}/slice", responses=documented(*SENT), openapi_extra=BODY)
async def put_slice(
    request: Request,
    job: Id,
    caller: Bringer,
    context: Parts,
    content_length: ContentLength = None,
    repr_digest: Annotated[str | None, Header(max_length=300, description="`sha-256=:<base64>:` of the slice (RFC 9530)")] = None,
    *,
    lease_epoch: Epoch,
) -> SliceReceipt:
    """Send the trained slice, whole. What cannot count ends the job: it is rejected with its reason."""
    sender = Holder(caller.client, job, lease_epoch)
    wanted = jobs.wanted(caller.job, sender) if caller.job else await run_in_threadpool(_wanted, context, sender)
    digest = uploads.announced_digest(repr_digest)
    async with _receive(request, context, caller.client, wanted.largest, content_length) as body:
        if body.fault is not None:
            raise body.fault
        return await name(context, await uploads.in_turn(partial(_take, context, sender, wanted, body, digest)))


@router.head(
    "/jobs/{job}/slice",
    status_code=204,
    responses={204: {"description": "how far the upload is", "headers": PROGRESS}, **documented(*HELD)},
)
def slice_standing(sender: From, context: Parts) -> Response:
    """How much of the trained slice is here, and of which: from there the upload goes on."""
    with context.database.read() as session:
        found = parts.standing(session, sender)
    headers = {"Upload-Offset": str(found.offset), "Cache-Control": "no-store"}
    if found.whole is not None:
        headers |= {"Upload-Length": str(found.whole.length), "Repr-Digest": uploads.written_digest(found.whole.digest)}
    if found.complete:
        headers["Upload-Complete"] = "?1"
    return Response(status_code=204, headers=headers)


@router.patch(
    "/jobs/{job}/slice",
    response_model=SliceReceipt,
    responses={
        200: {"description": "the slice is whole, was checked, and is stored", "headers": PROGRESS},
        204: {"description": "the part is here for good; more is to come", "headers": PROGRESS},
        **documented(*SENT, errors.OffsetMismatch),
    },
    openapi_extra=BODY,
)
async def patch_slice(
    request: Request,
    response: Response,
    sender: From,
    context: Parts,
    upload_offset: Annotated[int, Header(ge=0, le=2**53, description="where in the slice these bytes begin")],
    upload_length: Annotated[int, Header(ge=1, le=2**53, description="bytes of the whole slice")],
    repr_digest: Annotated[str, Header(max_length=300, description="`sha-256=:<base64>:` of the whole slice (RFC 9530)")],
    content_length: ContentLength = None,
) -> SliceReceipt | Response:
    """Send the next bytes of the trained slice, as many as the link allows. What came before a cut counts."""
    whole = announced(repr_digest, upload_length)
    wanted, found = await run_in_threadpool(_expected, context, sender, whole, upload_offset)
    response.headers["Upload-Offset"] = str(whole.length)
    if found.complete:
        return SliceReceipt(digest=whole.digest, bytes=whole.length)
    largest = min(parts.LONGEST, whole.length - upload_offset)
    async with _receive(request, context, sender.client, largest, content_length) as body:
        if upload_offset + body.length == whole.length:
            stored = await uploads.in_turn(partial(_finish, context, sender, wanted, whole, body))
            return SliceReceipt(digest=whole.digest, bytes=whole.length) if stored is None else await name(context, stored)
        offset = await uploads.in_turn(partial(_keep, context, sender, whole, upload_offset, body))
        if body.fault is not None:
            raise type(body.fault)(body.fault.detail, offset=offset, length=whole.length)
    return Response(status_code=204, headers={"Upload-Offset": str(offset)})


def announced(repr_digest: str, length: int) -> Whole:
    """The slice that a request's headers tell of. Raises InvalidRequest."""
    digest = uploads.announced_digest(repr_digest)
    if digest is None:
        raise errors.InvalidRequest("Repr-Digest must hold `sha-256=:<base64>:` of the whole slice")
    return Whole(digest, length)


@asynccontextmanager
async def _receive(request: Request, context: Context, client: str, largest: int, announced: int | None) -> AsyncIterator[Body]:
    """The body of a request, spooled. Raises Unavailable where so many of the client's are coming that they would fill the disk."""
    if context.sending[client] >= AT_ONCE:
        raise errors.Unavailable(f"{AT_ONCE} slices of this client are on their way already; send this one when one of them is here")
    settings = context.settings
    context.sending[client] += 1
    try:
        receiving = uploads.receive(
            request.stream(), settings.spool_folder, largest=largest, announced=announced, stall=settings.stall_seconds
        )
        async with receiving as body:
            yield body
    finally:
        context.sending[client] -= 1
        if not context.sending[client]:
            del context.sending[client]


def _wanted(context: Context, sender: Holder) -> jobs.Upload:
    with context.database.read() as session:
        return jobs.upload(session, sender)


def _expected(context: Context, sender: Holder, whole: Whole, offset: int) -> tuple[jobs.Upload, Standing]:
    with context.database.read() as session:
        return expected(jobs.upload(session, sender), whole.length), parts.expect(session, sender, whole, offset)


def expected(wanted: jobs.Upload, length: int) -> jobs.Upload:
    """What a slice of so many bytes must be. Raises TooLarge where it cannot be."""
    if length > wanted.largest:
        raise errors.TooLarge(
            f"the slice is announced with {length} bytes; this job's has at most {wanted.largest}", largest=wanted.largest
        )
    return wanted


def _keep(context: Context, sender: Holder, whole: Whole, start: int, body: Body) -> int:
    """Store a part and note it; gives the offset behind it."""
    if not body.length:
        return start
    with body.spooled() as spooled:
        blob = context.blobs.put_file(spooled.path, spooled.digest)
    crash.reached(Point.part_blob_kept)
    with context.database.write(Point.part_committed) as session:
        offset = parts.add(session, context.blobs, sender, whole, start, blob, context.database.clock(session))
    if not offset:
        raise parts.mismatch(0, whole, f"the slice came in more than {parts.MOST} parts; begin anew, with larger ones")
    return offset


def _finish(context: Context, sender: Holder, wanted: jobs.Upload, whole: Whole, body: Body) -> Stored | None:
    """Join the parts that are here to the last one, and store the slice; nothing where it is stored already."""
    with context.database.read() as session:
        before = parts.stored(session, sender, whole, whole.length - body.length)
    if before is None:  # the same part came twice at once, and the other was quicker
        return None
    try:
        with body.spooled() as last, uploads.joined(context.blobs, before, last, context.settings.spool_folder) as spooled:
            uploads.check_digest(spooled, whole.digest)
            return store(context, sender, wanted, spooled)
    except errors.DigestMismatch:
        with context.database.write() as session:
            parts.drop(session, sender.job)
        raise


def _take(context: Context, sender: Holder, wanted: jobs.Upload, body: Body, digest: str | None) -> Stored:
    """Store a slice that came in one piece."""
    with body.spooled() as spooled:
        uploads.check_digest(spooled, digest)
        return store(context, sender, wanted, spooled)


def store(context: Context, sender: Holder, wanted: jobs.Upload, spooled: Spooled) -> Stored:
    """Check a slice that came whole, and keep it; one that cannot count ends the job."""
    try:
        norm = uploads.check(spooled, wanted, context.blobs)
    except errors.InvalidSlice as error:
        kept = context.quarantine.take(spooled.path, spooled.digest, spooled.length)
        crash.reached(Point.quarantine_blob_kept)
        with context.database.write() as session:
            now = context.database.clock(session)
            jobs.reject(session, sender.client, sender.job, sender.epoch, error, kept, context.settings.rejections, now)
            parts.drop(session, sender.job)
        context.bell.ring_conductor()
        raise
    blob = context.blobs.put_file(spooled.path, spooled.digest)
    crash.reached(Point.slice_blob_kept)
    return Stored(sender, blob, norm, context.blobs)


async def name(context: Context, stored: Stored) -> SliceReceipt:
    """Let the job name its slice. Blob before row: a crash between them leaves an orphan, never a row without bytes."""
    blob = await context.desk.bring(errands.keep, stored.holder.client, stored, Point.slice_committed)
    return SliceReceipt(digest=blob.digest, bytes=blob.bytes)
