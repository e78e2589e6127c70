"""What operators call for runs: create, list, look, pause, resume, stop, rounds, adapters."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Annotated, BinaryIO, cast

from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import select

from coordinator import adapters, aggregation, cards, paging, published, ranks, reports, runs
from coordinator.blobs import GROWING
from coordinator.context import Context
from coordinator.executors import one_thread
from coordinator.jobs import plan_of
from coordinator.problems import binary, documented
from coordinator.reading import open_slice
from coordinator.readout import Wanted
from coordinator.routes.bodies import Bounded
from coordinator.routes.requests import ADMINS, COMMON, READ, READERS, Cursor, Id, Limit, Number, Parts
from coordinator.stores import room
from coordinator.tables import Run
from protocol import errors
from protocol.plan import LARGEST_RANK, Plan
from protocol.views import Description, Page, RoundSummary, RoundView, RunDetail, RunView

reading = APIRouter(prefix="/v1", tags=["runs"], dependencies=READERS)
changing = APIRouter(prefix="/v1", tags=["runs"], dependencies=ADMINS, route_class=Bounded)


@changing.post(
    "/runs",
    status_code=201,
    responses={
        200: {"model": RunDetail, "description": "the run that this key made before"},
        **documented(*READ, errors.InvalidPlan, errors.KeyReused),
    },
)
def create_run(
    body: Plan,
    parts: Parts,
    response: Response,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255, pattern=r"^[\x20-\x7e]+$")] = None,
) -> RunDetail:
    """Start a run from a resolved plan. With an idempotency key the request may be repeated."""
    with parts.database.write() as session:
        run, new = runs.create(session, body, idempotency_key, parts.database.clock(session))
        detail = reports.run_detail(session, run)
    parts.bell.ring_conductor()
    response.status_code = 201 if new else 200
    return detail


@reading.get("/runs", responses=documented(*COMMON))
def list_runs(parts: Parts, cursor: Cursor = None, limit: Limit = 50) -> Page[RunView]:
    """Runs, newest first."""
    with parts.database.read() as session:
        return paging.page(session, select(Run), Run.created_at, Run.id, cursor, limit, lambda run: reports.run_view(session, run))


@reading.get("/runs/{run}", responses=documented(*COMMON, errors.NotFound))
def show_run(run: Id, parts: Parts) -> RunDetail:
    """A run, its plan and where it stands."""
    with parts.database.read() as session:
        return reports.run_detail(session, runs.get(session, run))


CHANGES = documented(*COMMON, errors.NotFound, errors.Conflict)


@changing.post("/runs/{run}/pause", responses=CHANGES)
def pause_run(run: Id, parts: Parts) -> RunView:
    """Hand out no more work; what is being worked on is still taken."""
    with parts.database.write() as session:
        return reports.run_view(session, runs.pause(session, run, parts.database.clock(session)))


@changing.post("/runs/{run}/resume", responses=CHANGES)
def resume_run(run: Id, parts: Parts) -> RunView:
    """Go on with a paused or failed run."""
    with parts.database.write() as session:
        view = reports.run_view(session, runs.resume(session, run, parts.database.clock(session)))
    parts.bell.ring_conductor()
    return view


@changing.post("/runs/{run}/stop", responses=CHANGES)
def stop_run(run: Id, parts: Parts) -> RunView:
    """End a run for good; what it published stays."""
    with parts.database.write() as session:
        return reports.run_view(session, runs.stop(session, run, parts.database.clock(session)))


@reading.get("/runs/{run}/rounds", responses=documented(*COMMON, errors.NotFound))
def list_rounds(run: Id, parts: Parts, cursor: Cursor = None, limit: Limit = 100) -> Page[RoundSummary]:
    """A run's rounds with all their attempts, oldest first."""
    with parts.database.read() as session:
        return reports.summaries(session, runs.get(session, run), cursor, limit)


@reading.get("/runs/{run}/rounds/{number}", responses=documented(*COMMON, errors.NotFound))
def show_round(
    run: Id,
    number: Number,
    parts: Parts,
    attempt: Annotated[int | None, Query(ge=1, le=10**6, description="by default the last")] = None,
) -> RoundView:
    """One round whole: jobs, ranks and why, weights, bytes, seconds, metrics, kept energy."""
    with parts.database.read() as session:
        return reports.round_view(session, runs.get(session, run), number, attempt)


