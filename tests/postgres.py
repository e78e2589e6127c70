"""PostgreSQL for tests: one private server per session, one fresh database per test.

    postgres_url          a fresh, migrated database            empty_postgres_url    one without any table
    database_url          both kinds of database in turn: a fresh, migrated SQLite file, then PostgreSQL

The server's binaries must be installed (`initdb` on PATH, or where Debian puts it). Where they are not, tests that need
them are skipped and say so; with HLORA_TEST_POSTGRES=required they fail instead.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from coordinator import schema

FAST = "-c fsync=off -c full_page_writes=off -c synchronous_commit=off -c max_connections=200 -c shared_buffers=32MB -c listen_addresses=''"
TEMPLATE = "migrated"
_numbers = count(1)


@dataclass(frozen=True)
class Server:
    """A running server, reached over a socket in its own folder."""

    folder: Path

    def url(self, database: str) -> str:
        """SQLAlchemy's URL of a database."""
        return f"postgresql+psycopg://hlora@/{database}?host={self.folder}"

    def make(self, name: str, template: str) -> None:
        """A new database, made as a copy of another."""
        self._execute(sql.SQL("create database {} template {}").format(sql.Identifier(name), sql.Identifier(template)))

    @contextmanager
    def database(self, template: str) -> Iterator[str]:
        """The URL of a new database, which is dropped when the block ends, whoever is still connected to it."""
        name = f"test{next(_numbers)}"
        self.make(name, template)
        yield self.url(name)
        self._execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))

    def _execute(self, statement: sql.Composed) -> None:
        with psycopg.connect(f"host={self.folder} user=hlora dbname=postgres", autocommit=True) as connection:
            connection.execute(statement)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A private server in a temporary folder, with a migrated database to copy from."""
    binaries = _binaries()
    if binaries is None:
        why = "PostgreSQL's initdb is neither on PATH nor in /usr/lib/postgresql/*/bin; install PostgreSQL's server"
        if os.environ.get("HLORA_TEST_POSTGRES") == "required":
            pytest.fail(why)
        pytest.skip(why)
    folder = Path(tempfile.mkdtemp(prefix="hlora-pg-"))  # short: a socket's path has at most 107 characters
    try:
        _start(binaries, folder)
        try:
            server = Server(folder)
            server.make(TEMPLATE, "template0")
            schema.migrate(server.url(TEMPLATE))
            yield server
        finally:
            _run(binaries / "pg_ctl", "stop", "-D", folder / "data", "-m", "immediate", "-w", folder=folder)
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def postgres_url(postgres: Server) -> Iterator[str]:
    """A fresh, migrated PostgreSQL database."""
    with postgres.database(TEMPLATE) as url:
        yield url


@pytest.fixture
def empty_postgres_url(postgres: Server) -> Iterator[str]:
    """A fresh PostgreSQL database without any table."""
    with postgres.database("template0") as url:
        yield url


@pytest.fixture(scope="session")
def _migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("sqlite") / "migrated.sqlite"
    schema.migrate(f"sqlite:///{file}")
    return file


@pytest.fixture
def sqlite_url(_migrated_sqlite: Path, tmp_path: Path) -> str:
    """A fresh, migrated SQLite file."""
    return f"sqlite:///{shutil.copy(_migrated_sqlite, tmp_path / 'test.sqlite')}"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest) -> str:
    """A fresh, migrated database of either kind."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


def _binaries() -> Path | None:
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "pg_ctl").exists()), None)


def _start(binaries: Path, folder: Path) -> None:
    user = _user()
    if user is not None:
        os.chown(folder, user.pw_uid, user.pw_gid)
    data = folder / "data"
    _run(binaries / "initdb", "-D", data, "-U", "hlora", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync", folder=folder)
    options = f"{FAST} -c unix_socket_directories={folder}"
    _run(binaries / "pg_ctl", "start", "-D", data, "-w", "-l", folder / "log", "-o", options, folder=folder)


def _run(*command: str | Path, folder: Path) -> None:
    user = _user()
    # The server's own output goes to its log; a pipe would stay open for as long as the server runs.
    with (folder.parent / f"{folder.name}.out").open("w+") as out:
        done = subprocess.run(
            [*map(str, command)],
            cwd=folder,
            stdout=out,
            stderr=subprocess.STDOUT,
            user=user and user.pw_uid,
            group=user and user.pw_gid,
            extra_groups=None if user is None else [],
        )
        out.seek(0)
        said = out.read()
    Path(out.name).unlink()
    if done.returncode:
        log = folder / "log"
        pytest.fail(f"{' '.join(map(str, command))} failed: {said}{log.read_text() if log.exists() else ''}")


def _user() -> pwd.struct_passwd | None:
    """Whom to run the server as: it refuses to run as root."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return pwd.getpwnam("postgres" if "postgres" in names else "nobody")
