"""PostgreSQL for tests: one private server per session, one fresh database per test.

    postgres_url          a fresh, migrated database            empty_postgres_url    one without any table
    database_url          both kinds of database in turn: a fresh, migrated SQLite file, then PostgreSQL

The server's binaries must be installed (`initdb` on PATH, or where Debian puts it). Where they are not, tests that need
them are skipped and say so; with HLORA_TEST_POSTGRES=required they fail instead.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.postgres import Server, binaries, running
from coordinator import schema

FAST = "-c fsync=off -c full_page_writes=off -c synchronous_commit=off -c max_connections=200 -c shared_buffers=32MB -c listen_addresses=''"
TEMPLATE = "migrated"
__all__ = ["FAST", "TEMPLATE", "Server"]


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A private server in a temporary folder, with a migrated database to copy from."""
    programs = binaries()
    if programs is None:
        why = "PostgreSQL's initdb is neither on PATH nor in /usr/lib/postgresql/*/bin; install PostgreSQL's server"
        if os.environ.get("HLORA_TEST_POSTGRES") == "required":
            pytest.fail(why)
        pytest.skip(why)
    with running(programs, FAST) as server:
        server.make(TEMPLATE)
        schema.migrate(server.url(TEMPLATE))
        yield server


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