AtRound = Annotated[int | None, Query(ge=0, le=10**6, description="by default the newest published round")]
AtRank = Annotated[int | None, Query(ge=1, le=LARGEST_RANK, description="by default the rank of the global adapter")]
AtShare = Annotated[
    float | None,
    Query(gt=0, le=1, description="for each module the smallest rank that holds this share of its energy; by default one rank for all"),
]
Uniform = Annotated[bool, Query(description="with `kept`: one rank for all modules, the smallest that holds the share of all their energy")]


@reading.get(
    "/runs/{run}/adapter",
    response_class=Response,
    responses={
        200: {
            "description": "a PEFT folder as a zip archive",
            "content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}},
        },
        **documented(*COMMON, errors.NotFound, errors.InsufficientStorage),
    },
)
def get_adapter(
    run: Id, parts: Parts, round: AtRound = None, rank: AtRank = None, kept: AtShare = None, uniform: Uniform = False
) -> Response:
    """A published adapter as a complete PEFT folder, cut to a rank, or to a share of its energy: each module's or all modules'."""
    with _folder(parts, run, round, rank, kept, uniform) as folder:
        file = _nameless()
        adapters.archive(folder, file)
    return _sent(file, "application/zip", {"Content-Disposition": 'attachment; filename="adapter.zip"'})


@reading.get(
    "/runs/{run}/adapter/{file}",
    response_class=Response,
    responses={
        200: {"description": "the file", "content": binary("application/octet-stream")},
        **documented(*COMMON, errors.NotFound, errors.InsufficientStorage),
    },
)
def get_adapter_file(
    run: Id, file: str, parts: Parts, round: AtRound = None, rank: AtRank = None, kept: AtShare = None, uniform: Uniform = False
) -> Response:
    """One file of the PEFT folder."""
    with _folder(parts, run, round, rank, kept, uniform) as folder:
        names = sorted(path.name for path in folder.iterdir())
        if file not in names:
            raise errors.NotFound(f"the adapter's folder has no such file; it has {', '.join(names)}")
        return _sent((folder / file).open("rb"), "application/octet-stream")


@contextmanager
def _folder(parts: Context, run_id: str, number: int | None, rank: int | None, kept: float | None, uniform: bool) -> Iterator[Path]:
    """The PEFT folder on this machine's disk, while the block lasts. Raises InsufficientStorage where there is no room for it."""
    if uniform and kept is None:
        raise errors.InvalidRequest(
            "uniform says how `kept` is meant, the share of the energy; without it all modules have one rank anyway"
        )
    with parts.database.read() as session:
        run = runs.get(session, run_id)
        row = published.round_of(session, run.id, number)
        if row is None or row.adapter is None:
            raise errors.NotFound(f"run {run.name} has not published " + ("an adapter yet" if number is None else f"round {number}"))
        plan = plan_of(run)
        if rank is not None and rank > plan.global_rank:
            raise errors.NotFound(f"the adapter has rank {plan.global_rank}; rank {rank} is more")
        metrics = reports.round_view(session, run, row.number, row.attempt).metrics
        facts = cards.Facts(run=run.name, plan=run.plan_digest, round=row.number, metrics=metrics)
        digest = row.adapter
    one_thread()
    with room(), TemporaryDirectory(prefix=GROWING) as folder:
        adapters.write(plan, facts, open_slice(parts.blobs, digest), Wanted(rank or plan.global_rank, kept, uniform), Path(folder))
        yield Path(folder)


def _nameless() -> BinaryIO:
    """A file that is gone when nobody holds it any more, however the answer ends."""
    return cast(BinaryIO, TemporaryFile(prefix=GROWING))


def _sent(file: BinaryIO, media_type: str, headers: Mapping[str, str] | None = None) -> Response:
    """A whole file as an answer, piece by piece."""
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    return StreamingResponse(_pieces(file), media_type=media_type, headers={"Content-Length": str(length), **(headers or {})})


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    with file:
        yield from iter(partial(file.read, adapters.BLOCK), b"")


@reading.get("/strategies", responses=documented(*COMMON))
def list_strategies() -> list[Description]:
    """The strategies that a plan may name."""
    return aggregation.describe()


@reading.get("/rank-policies", responses=documented(*COMMON))
def list_rank_policies() -> list[Description]:
    """The rank policies that a plan may name."""
    return ranks.describe()
