"""Blobs on the wire: the slice to start from, in ranges; or where the object store has it."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Header, Path, Response
from fastapi.responses import StreamingResponse

from coordinator import jobs
from coordinator.context import Context
from coordinator.problems import binary, documented
from coordinator.routes.requests import COMMON, Device, Parts
from protocol import errors
from protocol.strict import Digest

PIECE = 1 << 18  # bytes of a blob read at a time: of each fetch under way two are in memory
router = APIRouter(prefix="/v1", tags=["agents"])


@router.get(
    "/blobs/{digest}",
    response_class=StreamingResponse,
    responses={
        200: {"description": "the bytes", "content": binary("application/octet-stream")},
        206: {"description": "the range that was asked for"},
        304: {"description": "the client has it"},
        307: {"description": "the bytes are at `Location`, a signed address of the object store: no credential is to go there"},
        **documented(*COMMON, errors.NotFound, errors.RangeNotSatisfiable),
    },
)
def get_blob(
    digest: Annotated[Digest, Path()],
    caller: Device,
    context: Parts,
    range: Annotated[str | None, Header(max_length=200, description="one range, such as `bytes=1000-`")] = None,
    if_none_match: Annotated[str | None, Header(max_length=400)] = None,
    prefer: Annotated[str | None, Header(max_length=200, description="`direct`: from the object store, if it may be")] = None,
) -> Response:
    """A slice that one of the client's jobs names. Its name is its digest, so it never changes."""
    with context.database.read() as session:
        if not jobs.may_read(session, caller.client, digest):
            raise errors.NotFound(f"no job of this client names {digest}")
    headers = {"ETag": f'"{digest}"', "Cache-Control": "private, immutable, max-age=31536000", "Accept-Ranges": "bytes"}
    if if_none_match is not None and f'"{digest}"' in if_none_match:
        return Response(status_code=304, headers=headers)
    if (address := _direct(context, prefer, digest)) is not None:
        return Response(status_code=307, headers={"Location": address, "Preference-Applied": "direct", "Cache-Control": "no-store"})
    size = context.blobs.size(digest)
    start, stop = _range(range, size)
    if (start, stop) != (0, size):
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    headers["Content-Length"] = str(stop - start)
    body = context.blobs.chunks(digest, start, stop, PIECE)
    code = 206 if "Content-Range" in headers else 200
    if stop - start <= PIECE:  # handing one piece from thread to thread takes longer than reading it
        return Response(b"".join(body), status_code=code, headers=headers, media_type="application/octet-stream")
    return StreamingResponse(body, status_code=code, headers=headers, media_type="application/octet-stream")


def _direct(context: Context, prefer: str | None, digest: str) -> str | None:
    """Where the store gives a blob to whoever asks it, if that is switched on, and wanted."""
    seconds = context.settings.direct_seconds
    wanted = re.search(r"(?:^|[,;\s])direct(?:$|[,;\s])", prefer or "")
    return context.blobs.address(digest, seconds) if seconds is not None and wanted else None


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
