"""What machines and people look at: health, metrics, and the stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest
from sqlalchemy import func, select, text

from coordinator import access, clients, events, quarantine
from coordinator.context import Context
from coordinator.problems import documented
from coordinator.routes.requests import COMMON, READERS, Parts, Reader
from coordinator.tables import Job, Run
from protocol import VERSION, errors
from protocol.views import Event, Health

public = APIRouter()
reading = APIRouter(dependencies=READERS)
EVENTS_PAUSE = 0.5  # seconds between two looks for new events


@public.get("/healthz", tags=["health"])
def healthz() -> Health:
    """The process answers."""
    return Health(status="ok", version=VERSION)


@public.get("/readyz", tags=["health"], responses=documented(errors.Unavailable))
def readyz(parts: Parts) -> Health:
    """Database and blob store answer too."""
    with parts.database.read() as session:
        session.execute(text("select 1 from runs limit 1"))
    parts.blobs.exists(f"sha256:{0:064}")
    return Health(status="ok", version=VERSION, checks={"database": "ok", "blobs": "ok"})


@reading.get(
    "/metrics",
    tags=["health"],
    response_class=Response,
    responses={200: {"description": "Prometheus text", "content": {"text/plain": {"schema": {"type": "string"}}}}, **documented(*COMMON)},
)
def metrics(parts: Parts) -> Response:
    """Counts of clients, runs and jobs by state, of what was set apart and swept, for Prometheus; a viewer token is enough."""
    registry = CollectorRegistry()
    with parts.database.read() as session:
        tables = {
            "clients": clients.counts(session),
            "runs": {row.state: row.total for row in session.execute(select(Run.state, func.count().label("total")).group_by(Run.state))},
            "jobs": {row.state: row.total for row in session.execute(select(Job.state, func.count().label("total")).group_by(Job.state))},
        }
        problems = quarantine.counts(session)
    for noun, counts in tables.items():
        gauge = Gauge(f"hlora_{noun}", f"{noun} by state", ["state"], registry=registry)
        for state, count in counts.items():
            gauge.labels(state).set(count)
    apart = Gauge("hlora_quarantined", "contributions set apart by problem", ["problem"], registry=registry)
    for problem, count in problems.items():
        apart.labels(problem).set(count)
    Counter("hlora_swept_blobs", "blobs without a name that this process deleted", registry=registry).inc(parts.housekeeping.swept)
    return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


@reading.get(
    "/v1/events",
    tags=["runs"],
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "server-sent events; each `data` is an Event",
            "content": {"text/event-stream": {"schema": Event.model_json_schema()}},
        },
        **documented(*COMMON),
    },
)
async def follow(
    parts: Parts,
    reader: Reader,
    run: Annotated[str | None, Query(max_length=40, pattern=r"^[a-z]+-[0-9a-f]{16}$", description="only events of this run")] = None,
    last_event_id: Annotated[int | None, Header(ge=0, le=2**53, description="go on after this event")] = None,
) -> StreamingResponse:
    """Changes of state as they happen; a client that lost the connection goes on after `Last-Event-ID`."""
    start = last_event_id if last_event_id is not None else await run_in_threadpool(_newest, parts)
    return StreamingResponse(_stream(parts, reader.id, start, run), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def _stream(parts: Context, token: str, last: int, run: str | None) -> AsyncIterator[str]:
    yield ": connected\n\n"
    while not parts.bell.closed:
        found = await run_in_threadpool(_after, parts, token, last, run)
        if found is None:
            return
        for event in found:
            last = event.id
            yield f"id: {event.id}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n"
        if not found:
            await asyncio.sleep(EVENTS_PAUSE)


def _newest(parts: Context) -> int:
    with parts.database.read() as session:
        return events.newest(session)


def _after(parts: Context, token: str, last: int, run: str | None) -> list[Event] | None:
    """What came since; none for a token that was revoked meanwhile."""
    with parts.database.read() as session:
        return events.after(session, last, run) if access.stands(session, token) else None
