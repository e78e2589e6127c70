"""The composition root: everything is built here and handed on.

Resources are built when the application is made, not by its lifespan, because an ASGI transport in the same process runs
no lifespan; the lifespan only starts and stops the conductor's thread.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

from fastapi import FastAPI

from coordinator import problems
from coordinator.arrivals import Arrivals
from coordinator.bell import Bell
from coordinator.blobs import Blobs
from coordinator.conductor import Conductor
from coordinator.context import Context
from coordinator.database import Clock, Database, database_clock
from coordinator.desk import Desk
from coordinator.executors import open_executor
from coordinator.housekeeping import Housekeeping
from coordinator.quarantine import Quarantine
from coordinator.relay import relaying
from coordinator.routes import agents, direct, fetching, fleet, pages, quarantine, runs, slices
from coordinator.settings import Settings
from protocol import VERSION, errors

DESCRIPTION = """Federated LoRA fine-tuning over HTTP. Agents poll for jobs, fetch the slice to start from, and send back
what they trained; operators make runs and follow their rounds. Every refusal is an RFC 9457 problem."""


def build(settings: Settings, clock: Clock = database_clock) -> Context:
    """The coordinator's parts, connected. Raises InvalidRequest for an executor or store that does not exist, or cannot meet."""
    if settings.blobs.startswith("memory://") and not settings.executor.startswith(("threads://", "cuda://")):
        raise errors.InvalidRequest(
            f"blobs at {settings.blobs} are in this process alone; {settings.executor} would look for them in another: "
            "use threads://N, or keep the blobs at file:///FOLDER"
        )
    if settings.direct_seconds is not None and not settings.blobs.startswith("s3://"):
        raise errors.InvalidRequest(
            f"HLORA_COORDINATOR_DIRECT_SECONDS needs an object store that signs addresses; nobody else reaches blobs at {settings.blobs}: "
            "keep them in s3://BUCKET/PREFIX, or leave it unset"
        )
    database = Database(settings.database, clock)
    blobs = Blobs.open(settings.blobs)
    executor = open_executor(settings.executor)
    bell = Bell()
    conductor = Conductor(database, blobs, executor, bell, pace=settings.poll_seconds)
    arrivals = Arrivals.beside(settings.blobs, settings.direct_seconds) if settings.blobs.startswith("s3://") else None
    apart = Quarantine.beside(blobs, database, settings.quarantine_bytes, timedelta(days=settings.quarantine_days))
    return Context(
        settings=settings,
        database=database,
        blobs=blobs,
        executor=executor,
        bell=bell,
        desk=Desk(database),
        conductor=conductor,
        quarantine=apart,
        arrivals=arrivals,
        housekeeping=Housekeeping(database, blobs, apart, arrivals, settings),
    )


def create_app(context: Context) -> FastAPI:
    """The application over given parts. Its lifespan runs the conductor; without lifespan, whoever built it ticks by hand."""
    app = FastAPI(
        title="HLoRA coordinator",
        version=VERSION,
        description=DESCRIPTION,
        lifespan=_conducting,
        # What is measured is at /metrics; the framework would look before each request whether somebody wants to hear more.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.context = context
    problems.install(app)
    for router in (agents.router, slices.router, fetching.router, direct.router, pages.public, pages.reading):
        app.include_router(router)
    for operators in (runs, fleet, quarantine):
        app.include_router(operators.reading)
        app.include_router(operators.changing)
    return app


@asynccontextmanager
async def _conducting(app: FastAPI) -> AsyncIterator[None]:
    parts: Context = app.state.context
    stop = threading.Event()
    threads = [
        threading.Thread(target=parts.conductor.run, args=(stop, parts.settings.tick_seconds), name="conductor"),
        threading.Thread(target=parts.housekeeping.run, args=(stop,), name="housekeeping"),
    ]
    with relaying(parts.database.engine, parts.bell):
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            parts.bell.close()
            for thread in threads:
                thread.join()
    parts.close()
