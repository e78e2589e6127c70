"""A coordinator's work copied to a folder while it goes on, and put back elsewhere."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from sqlalchemy import make_url
from typer.testing import CliRunner, Result

from coordinator import backup, dumps, retention, schema
from coordinator.__main__ import app
from protocol import slices
from protocol.messages import Job
from protocol.states import RunState
from protocol.views import RoundView
from tests import test_upgrading
from tests.coordinator.services import Service
from tests.federation import Clock, Device, Federation, Operator, enrol, make_plan, make_profile, open_federation

PLAN = make_plan(rounds=2, evaluation={"every": 0})
both = pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])


@pytest.fixture
def url(kind: str, request: pytest.FixtureRequest) -> str:
    """A database for a coordinator to work on."""
    found: str = request.getfixturevalue(f"{kind}_url")
    return found


@pytest.fixture
def empty_url(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database of the same kind to restore into."""
    found: str = request.getfixturevalue("empty_postgres_url") if kind == "postgres" else f"sqlite:///{tmp_path}/elsewhere/new.sqlite"
    return found


def command(database_url: str, data: Path, *words: object, **environment: str) -> Result:
    """What the coordinator's command says."""
    settings = {"HLORA_COORDINATOR_DATA": str(data), "HLORA_COORDINATOR_DATABASE_URL": database_url}
    return CliRunner().invoke(app, [str(word) for word in words], env=settings | environment)


def said(database_url: str, data: Path, *words: object) -> str:
    """What it says when all is well."""
    result = command(database_url, data, *words)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout.strip()


async def published(admin: Operator, run: str) -> list[object]:
    """The names of everything that a run published, and of what it was made from."""
    views: list[RoundView] = [await admin.round(run, number) for number in range(PLAN.rounds + 1)]
    return [(view.adapter, view.slices, view.manifest and sorted(input.digest for input in view.manifest.inputs)) for view in views]


def moved_to(federation: Federation, devices: list[Device]) -> list[Device]:
    """The devices, with the same credentials at another coordinator."""
    return [replace(device, http=federation.http) for device in devices]


@both
@pytest.mark.parametrize("away", [0, 61], ids=["leases-held", "leases-lost"])
async def test_a_backup_made_in_the_middle_of_a_round_goes_on_elsewhere_to_the_same_bytes(
    url: str, empty_url: str, away: float, tmp_path: Path
) -> None:
    """The first client had answered, the second had sent half of its slice, the third was at work."""
    clock = Clock()
    async with open_federation(url, tmp_path / "data", clock) as first:
        run, devices, (job, cut, held) = await first.training(PLAN)
        await devices[0].complete(job)
        data = await devices[1].trained(cut)
        await devices[1].patch(cut, data, 0, 1000)

        assert said(url, tmp_path / "data", "backup", tmp_path / "backup").endswith("all sound")

        await first.play([run])
        undisturbed = await published(first.admin, run)

    said(empty_url, tmp_path / "elsewhere", "restore", tmp_path / "backup")
    clock.advance(away)
    async with open_federation(empty_url, tmp_path / "elsewhere", clock) as second:
        one, two, three = moved_to(second, devices)
        if not away:
            assert (await two.head(cut))["Upload-Offset"] == "1000"
            await two.patch(cut, data, 1000, len(data))
            await two.put_result(cut, two.result(cut, slices.digest(data)))
            await three.renew(held, step=1)
            await three.complete(held)
        second.tick()
        clock.advance(1)  # whoever comes after its lease was lost takes its job up again
        admin = Operator(second.http, first.admin.secret)
        (view,) = await replace(second, admin=admin).play([run], [one, two, three])

        assert view.state is RunState.finished
        assert await published(admin, run) == undisturbed
    assert "differs" not in said(empty_url, tmp_path / "elsewhere", "verify", run)


@pytest.fixture
async def undisturbed(_migrated_sqlite: Path, tmp_path: Path) -> list[object]:
    """What the same federation publishes when nothing happens to it."""
    database = shutil.copy(_migrated_sqlite, tmp_path / "undisturbed.sqlite")
    async with open_federation(f"sqlite:///{database}", tmp_path / "undisturbed") as federation:
        await federation.enrol_many(3)
        run = await federation.open(PLAN)
        await federation.play([run])
        return await published(federation.admin, run)


@pytest.fixture
def services(url: str, empty_url: str, tmp_path: Path) -> Iterator[list[Service]]:
    """Two coordinators as processes, not started: one that works, and one that shall follow it elsewhere."""
    made = [
        Service(name, tmp_path, {"DATA": str(tmp_path / name), "DATABASE_URL": database, "EXECUTOR": "threads://1", "TICK_SECONDS": "0.05"})
        for name, database in (("first", url), ("second", empty_url))
    ]
    yield made
    for service in made:
        if service.alive:
            service.end()


