"""The coordinator's own command, without the server."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import make_url
from typer.testing import CliRunner

from coordinator import schema, server
from coordinator.__main__ import app
from coordinator.app import build
from coordinator.blobs import Blobs
from coordinator.database import open_engine, place
from coordinator.settings import Settings
from protocol import errors
from tests.federation import Operator, open_federation

ROOT = Path(__file__).parents[2]


def run(folder: Path, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    environment = {"PATH": "", "HLORA_COORDINATOR_DATA": str(folder)} | {f"HLORA_COORDINATOR_{k}": v for k, v in settings.items()}
    return subprocess.run([sys.executable, "-m", "coordinator", *words], cwd=ROOT, env=environment, capture_output=True, text=True)


def call(folder: Path, *words: str) -> str:
    """What the command prints when all is well."""
    result = CliRunner().invoke(app, words, env={"HLORA_COORDINATOR_DATA": str(folder)})
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


async def test_a_token_is_printed_once_and_works_beside_a_running_coordinator(tmp_path: Path) -> None:
    call(tmp_path, "migrate")
    secret = call(tmp_path, "token", "ops")
    made = json.loads(call(tmp_path, "token", "wall", "--role", "viewer", "--json"))

    async with open_federation(f"sqlite:///{tmp_path}/hlora.sqlite", tmp_path) as federation:
        later = call(tmp_path, "token", "later")
        for token in (secret, later):
            assert (await Operator(federation.http, token).call("POST", "/v1/enrolments", json={})).status_code == 201
        assert (made["name"], made["role"], made["revoked"]) == ("wall", "viewer", False)
        assert (await Operator(federation.http, made["token"]).call("POST", "/v1/enrolments", json={})).status_code == 403


def test_a_token_is_not_made_where_no_coordinator_would_know_it(tmp_path: Path) -> None:
    done = run(tmp_path / "elsewhere", "token", "ops")

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: there is no database {tmp_path}/elsewhere/hlora.sqlite")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "elsewhere").exists()


def test_a_database_of_a_newer_program_is_refused_in_one_line(tmp_path: Path) -> None:
    call(tmp_path, "migrate")
    engine = open_engine(f"sqlite:///{tmp_path}/hlora.sqlite")
    with engine.begin() as connection:
        connection.exec_driver_sql("update alembic_version set version_num = '9999'")
    engine.dispose()

    for command in ("migrate", "serve"):
        done = run(tmp_path, command)
        assert (done.returncode, done.stdout) == (1, "")
        assert (
            done.stderr
            == "error: the database has the schema of a newer program: run that one, or go back to a backup that was made before it\n"
        )


def test_migrating_makes_the_database_current_and_says_its_revision(tmp_path: Path) -> None:
    revision = call(tmp_path / "new" / "folder", "migrate")

    assert call(tmp_path / "new" / "folder", "migrate") == revision
    assert schema.is_current(f"sqlite:///{tmp_path}/new/folder/hlora.sqlite")


def test_an_empty_database_is_not_current(tmp_path: Path) -> None:
    assert not schema.is_current(f"sqlite:///{tmp_path}/empty.sqlite")


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def test_several_may_migrate_at_once(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = f"sqlite:///{tmp_path}/a.sqlite" if kind == "sqlite" else request.getfixturevalue("empty_postgres_url")

    with ThreadPoolExecutor(6) as pool:
        revisions = set(pool.map(schema.migrate, [url] * 6))

    assert len(revisions) == 1
    assert schema.is_current(url)


def test_a_refusal_of_the_command_is_one_line_and_exit_code_one(tmp_path: Path) -> None:
    done = run(tmp_path, "token", "../etc")

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: the name:")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("setting", "value"), [("PORT", "x"), ("PORT", "70000"), ("TICK_SECONDS", "0"), ("REJECTIONS", "0")])
def test_a_wrong_setting_is_named_as_the_environment_names_it(tmp_path: Path, setting: str, value: str) -> None:
    done = run(tmp_path, "migrate", **{setting: value})

    assert done.returncode == 1
    assert f"HLORA_COORDINATOR_{setting}: " in done.stderr
    assert done.stderr.count("\n") == 1


FOR_EVER = ["TICK_SECONDS", "HOUSEKEEPING_SECONDS", "SWEEP_GRACE_SECONDS", "STALL_SECONDS", "QUARANTINE_DAYS", "EVENT_DAYS", "KEEP_ROUNDS"]


@pytest.mark.parametrize("setting", FOR_EVER)
@pytest.mark.parametrize("value", ["inf", "nan", "1e12", str(10**30)])
def test_what_was_meant_for_ever_is_refused_with_the_most_that_there_is(tmp_path: Path, setting: str, value: str) -> None:
    variables = {"HLORA_COORDINATOR_DATA": str(tmp_path), f"HLORA_COORDINATOR_{setting}": value}

    found = CliRunner().invoke(app, ["migrate"], env=variables)

    assert isinstance(found.exception, errors.InvalidRequest)
    assert str(found.exception).startswith(f"HLORA_COORDINATOR_{setting}: Input should be ")
    assert not (tmp_path / "hlora.sqlite").exists()


WRONG = ["sqlite://", "sqlite:///:memory:", "mysql://localhost/x", "nonsense", "", "oracle://x", "postgresql+asyncpg://x/y"]
WRONG += ["postgresql://hlora:s3cret@db:54x2/hlora"]


@pytest.mark.parametrize("url", WRONG)
def test_a_database_that_cannot_be_used_is_refused_with_those_that_can(url: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=r"sqlite:///FILE or postgresql://"):
        open_engine(url)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://hlora:s3cret@db:5433/hlora", "postgresql+psycopg://db:5433/hlora"),
        ("postgresql://db/hlora?user=hlora&password=s3cret&sslmode=require", "postgresql+psycopg://db/hlora"),
        ("postgresql:///hlora?host=/run/postgresql&passfile=/run/secret", "postgresql+psycopg:///hlora"),
        ("sqlite:////srv/hlora-data/hlora.sqlite", "sqlite:////srv/hlora-data/hlora.sqlite"),
    ],
)
def test_the_log_says_which_database_and_never_its_password(url: str, said: str) -> None:
    engine = open_engine(url) if url.startswith("postgresql") else None

    assert place(engine.url if engine else make_url(url)) == said


@pytest.mark.parametrize("name", ["my data", "a%41b", "größer", "a#b?c", "\udcff"])
def test_whatever_the_data_folder_is_called_the_blobs_lie_in_it(name: str, tmp_path: Path) -> None:
    settings = Settings(data=tmp_path / name)

    blobs = Blobs.open(settings.blobs)

    assert (tmp_path / name / "blobs" / blobs.put(b"here").digest.replace(":", "/")).read_bytes() == b"here"
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert blobs.url == (tmp_path / name / "blobs").as_uri()


def test_blobs_that_an_earlier_version_put_beside_the_data_folder_are_not_left_behind(tmp_path: Path) -> None:
    (tmp_path / "aAb" / "blobs").mkdir(parents=True)
    settings = Settings(data=tmp_path / "a%41b")

    with pytest.raises(errors.Conflict, match="move that folder to"):
        build(settings)
    (tmp_path / "a%41b").mkdir(exist_ok=True)
    (tmp_path / "aAb" / "blobs").rename(tmp_path / "a%41b" / "blobs")
    assert settings.blobs == (tmp_path / "a%41b" / "blobs").as_uri()


@pytest.mark.parametrize("change", [{"executor": "magic://2"}, {"blobs_url": "ftp://x"}, {"executor": "threads://0"}])
def test_parts_that_do_not_exist_are_refused_before_anything_starts(tmp_path: Path, change: dict[str, str]) -> None:
    with pytest.raises(errors.InvalidRequest):
        build(Settings(data=tmp_path, **change))  # type: ignore[arg-type]


def test_a_database_that_is_away_is_one_line_without_its_password(tmp_path: Path) -> None:
    result = run(tmp_path, "token", "ops", DATABASE_URL="postgresql+psycopg://hlora:hunter2@127.0.0.1:9/hlora")
    assert result.returncode == 1
    assert result.stderr.startswith("error: the database cannot be used: ")
    assert result.stderr.count("\n") == 1
    assert "hunter2" not in result.stderr


@pytest.mark.parametrize("place", ["file", "file/below", "loop/below"])
def test_a_data_folder_that_cannot_be_written_to_is_one_line_that_says_what_to_set(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for command in ("serve", "migrate"):
        result = run(tmp_path / place, command, DATABASE_URL=f"sqlite:///{tmp_path}/{place}/hlora.sqlite")
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.startswith(f"error: {tmp_path}/{place} cannot be the database's folder (")
        assert "HLORA_COORDINATOR_DATA" in result.stderr
        assert result.stderr.count("\n") == 1


def test_blobs_that_cannot_be_written_are_one_line_too(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run(tmp_path, "serve", BLOBS_URL=f"file://{tmp_path}/file/blobs")
    assert result.returncode == 1
    assert f"error: {tmp_path}/file/blobs/sha256 cannot be used: Not a directory; see " in result.stderr
    assert "Traceback" not in result.stderr


def test_an_address_that_cannot_be_listened_on_is_one_line_and_nothing_is_begun(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run(tmp_path, "serve", PORT=str(port))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(
        f"error: 127.0.0.1, port {port}, cannot be listened on (Address already in use): choose another port by --port"
    )
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "hlora.sqlite").exists()
    with pytest.raises(errors.Conflict, match="HLORA_COORDINATOR_HOST"):
        server.check(Settings(host="192.0.2.1"))  # of no machine
