"""What operators call for the contributions that were set apart."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse

from coordinator import quarantine
from coordinator.problems import binary, documented
from coordinator.routes.requests import ADMINS, COMMON, READERS, Cursor, Id, Limit, Parts
from protocol import errors
from protocol.views import Page, QuarantineView

reading = APIRouter(prefix="/v1", tags=["quarantine"], dependencies=READERS)
changing = APIRouter(prefix="/v1", tags=["quarantine"], dependencies=ADMINS)
GONE = documented(*COMMON, errors.NotFound)
Of = Annotated[str | None, Query(max_length=40, pattern=r"^[a-z]+-[0-9a-f]{16}$", description="only contributions of this one")]


@reading.get("/quarantine", responses=documented(*COMMON))
def list_quarantine(parts: Parts, run: Of = None, client: Of = None, cursor: Cursor = None, limit: Limit = 100) -> Page[QuarantineView]:
    """Contributions that were rejected, or are suspicious, newest first; of a run, of a client, or all."""
    with parts.database.read() as session:
        return quarantine.list_views(session, run, client, cursor, limit)


@reading.get("/quarantine/{contribution}", responses=GONE)
def show_quarantined(contribution: Id, parts: Parts) -> QuarantineView:
    """One contribution that was set apart, and why."""
    with parts.database.read() as session:
        return quarantine.view(session, contribution)


@changing.get(
    "/quarantine/{contribution}/slice",
    response_class=StreamingResponse,
    responses={200: {"description": "the bytes, as they came", "content": binary("application/octet-stream")}, **GONE},
)
def get_quarantined_slice(contribution: Id, parts: Parts) -> StreamingResponse:
    """The bytes of a contribution that was set apart. Nothing of them was found good: open them as one opens a stranger's file."""
    with parts.database.read() as session:
        slice = quarantine.view(session, contribution).slice
    if slice is None:
        raise errors.NotFound("of this contribution no bytes are kept; what is known of it is still here")
    body = parts.quarantine.find(slice.digest, parts.blobs).chunks(slice.digest)
    headers = {
        "Content-Length": str(slice.bytes),
        "Content-Disposition": f'attachment; filename="{contribution}.safetensors"',
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }
    return StreamingResponse(body, headers=headers, media_type="application/octet-stream")


@changing.delete("/quarantine/{contribution}", status_code=204, responses=GONE)
def delete_quarantined(contribution: Id, parts: Parts) -> None:
    """Forget a contribution that was set apart, with its bytes."""
    parts.quarantine.remove(contribution)
