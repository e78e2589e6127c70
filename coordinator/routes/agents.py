"""What agents call: enrol, profile, poll for work, fetch a slice, renew, give back, send a slice, send a result."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Header, Path, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from coordinator import clients, jobs, uploads
from coordinator.access import Caller
from coordinator.context import Context
from coordinator.problems import binary, documented
from coordinator.routes.requests import COMMON, Device, Id, Newcomer, Parts
from protocol import VERSION, errors
from protocol.messages import ClientSelf, Enrol, Enrolled, GiveBack, Job, Profile, Progress, Renewal, Result, ResultReceipt, SliceReceipt
from protocol.plan import Digest

router = APIRouter(prefix="/v1", tags=["agents"])
HELD = (errors.NotFound, errors.StaleLease, errors.JobOver)


@router.post("/clients", status_code=201, responses=documented(*COMMON, errors.EnrolmentOver, errors.NameTaken))
def enrol(body: Enrol, caller: Newcomer, parts: Parts) -> Enrolled:
    """Redeem an enrolment token with a name and a profile; the credential is told this once."""
    with parts.database.write() as session:
        return clients.enrol(session, caller.id, body, parts.database.clock(session))


@router.get("/clients/me", responses=documented(*COMMON))
def whoami(caller: Device, parts: Parts) -> ClientSelf:
    """What the coordinator knows of the calling client."""
    with parts.database.read() as session:
        return clients.itself(session, caller.id)


@router.put("/clients/me/profile", responses=documented(*COMMON))
def set_profile(body: Profile, caller: Device, parts: Parts) -> ClientSelf:
    """Replace the profile. A run that this device refused is offered to it again."""
    with parts.database.write() as session:
        answer = clients.set_profile(session, caller.id, body, parts.database.clock(session))
    parts.bell.ring_conductor()
    return answer


@router.post(
    "/jobs/next",
    response_model=Job,
    responses={
        200: {"description": "a job under a fresh lease; the one that the client holds already, if the last answer was lost"},
        204: {"description": "nothing to do; ask again after `Retry-After` seconds"},
        **documented(*COMMON, errors.OutdatedAgent),
    },
)
async def next_job(
    caller: Device,
    parts: Parts,
    prefer: Annotated[str | None, Header(max_length=200, description="`wait=20`: wait for work so many seconds")] = None,
    hlora_version: Annotated[str | None, Header(max_length=40, description="the agent's version")] = None,
) -> Job | Response:
    """Long poll for work."""
    _check_version(hlora_version)
    until = time.monotonic() + _wait(prefer, parts.settings.poll_seconds)
    with parts.bell.listen(caller.id) as ear:
        while True:
            job = await run_in_threadpool(_look, parts, caller)
            if job is not None:
                return job
            if not await ear.rung(until - time.monotonic()):
                return Response(status_code=204, headers={"Retry-After": "1"})


def _look(parts: Context, caller: Caller) -> Job | None:
    with parts.database.read() as session:
        now = parts.database.clock(session)
        last = clients.get(session, caller.id).last_seen
        fresh = last is not None and now - last < clients.SEEN_EVERY
        if fresh and not jobs.waiting(session, caller.id):
            return None
    with parts.database.write() as session:
        now = parts.database.clock(session)
        job = jobs.next_for(session, caller.id, now)
        clients.seen(session, caller.id, now)  # after the job, as everywhere: two requests that wait for each other would never end
        return job


def _wait(prefer: str | None, longest: float) -> float:
    """Seconds that the client prefers to wait (RFC 7240), at most `longest`; 0 if it said nothing of it."""
    found = re.search(r"(?:^|[,;\s])wait\s*=\s*(\d{1,6})", prefer or "")
    return min(longest, float(found.group(1))) if found else 0.0


def _check_version(version: str | None) -> None:
    """Before 1.0 the second number is the one that breaks; an agent that names no version is taken at its word."""
    if version is None:
        return
    came = re.fullmatch(r"(\d{1,6})\.(\d{1,6})\.\S+", version)
    major, minor = (int(n) for n in VERSION.split(".")[:2])
    if came is None or (int(came[1]), int(came[2])) < (major, minor):
        raise errors.OutdatedAgent(f"this coordinator needs agents of version {major}.{minor} or newer, yours is {version}; upgrade it")


@router.post("/jobs/{job}/lease", responses=documented(*COMMON, *HELD))
def renew(job: Id, body: Progress, caller: Device, parts: Parts) -> Renewal:
    """Prolong the lease and say how far the work is; the answer says whether to go on."""
    with parts.database.write() as session:
        return jobs.renew(session, caller.id, job, body, parts.database.clock(session))


@router.delete("/jobs/{job}/lease", status_code=204, responses=documented(*COMMON, *HELD))
def give_back(job: Id, body: GiveBack, caller: Device, parts: Parts) -> None:
    """Give the job back, with the reason."""
    with parts.database.write() as session:
        jobs.release(session, caller.id, job, body, parts.database.clock(session))
    parts.bell.ring_conductor()


@router.put(
    "/jobs/{job}/slice",
    responses=documented(
        *COMMON,
        *HELD,
        errors.Conflict,
        errors.TruncatedBody,
        errors.TooLarge,
        errors.DigestMismatch,
        errors.MalformedSlice,
        errors.MismatchedSlice,
        errors.NonFiniteSlice,
        errors.ExcessiveChange,
    ),
    openapi_extra={"requestBody": {"required": True, "content": binary("application/octet-stream")}},
)
async def put_slice(
    request: Request,
    job: Id,
    caller: Device,
    parts: Parts,
    lease_epoch: Annotated[int, Header(ge=1, le=2**53, description="epoch of the lease")],
    content_length: Annotated[int | None, Header(ge=0, le=2**53)] = None,
    repr_digest: Annotated[str | None, Header(max_length=300, description="`sha-256=:<base64>:` of the slice (RFC 9530)")] = None,
) -> SliceReceipt:
    """Send the trained slice, whole. What cannot count ends the job: it is rejected with its reason."""
    wanted = await run_in_threadpool(_upload, parts, caller, job, lease_epoch)
    parts.settings.spool_folder.mkdir(parents=True, exist_ok=True)
    async with uploads.receive(request.stream(), parts.settings.spool_folder, wanted.largest, content_length, repr_digest) as spooled:
        return await run_in_threadpool(_store, parts, caller, job, lease_epoch, wanted, spooled)


def _upload(parts: Context, caller: Caller, job: str, epoch: int) -> jobs.Upload:
    with parts.database.read() as session:
        return jobs.upload(session, caller.id, job, epoch)


def _store(parts: Context, caller: Caller, job: str, epoch: int, wanted: jobs.Upload, spooled: uploads.Spooled) -> SliceReceipt:
    try:
        norm = uploads.check(spooled, wanted, parts.blobs)
    except errors.InvalidSlice as error:
        with parts.database.write() as session:
            jobs.reject(session, caller.id, job, epoch, str(error), parts.settings.rejections, parts.database.clock(session))
        parts.bell.ring_conductor()
        raise
    blob = parts.blobs.put_file(spooled.path)  # blob before row: a crash between them leaves an orphan, never a row without bytes
    with parts.database.write() as session:
        jobs.uploaded(session, parts.blobs, caller.id, job, epoch, blob, norm)
    return SliceReceipt(digest=blob.digest, bytes=blob.bytes)


@router.put(
    "/jobs/{job}/result",
    status_code=201,
    responses={
        200: {"model": ResultReceipt, "description": "the same result again"},
        **documented(*COMMON, *HELD, errors.DifferentResult, errors.InvalidResult),
    },
)
def put_result(job: Id, body: Result, caller: Device, parts: Parts, response: Response) -> ResultReceipt:
    """Say how the job ended. Repeating the same result is answered like the first time."""
    with parts.database.write() as session:
        receipt, new = jobs.answer(session, caller.id, job, body, parts.database.clock(session))
    parts.bell.ring_conductor()
    response.status_code = 201 if new else 200
    return receipt


@router.get(
    "/blobs/{digest}",
    response_class=StreamingResponse,
    responses={
        200: {"description": "the bytes", "content": binary("application/octet-stream")},
        206: {"description": "the range that was asked for"},
        304: {"description": "the client has it"},
        **documented(*COMMON, errors.NotFound, errors.RangeNotSatisfiable),
    },
)
def get_blob(
    digest: Annotated[Digest, Path()],
    caller: Device,
    parts: Parts,
    range: Annotated[str | None, Header(max_length=200, description="one range, such as `bytes=1000-`")] = None,
    if_none_match: Annotated[str | None, Header(max_length=400)] = None,
) -> Response:
    """A slice that one of the client's jobs names. Its name is its digest, so it never changes."""
    with parts.database.read() as session:
        if not jobs.may_read(session, caller.id, digest):
            raise errors.NotFound(f"no job of this client names {digest}")
    headers = {"ETag": f'"{digest}"', "Cache-Control": "private, immutable, max-age=31536000", "Accept-Ranges": "bytes"}
    if if_none_match is not None and f'"{digest}"' in if_none_match:
        return Response(status_code=304, headers=headers)
    size = parts.blobs.size(digest)
    start, stop = _range(range, size)
    if (start, stop) != (0, size):
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    headers["Content-Length"] = str(stop - start)
    body: Iterator[bytes] = parts.blobs.chunks(digest, start, stop)
    code = 206 if "Content-Range" in headers else 200
    return StreamingResponse(body, status_code=code, headers=headers, media_type="application/octet-stream")


def _range(header: str | None, size: int) -> tuple[int, int]:
    """The half-open byte range that is asked for; what is not one range of bytes is passed over, as RFC 9110 allows."""
    found = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", (header or "").strip())
    if found is None or found.groups() == ("", ""):
        return 0, size
    first, last = found.groups()
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    if start >= stop:
        raise errors.RangeNotSatisfiable(f"the blob has {size} bytes; the range {header} lies outside", size=size)
    return start, stop