@both
@pytest.mark.slow
async def test_a_machine_that_dies_after_its_backup_is_followed_by_another(
    url: str, empty_url: str, services: list[Service], undisturbed: list[object], tmp_path: Path
) -> None:
    """Real processes and real time: the copy is made while the coordinator works, then that is killed and its store is gone."""
    first, second = services
    await asyncio.to_thread(first.start)
    secret = said(url, tmp_path / "first", "token", "ops")
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{first.port}", timeout=60) as http:
        admin = Operator(http, secret)
        devices = [await enrol(admin, f"device {number}", make_profile(train=10 * number)) for number in (1, 2, 3)]
        run = (await admin.create(PLAN)).id
        job, cut, held = [await _coming(device) for device in devices]
        await devices[0].complete(job)
        data = await devices[1].trained(cut)
        await devices[1].patch(cut, data, 0, 1000)
        said(url, tmp_path / "first", "backup", tmp_path / "backup")
    await asyncio.to_thread(first.end)
    shutil.rmtree(tmp_path / "first")

    said(empty_url, tmp_path / "second", "restore", tmp_path / "backup")
    await asyncio.to_thread(second.start)

    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{second.port}", timeout=60) as http:
        admin = Operator(http, secret)
        one, two, three = devices = [replace(device, http=http) for device in devices]
        await two.patch(cut, data, 1000, len(data))
        await two.put_result(cut, two.result(cut, slices.digest(data)))
        await three.complete(held)
        for device in devices:
            await device.complete(await _coming(device))
        while (await admin.run(run)).state is RunState.running:
            await one.next_job(wait=1)
        assert await published(admin, run) == undisturbed
    assert "differs" not in said(empty_url, tmp_path / "second", "verify", run)


async def _coming(device: Device) -> Job:
    """The device's next job, which comes soon."""
    job = await device.next_job(wait=20)
    assert job is not None, f"{device.name} has no job"
    return job


@both
async def test_a_later_backup_copies_what_is_new_and_mends_what_it_had(url: str, tmp_path: Path) -> None:
    async with open_federation(url, tmp_path / "data") as federation:
        _, devices, jobs = await federation.training(PLAN)
        before = said(url, tmp_path / "data", "backup", tmp_path / "backup")
        again = said(url, tmp_path / "data", "backup", tmp_path / "backup")
        await devices[0].complete(jobs[0])
        kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "backup").glob("blobs/sha256/*")}
        damaged = next(iter(kept))
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
        later = said(url, tmp_path / "data", "backup", tmp_path / "backup")

    # Of round 0: the adapter and the slice that was handed out; the other rank's slice.
    assert "and 3 blobs, 3 of them new" in before
    assert "and 3 blobs, 0 of them new (0 bytes)" in again
    assert "and 4 blobs, 2 of them new" in later
    assert [path for path, modified in kept.items() if path.stat().st_mtime_ns != modified] == [damaged]
    assert slices.digest(damaged.read_bytes()) == f"sha256:{damaged.name}"


@both
async def test_what_is_given_up_while_it_is_copied_is_not_missed(url: str, tmp_path: Path) -> None:
    """The retention policy and the sweep come between the copy of the rows and that of the blobs."""
    async with open_federation(url, tmp_path / "data") as federation:
        await federation.enrol_many(3)
        run = await federation.open(PLAN)
        await federation.play([run])
        manifest = (await federation.admin.round(run, 1)).manifest
        assert manifest is not None
        store = federation.parts.blobs

        def meanwhile(_: str) -> None:
            with federation.parts.database.write() as session:
                if retention.forget(session, 1, federation.clock.now):
                    for input in manifest.inputs:
                        store.delete(input.digest)

        done = backup.back_up(url, store, tmp_path / "backup", meanwhile)

    assert done.lost == ()
    assert not any((tmp_path / "backup" / "blobs" / input.digest.replace(":", "/")).exists() for input in manifest.inputs)


