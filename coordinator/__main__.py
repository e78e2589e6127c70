"""The coordinator's command. What is heavy is imported when a command needs it, so that --help is instant."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coordinator.settings import Settings
from protocol import errors
from protocol.states import Role

if TYPE_CHECKING:
    from coordinator.backup import Copied
    from coordinator.database import Database

TOLD_EVERY = 5.0  # seconds between two lines about how far a long command is
ABOUT = (
    "The coordinator of a federation. To begin: serve, and beside it token NAME.\n\n"
    "It keeps everything in hlora-data/, or where HLORA_COORDINATOR_DATA says; HLORA_COORDINATOR_DATABASE_URL puts rows in PostgreSQL, "
    "HLORA_COORDINATOR_BLOBS_URL blobs in a bucket. Every command needs the same settings; docs/configuration.md has all of them. "
    "All commands but restore work beside a running coordinator."
)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=ABOUT)


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="address to listen on; HLORA_COORDINATOR_HOST")] = None,
    port: Annotated[int | None, typer.Option(help="port, 0 for any free one; HLORA_COORDINATOR_PORT")] = None,
) -> None:
    """Run the coordinator until SIGTERM or SIGINT: routes, rounds and merging. Brings the database up to date first.

    Any number may share one PostgreSQL and one store of blobs; a SQLite file serves one.
    """
    from coordinator import app as application
    from coordinator import database, logs, schema, server
    from protocol import crash

    settings = _settings()
    chosen: dict[str, object] = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    settings = settings.model_copy(update=chosen)
    logs.configure(settings.log_json)
    if settings.crash_at is not None:
        crash.arm(settings.crash_at)
    with database.claimed(settings.database):
        server.check(settings)
        schema.migrate(settings.database)
        parts = application.build(settings)
        _greet(database.place(parts.database.engine.url), settings)
        server.serve(application.create_app(parts), settings, before_exit=parts.bell.close)


@app.command()
def migrate() -> None:
    """Bring the database to this program's schema and say its revision. serve does so by itself."""
    from coordinator import schema

    settings = _settings()
    typer.echo(schema.migrate(settings.database))


@app.command()
def token(
    name: Annotated[str, typer.Argument(help="whose token it is, for the list of tokens")],
    role: Annotated[Role, typer.Option(help="admin may do everything, viewer may read")] = Role.admin,
    as_json: Annotated[bool, typer.Option("--json", help="print a JSON object")] = False,
) -> None:
    """Make an operator's token and print it, this once. The database must be there: serve makes it, or migrate."""
    from pydantic import ValidationError

    from coordinator import access
    from protocol.views import TokenRequest

    try:
        request = TokenRequest(name=name, role=role)
    except ValidationError as error:
        raise errors.InvalidRequest(f"the name: {error.errors()[0]['msg']}") from None
    with _existing(_settings()) as database, database.write() as session:
        made = access.make_token(session, request, database.clock(session))
    typer.echo(json.dumps(made.model_dump(mode="json")) if as_json else made.token)


