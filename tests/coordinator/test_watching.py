"""What operators and machines watch: the stream of events, the counts, and whether the coordinator works."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import psycopg
import pytest
from sqlalchemy import URL, make_url

from coordinator import events
from protocol import VERSION, errors
from protocol.states import Role, RunState
from protocol.views import Event, Health
from tests.coordinator.sockets import Address, serving
from tests.federation import Federation, Operator, enrol, make_plan, make_profile, make_token, read, refusal

SOON = 20  # seconds; a stream that says nothing for so long has lost something


@pytest.fixture
def address(database_url: str, tmp_path: Path) -> Iterator[Address]:
    with serving(database_url, tmp_path) as address:
        yield address


@pytest.fixture
async def viewer(address: Address) -> AsyncIterator[Operator]:
    async with httpx.AsyncClient(base_url=address.url, timeout=SOON, trust_env=False) as http:
        yield Operator(http, make_token(address.parts, Role.viewer))


@pytest.fixture
async def admin(address: Address, viewer: Operator) -> Operator:
    return Operator(viewer.http, make_token(address.parts, Role.admin))


async def follow(viewer: Operator, until: str, *, last: int | None = None, run: str | None = None) -> list[Event]:
    """The events of a stream, up to the first of a kind."""
    headers = {"Authorization": f"Bearer {viewer.secret}"} | ({} if last is None else {"Last-Event-ID": str(last)})
    found: list[Event] = []
    async with viewer.http.stream("GET", "/v1/events", headers=headers, params={} if run is None else {"run": run}) as response:
        assert (response.status_code, response.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        lines: dict[str, str] = {}
        async for line in response.aiter_lines():
            name, _, value = line.partition(": ")
            if line:
                lines[name] = value
                continue
            if "data" in lines:
                found.append(Event.model_validate_json(lines["data"]))
                assert (lines["id"], lines["event"]) == (str(found[-1].id), found[-1].kind)
                if found[-1].kind == until:
                    return found
            lines = {}
    return found


async def test_a_stream_ends_when_its_token_is_revoked(viewer: Operator, admin: Operator) -> None:
    stream = asyncio.ensure_future(follow(viewer, "never"))
    await asyncio.sleep(0.3)
    tokens = await admin.call("GET", "/v1/tokens")
    (mine,) = [token for token in tokens.json()["items"] if token["role"] == Role.viewer]
    await admin.call("DELETE", f"/v1/tokens/{mine['id']}")
    assert await asyncio.wait_for(stream, SOON) == []


async def test_changes_of_state_are_told_as_they_happen_and_from_where_one_left_off(viewer: Operator, admin: Operator) -> None:
    before = asyncio.ensure_future(follow(viewer, "run-finished"))
    await asyncio.sleep(0.3)
    device = await enrol(admin, "device", make_profile())
    run = (await admin.create(make_plan(cohort={"target": 1, "quorum": 1}, rounds=1))).id
    for _ in range(3):
        job = await device.next_job(wait=20)
        assert job is not None
        await device.complete(job)

    seen = await asyncio.wait_for(before, SOON)

    own = [event.kind for event in seen if event.run == run]
    assert own[0] == "run-created"
    assert [kind for kind in own if kind.startswith(("round", "run"))] == [
        "run-created",
        "round-published",
        "round-opened",
        "round-closed",
        "round-published",
        "run-finished",
    ]
    assert seen[0].kind == "client-enrolled"
    assert {event.client for event in seen if event.kind.startswith("job-")} == {"device"}

    middle = seen[3].id
    assert await follow(viewer, "run-finished", last=middle) == [event for event in seen if event.id > middle]
    assert await follow(viewer, "run-finished", last=0, run=run) == [event for event in seen if event.run == run]


async def test_events_of_a_long_absence_all_come(address: Address, viewer: Operator) -> None:
    with address.parts.database.write() as session:
        now = address.parts.database.clock(session)
        for number in range(1201):
            events.record(session, now, "last" if number == 1200 else "one-of-many", number=number)

    seen = await asyncio.wait_for(follow(viewer, "last", last=0), SOON)

    assert [event.facts["number"] for event in seen] == list(range(1201))


async def test_a_stream_ends_when_the_coordinator_stops(address: Address, viewer: Operator) -> None:
    stream = asyncio.ensure_future(follow(viewer, "never"))
    await asyncio.sleep(0.3)

    address.parts.bell.close()

    assert await asyncio.wait_for(stream, SOON) == []


@pytest.mark.parametrize("run", ["x", "run-1", "run-0000000000000000' or 1=1", ""])
async def test_a_stream_of_what_is_no_run_is_refused(small: Federation, run: str) -> None:
    assert isinstance(refusal(await small.viewer.call("GET", "/v1/events", params={"run": run})), errors.InvalidRequest)


# --- counts and health --------------------------------------------------------------------------------------------------


async def test_counts_stand_by_state(small: Federation) -> None:
    _, devices, _ = await small.training(make_plan())
    await small.admin.change_client(devices[0], state="paused")

    response = await small.viewer.call("GET", "/metrics")

    assert response.headers["content-type"].startswith("text/plain")
    lines = set(response.text.splitlines())
    assert {
        'hlora_clients{state="active"} 2.0',
        'hlora_clients{state="paused"} 1.0',
        'hlora_runs{state="running"} 1.0',
        'hlora_jobs{state="leased"} 3.0',
    } <= lines


async def test_health_needs_no_credential_and_readiness_says_what_was_looked_at(small: Federation) -> None:
    assert read(await small.nobody.call("GET", "/healthz"), Health) == Health(status="ok", version=VERSION)
    ready = read(await small.nobody.call("GET", "/readyz"), Health)
    assert ready.checks == {"database": "ok", "blobs": "ok"}


async def test_without_its_blob_store_the_coordinator_is_not_ready(small: Federation) -> None:
    blobs = small.parts.settings.data / "blobs"
    blobs.rename(blobs.with_name("elsewhere"))
    blobs.touch()

    response = await small.nobody.call("GET", "/readyz")

    assert isinstance(refusal(response), errors.Unavailable)


@contextmanager
def away(url: str) -> Iterator[None]:
    """The database is not there while the block lasts."""
    parsed = make_url(url)
    with sqlite_away(Path(str(parsed.database))) if parsed.get_backend_name() == "sqlite" else postgres_away(parsed):
        yield


@contextmanager
def sqlite_away(file: Path) -> Iterator[None]:
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("alter table runs rename to gone")
        yield
        connection.execute("alter table gone rename to runs")


@contextmanager
def postgres_away(url: URL) -> Iterator[None]:
    with psycopg.connect(f"host={url.query['host']} user={url.username} dbname=postgres", autocommit=True) as connection:
        connection.execute(f"alter database {url.database} allow_connections false")
        connection.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", [url.database])
        yield
        connection.execute(f"alter database {url.database} allow_connections true")


async def test_a_database_that_is_away_for_a_while_is_waited_for(address: Address, database_url: str, admin: Operator) -> None:
    devices = [await enrol(admin, name, make_profile()) for name in ("one", "two")]
    plan = make_plan(cohort={"target": 2, "quorum": 2}, rounds=1, evaluation={"every": 0})

    with away(database_url):
        for method, path in (("GET", "/readyz"), ("GET", "/v1/runs")):
            response = await admin.call(method, path)
            error = refusal(response)
            assert isinstance(error, errors.Unavailable)
            assert error.retryable
            assert response.headers["retry-after"] == "2"
        assert (await admin.call("GET", "/healthz")).status_code == 200
        await asyncio.sleep(0.3)  # a few looks of the conductor

    run = (await admin.create(plan)).id
    for device in devices:
        job = await device.next_job(wait=20)
        assert job is not None
        await device.complete(job)
    while (view := await admin.run(run)).state is RunState.running:
        await devices[0].next_job(wait=1)
    assert view.state is RunState.finished


async def test_openapi_describes_problems_as_problems(small: Federation) -> None:
    document = json.loads((await small.nobody.call("GET", "/openapi.json")).content)

    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for status, response in operation["responses"].items():
                if status >= "400":
                    assert set(response["content"]) == {"application/problem+json"}, (method, path, status)