@both
async def test_a_backup_that_is_cut_off_leaves_the_one_before_it_whole(url: str, empty_url: str, tmp_path: Path) -> None:
    async with open_federation(url, tmp_path / "data") as federation:
        run, (device, *_), (job, *_) = await federation.training(PLAN)
        said(url, tmp_path / "data", "backup", tmp_path / "backup")
        await device.complete(job)

        def cut(told: str) -> None:
            if told.startswith("blob 2 of 4"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            backup.back_up(url, federation.parts.blobs, tmp_path / "backup", cut)

    assert said(empty_url, tmp_path / "elsewhere", "restore", tmp_path / "backup").endswith("all sound")
    async with open_federation(empty_url, tmp_path / "elsewhere") as restored:
        view = await Operator(restored.http, federation.admin.secret).round(run, 1)
        assert [found.slice for found in view.jobs] == [None, None, None]


@pytest.mark.parametrize("kind", ["sqlite"])
@pytest.mark.parametrize("harm", ["lost", "damaged"])
async def test_a_blob_that_cannot_be_copied_is_named_and_everything_else_is_copied(url: str, harm: str, tmp_path: Path) -> None:
    async with open_federation(url, tmp_path / "data") as federation:
        run = (await federation.admin.create(PLAN)).id
        federation.tick()
        digest = (await federation.admin.round(run, 0)).slices[2].digest
        path = tmp_path / "data" / "blobs" / digest.replace(":", "/")
        path.unlink() if harm == "lost" else path.write_bytes(b"!")

        result = command(url, tmp_path / "data", "backup", tmp_path / "backup")

    assert result.exit_code == 1
    assert f"LOST: {digest}" in result.stdout
    assert "and 2 blobs, 2 of them new" in result.stdout
    assert (tmp_path / "backup" / "database.sqlite").exists()


@pytest.fixture
async def copied(url: str, tmp_path: Path) -> str:
    """A sound backup of a coordinator that has published round 0, in `backup`; gives the digest of a slice that its rows need."""
    async with open_federation(url, tmp_path / "data") as federation:
        run = (await federation.admin.create(PLAN)).id
        federation.tick()
        said(url, tmp_path / "data", "backup", tmp_path / "backup")
        return (await federation.admin.round(run, 0)).slices[2].digest


def in_backup(tmp_path: Path, digest: str) -> Path:
    return tmp_path / "backup" / "blobs" / digest.replace(":", "/")


@pytest.mark.parametrize("kind", ["sqlite"])
@pytest.mark.parametrize("harm", ["lost", "damaged"])
async def test_a_backup_that_lost_a_blob_is_not_put_in_place_until_it_is_complete(
    copied: str, empty_url: str, harm: str, tmp_path: Path
) -> None:
    path = in_backup(tmp_path, copied)
    whole = path.read_bytes()
    path.unlink() if harm == "lost" else path.write_bytes(b"!")

    result = command(empty_url, tmp_path / "elsewhere", "restore", tmp_path / "backup")

    assert result.exit_code == 1
    assert f"LOST: {copied}; the database was NOT put in place" in result.stdout
    assert dumps.is_empty(empty_url)
    assert not list((tmp_path / "elsewhere").glob("*.new*"))
    path.write_bytes(whole)
    assert said(empty_url, tmp_path / "elsewhere", "restore", tmp_path / "backup").endswith("all sound")
    assert not dumps.is_empty(empty_url)


@pytest.mark.parametrize("kind", ["sqlite"])
async def test_who_wants_a_backup_without_what_it_lost_says_so(copied: str, empty_url: str, tmp_path: Path) -> None:
    in_backup(tmp_path, copied).unlink()

    result = command(empty_url, tmp_path / "elsewhere", "restore", tmp_path / "backup", "--incomplete")

    assert result.exit_code == 1
    assert result.stdout.strip().endswith(f"LOST: {copied}")
    assert not dumps.is_empty(empty_url)


@pytest.mark.parametrize("kind", [pytest.param("postgres", marks=pytest.mark.postgres)])
async def test_a_dump_tells_what_is_lost_when_it_is_in_place(copied: str, empty_url: str, tmp_path: Path) -> None:
    in_backup(tmp_path, copied).unlink()

    result = command(empty_url, tmp_path / "elsewhere", "restore", tmp_path / "backup")

    assert result.exit_code == 1
    assert "and 2 blobs, 2 of them new" in result.stdout
    assert result.stdout.strip().endswith(f"LOST: {copied}")


@both
async def test_what_no_row_of_a_backup_needs_is_not_missed(copied: str, empty_url: str, tmp_path: Path) -> None:
    """The folder only grows: what a retention policy gave up since lies there still, and may rot."""
    in_backup(tmp_path, slices.digest(b"given up")).write_bytes(b"rotten")

    assert said(empty_url, tmp_path / "elsewhere", "restore", tmp_path / "backup").endswith("all sound")
    assert in_backup(tmp_path, copied).exists()


@both
async def test_a_backup_of_the_release_before_is_restored_at_the_schema_of_this_one(url: str, empty_url: str, tmp_path: Path) -> None:
    test_upgrading.lay_out(url, tmp_path / "backup")
    copy = tmp_path / "backup" / dumps.name(url)
    dumps.write(url, copy, lambda _: set())

    assert said(empty_url, tmp_path / "elsewhere", "restore", tmp_path / "backup").endswith("all sound")
    assert schema.is_current(empty_url)
    run = test_upgrading.LEFT["tables"]["runs"][0]["id"]
    assert "differs" not in said(empty_url, tmp_path / "elsewhere", "verify", run, "--round", 0)


@both
async def test_nothing_is_restored_over_anything(url: str, empty_url: str, tmp_path: Path) -> None:
    async with open_federation(url, tmp_path / "data") as federation:
        said(url, tmp_path / "data", "backup", tmp_path / "backup")
        over = command(url, tmp_path / "data", "restore", tmp_path / "backup")
        nothing = command(empty_url, tmp_path / "elsewhere", "restore", tmp_path / "data")
        assert (await federation.admin.call("GET", "/v1/runs")).status_code == 200

    assert "nothing is overwritten" in str(over.exception)
    assert "it is no backup of this kind of database" in str(nothing.exception)
    assert dumps.is_empty(empty_url)
    said(empty_url, tmp_path / "elsewhere", "restore", tmp_path / "backup")
    assert not dumps.is_empty(empty_url)


@pytest.mark.parametrize("kind", ["sqlite"])
def test_a_log_that_another_database_left_behind_is_not_played_into_a_restored_one(url: str, tmp_path: Path) -> None:
    said(url, tmp_path / "data", "backup", tmp_path / "backup")
    (tmp_path / "data" / "hlora.sqlite-wal").write_bytes(b"old")

    result = command(f"sqlite:///{tmp_path}/data/hlora.sqlite", tmp_path / "data", "restore", tmp_path / "backup")

    assert "nothing is overwritten" in str(result.exception)


@pytest.mark.parametrize("kind", ["sqlite"])
@pytest.mark.parametrize("data", ["data", "my data"])
def test_a_backup_needs_a_folder_of_its_own(url: str, data: str, tmp_path: Path) -> None:
    result = command(url, tmp_path / data, "backup", tmp_path / data)

    assert "a backup needs a folder of its own" in str(result.exception)
    assert not (tmp_path / data / "database.sqlite").exists()


@pytest.mark.postgres
def test_without_postgresqls_programs_it_is_said_what_to_install(postgres_url: str, tmp_path: Path) -> None:
    result = command(postgres_url, tmp_path, "backup", tmp_path / "backup", PATH="")

    assert "pg_dump is not on the PATH; install PostgreSQL's client programs" in str(result.exception)


@pytest.mark.postgres
def test_a_dump_that_cannot_be_read_leaves_the_database_empty(empty_postgres_url: str, tmp_path: Path) -> None:
    (tmp_path / "backup").mkdir()
    (tmp_path / "backup" / "database.dump").write_bytes(b"PGDMP no more")

    result = command(empty_postgres_url, tmp_path, "restore", tmp_path / "backup")

    assert str(result.exception).startswith("pg_restore failed: ")
    assert dumps.is_empty(empty_postgres_url)


@pytest.mark.postgres
def test_a_password_in_the_url_is_no_obstacle(postgres_url: str, tmp_path: Path) -> None:
    url = make_url(postgres_url).set(password="a:b\\c").render_as_string(hide_password=False)

    said(url, tmp_path, "backup", tmp_path / "backup")


@pytest.mark.postgres
def test_a_password_among_the_urls_options_stands_in_no_list_of_processes(postgres_url: str, tmp_path: Path) -> None:
    """A program in the place of pg_dump tells how it was called, and goes on as pg_dump."""
    url = make_url(postgres_url).update_query_dict({"password": "s3cret"}).render_as_string(hide_password=False)
    programs = tmp_path / "programs"
    programs.mkdir()
    steps = [f'printf "%s\\n" "$@" > {tmp_path}/called', f"cat {tempfile.gettempdir()}/hlora-* > {tmp_path}/file"]
    (programs / "pg_dump").write_text("\n".join(["#!/bin/sh", *steps, f'exec {shutil.which("pg_dump")} "$@"', ""]))
    (programs / "pg_dump").chmod(0o700)

    result = command(url, tmp_path, "backup", tmp_path / "backup", PATH=f"{programs}:{os.environ['PATH']}")

    assert result.exit_code == 0, result.exception
    assert "passfile=" in (tmp_path / "called").read_text()
    assert "s3cret" not in (tmp_path / "called").read_text()
    assert "*:*:*:*:s3cret" in (tmp_path / "file").read_text()