@app.command()
def verify(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run's id, or a name: then the newest run of that name")],
    number: Annotated[int | None, typer.Option("--round", min=0, help="only this round; by default every published one")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print a JSON object for each round")] = False,
) -> None:
    """Make published rounds again from their blobs and compare every byte. Changes nothing.

    Exit code 0: all that can be checked agrees. 1: something differs. 2: there was nothing that can be checked.
    """
    from dataclasses import asdict

    from coordinator import verification
    from coordinator.blobs import Blobs
    from coordinator.executors import open_executor

    settings = _settings()
    verdicts = set()
    with _existing(settings) as database, open_executor(settings.executor) as executor:
        blobs = Blobs.open(settings.blobs)
        with database.read() as session:
            records = verification.records(session, verification.find(session, run), number, blobs.url)
        for finding in verification.Verifier(database, blobs, executor, _teller()).verify(records):
            verdicts.add(finding.verdict)
            typer.echo(json.dumps(asdict(finding)) if as_json else finding.line())
    if verification.Verdict.differs in verdicts:
        raise typer.Exit(1)
    raise typer.Exit(0 if verification.Verdict.agrees in verdicts else 2)


Folder = Annotated[Path, typer.Argument(metavar="FOLDER", file_okay=False, help="the folder of the backup")]


@app.command()
def backup(folder: Folder) -> None:
    """Copy the database and every blob that it needs to a folder.

    Blobs that the folder has already are checked and not copied again. Exit code 1 where a blob is missing or damaged.
    """
    from coordinator import backup
    from coordinator.blobs import Blobs

    settings = _settings()
    with _existing(settings):
        _report(backup.back_up(settings.database, Blobs.open(settings.blobs), folder, _teller()))


@app.command()
def restore(
    folder: Folder,
    incomplete: Annotated[bool, typer.Option("--incomplete", help="put SQLite's database in place also where blobs are lost")] = False,
) -> None:
    """Put a backup into an empty database and a store of blobs, before serve. Overwrites nothing.

    The settings say where to. What was not finished when the backup was made goes on when the coordinator is started.
    Exit code 1 where a blob that the rows need is lost; SQLite's database is then not put in place, and the command may be repeated.
    """
    from coordinator import backup
    from coordinator.blobs import Blobs

    settings = _settings()
    blobs = Blobs.open(settings.blobs)
    _report(backup.restore(settings.database, blobs, folder, settings.spool_folder, _teller(), incomplete=incomplete))


def _report(done: Copied) -> None:
    typer.echo(done.line())
    if done.lost:
        raise typer.Exit(1)


@app.command()
def sweep(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="delete nothing, only say what would be deleted")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print a JSON object")] = False,
) -> None:
    """Delete blobs that nothing names, and files of uploads that were cut off. A coordinator does it by itself now and then.

    Nothing that is named is ever deleted, nor what is younger than HLORA_COORDINATOR_SWEEP_GRACE_SECONDS.
    """
    from datetime import timedelta

    from coordinator import sweeping
    from coordinator.blobs import Blobs

    settings = _settings()
    blobs = Blobs.open(settings.blobs)
    with _existing(settings) as database:
        with database.read() as session:
            now = database.clock(session)
        before = now - timedelta(seconds=settings.sweep_grace_seconds)
        batches = sweeping.orphans(database, blobs, before) if dry_run else sweeping.sweep(database, blobs, before)
        found = [{"digest": blob.digest, "bytes": blob.bytes, "put": blob.modified.isoformat()} for batch in batches for blob in batch]
        files = list(sweeping.leftovers(blobs, settings.spool_folder))
        if not dry_run:
            sweeping.clear(files)
    verb = "would delete" if dry_run else "deleted"
    if as_json:
        typer.echo(json.dumps({"dry_run": dry_run, "blobs": found, "files": [str(path) for path in files]}))
        return
    for line in [*(f"{blob['digest']}, {blob['bytes']} bytes, put at {blob['put']}" for blob in found), *map(str, files)]:
        typer.echo(f"{verb} {line}")
    typer.echo(f"{verb} {len(found)} blobs that nothing names and {len(files)} files that nobody finished")


def _settings() -> Settings:
    from pydantic import ValidationError

    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        raise errors.InvalidRequest(f"HLORA_COORDINATOR_{str(first['loc'][0]).upper()}: {first['msg']}") from None


@contextmanager
def _existing(settings: Settings) -> Iterator[Database]:
    """The database of these settings, which must be there with the tables that this program knows."""
    from coordinator import schema
    from coordinator.database import Database, sqlite_file

    file = sqlite_file(settings.database)
    if file is not None and not file.exists():
        raise errors.NotFound(
            f"there is no database {file}; is this the coordinator's folder, or HLORA_COORDINATOR_DATA? serve makes a new one"
        )
    if not schema.is_current(settings.database):
        raise errors.Conflict(
            "the database has not this program's schema: run python -m coordinator migrate, or the program that it belongs to"
        )
    database = Database(settings.database)
    try:
        yield database
    finally:
        database.close()


def _teller() -> Callable[[str], None]:
    """Says on the standard error how far a long command is, now and then."""
    said = time.monotonic()

    def tell(text: str) -> None:
        nonlocal said
        if time.monotonic() - said >= TOLD_EVERY:
            said = time.monotonic()
            typer.echo(text, err=True)

    return tell


def _greet(database: str, settings: Settings) -> None:
    import structlog

    structlog.get_logger().info("serving", database=database, blobs=settings.blobs, executor=settings.executor)
    typer.echo("An operator needs a token: python -m coordinator token NAME", err=True)


def main() -> None:
    """Run the command; a refusal is one line on stderr and exit code 1."""
    try:
        app()
    except errors.HLoRAError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except OSError as error:
        if error.filename is None:  # nothing that a setting or an argument names
            raise
        where = "see HLORA_COORDINATOR_DATA, and the settings of blobs and spool, or name another folder"
        typer.echo(f"error: {error.filename} cannot be used: {error.strerror}; {where}", err=True)
        sys.exit(1)
    except Exception as error:
        from sqlalchemy.exc import OperationalError

        if not isinstance(error, OperationalError):
            raise
        typer.echo(
            f"error: the database cannot be used: {str(error.orig).partition(chr(10))[0]}; see HLORA_COORDINATOR_DATABASE_URL", err=True
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
