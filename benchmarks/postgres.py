"""A private PostgreSQL server from the binaries that are installed, reached over a socket in its own folder."""

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
from psycopg import sql

from protocol import errors

DURABLE = "-c max_connections=200 -c shared_buffers=128MB -c listen_addresses=''"
_numbers = count(1)


@dataclass(frozen=True)
class Server:
    """A running server."""

    folder: Path

    def url(self, database: str) -> str:
        """SQLAlchemy's URL of a database."""
        return f"postgresql+psycopg://hlora@/{database}?host={self.folder}"

    def make(self, name: str, template: str = "template0") -> None:
        """A new database, made as a copy of another."""
        self._execute(sql.SQL("create database {} template {}").format(sql.Identifier(name), sql.Identifier(template)))

    @contextmanager
    def database(self, template: str = "template0") -> Iterator[str]:
        """The URL of a new database, which is dropped when the block ends, whoever is still connected to it."""
        name = f"fresh{next(_numbers)}"
        self.make(name, template)
        yield self.url(name)
        self._execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))

    def _execute(self, statement: sql.Composed) -> None:
        with psycopg.connect(f"host={self.folder} user=hlora dbname=postgres", autocommit=True) as connection:
            connection.execute(statement)


def binaries() -> Path | None:
    """The folder of `initdb` and `pg_ctl`: on PATH, or where Debian puts it; none where they are not installed."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "pg_ctl").exists()), None)


@contextmanager
def running(programs: Path, options: str = DURABLE, folder: Path | None = None) -> Iterator[Server]:
    """A server in a temporary folder, in that one or the system's, until the block ends. Raises Unavailable if it does not start."""
    own = Path(tempfile.mkdtemp(prefix="hlora-pg-", dir=folder))  # short: a socket's path has at most 107 characters
    try:
        _start(programs, own, options)
        try:
            yield Server(own)
        finally:
            _run(programs / "pg_ctl", "stop", "-D", own / "data", "-m", "immediate", "-w", folder=own)
    finally:
        shutil.rmtree(own)


def _start(programs: Path, folder: Path, options: str) -> None:
    user = _user()
    if user is not None:
        os.chown(folder, user.pw_uid, user.pw_gid)
    data = folder / "data"
    _run(programs / "initdb", "-D", data, "-U", "hlora", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync", folder=folder)
    settings = f"{options} -c unix_socket_directories={folder}"
    _run(programs / "pg_ctl", "start", "-D", data, "-w", "-l", folder / "log", "-o", settings, folder=folder)


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
        raise errors.Unavailable(f"{' '.join(map(str, command))} failed: {said}{log.read_text() if log.exists() else ''}")


def _user() -> pwd.struct_passwd | None:
    """Whom to run the server as: it refuses to run as root."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return pwd.getpwnam("postgres" if "postgres" in names else "nobody")
