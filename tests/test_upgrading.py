"""What a coordinator of the release before left, in the middle of a round, goes on after the migration.

`previous_release.json` holds every row and blob of such a coordinator, written down by that release: one client had answered,
the second had sent its slice and not its result, the third had not picked its job up.
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, DateTime, MetaData, Table, text

from coordinator import schema, verification
from coordinator.blobs import Blobs
from coordinator.database import open_engine
from protocol.messages import Metric, Progress, Result, Usage
from protocol.states import JobState, RunState
from tests.federation import Device, Federation, Operator, done, make_plan, open_federation

LEFT: dict[str, Any] = json.loads((Path(__file__).parent / "previous_release.json").read_text("utf-8"))
NAMES = ("one", "two", "three")
PLAN = make_plan(evaluation={"every": 2})
METRICS = {"accuracy": Metric(value=0.5, weight=3)}


def lay_out(url: str, folder: Path) -> None:
    """The database and the blobs as they were left."""
    engine = open_engine(url)
    with engine.execution_options(writes=True).begin() as connection:
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parents[1] / "migrations"))
        config.attributes["connection"] = connection
        command.downgrade(config, LEFT["revision"])
        found = MetaData()
        found.reflect(connection)
        for table in found.sorted_tables:
            if rows := LEFT["tables"].get(table.name):
                connection.execute(table.insert(), [typed(table, row) for row in rows])
        go_on_numbering(connection)
    engine.dispose()
    blobs = Blobs.open(f"file://{folder / 'blobs'}")
    for digest, data in LEFT["blobs"].items():
        assert blobs.put(base64.b64decode(data)).digest == digest


def typed(table: Table, row: dict[str, Any]) -> dict[str, Any]:
    """A row of JSON with its times as times."""
    times = {column.name for column in table.columns if isinstance(column.type, DateTime)}
    return {
        name: datetime.fromisoformat(value).replace(tzinfo=UTC) if name in times and value is not None else value
        for name, value in row.items()
    }


def go_on_numbering(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        for table in ("rounds", "events"):
            connection.execute(text(f"select setval(pg_get_serial_sequence('{table}', 'id'), (select max(id) from {table}))"))


@pytest.fixture
async def upgraded(database_url: str, tmp_path: Path) -> AsyncIterator[Federation]:
    """A coordinator of this release over what the one before it left."""
    lay_out(database_url, tmp_path)
    assert not schema.is_current(database_url)
    schema.migrate(database_url)
    assert schema.is_current(database_url)
    async with open_federation(database_url, tmp_path) as federation:
        yield federation


async def test_a_run_of_the_release_before_goes_on_to_rounds_that_can_be_made_again(upgraded: Federation) -> None:
    http = upgraded.admin.http
    admin = Operator(http, "hla_operator")
    one, two, three = (Device(http, f"hlc_{name}", name=name) for name in NAMES)
    run = LEFT["tables"]["runs"][0]["id"]
    assert (await admin.round(run, 1)).contributions == 3

    (held,) = [row for row in LEFT["tables"]["jobs"] if row["state"] == JobState.leased]
    progress = Progress(epoch=held["epoch"], phase="train", step=1)
    done(await two.call("POST", f"/v1/jobs/{held['id']}/lease", json=progress.model_dump(mode="json")))
    result = Result(epoch=held["epoch"], slice=held["slice"], examples=5, metrics=METRICS, usage=Usage(seconds=2.0))
    done(await two.call("PUT", f"/v1/jobs/{held['id']}/result", json=result.model_dump(mode="json")))
    await three.complete(await three.take())
    (view,) = await upgraded.play([run], [one, two, three])

    assert view.state is RunState.finished
    left = {row["id"]: row["number"] for row in LEFT["tables"]["rounds"]}
    for row in LEFT["tables"]["slices"]:
        assert (await admin.round(run, left[row["round_id"]])).slices[row["rank"]].digest == row["digest"]
    for number in range(2, PLAN.rounds + 1):
        assert (await admin.round(run, number)).contributions == 3
    database, blobs = upgraded.parts.database, upgraded.parts.blobs
    with database.read() as session, ThreadPoolExecutor(1) as executor:
        records = verification.records(session, verification.find(session, run), None, blobs.url)
        verifier = verification.Verifier(database, blobs, executor, lambda _: None)
        found = {finding.round: finding.verdict for finding in verifier.verify(records)}
    # The release before wrote down no manifests; its rounding need not be ours.
    assert {number: found[number] for number in range(2, PLAN.rounds + 1)} == dict.fromkeys(
        range(2, PLAN.rounds + 1), verification.Verdict.agrees
    )


def test_the_release_before_left_something_in_every_table_that_it_had() -> None:
    tables = {"clients", "enrolments", "events", "jobs", "rounds", "runs", "slices", "tokens"}

    assert {name for name, rows in LEFT["tables"].items() if rows} == tables
