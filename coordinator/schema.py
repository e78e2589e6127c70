"""The database's schema and its migrations: bring it up to date, or say how far behind it is."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection

from coordinator.database import open_engine
from protocol import errors


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent.parent / "migrations"))
    config.attributes["connection"] = connection
    return config


def migrate(url: str) -> str:
    """Bring the database to the newest schema; gives its revision. Safe to run at the same time from several machines.

    Raises Conflict where the schema is of a newer program.
    """
    engine = open_engine(url)
    try:
        with engine.execution_options(writes=True).begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql("select pg_advisory_xact_lock(7260914)")  # any number that only migrations take
            config = _config(connection)
            command.upgrade(config, "head")
            revision = MigrationContext.configure(connection).get_current_revision()
    except CommandError:  # the way to the newest is known from every revision but those that are unknown
        raise errors.Conflict(
            "the database has the schema of a newer program: run that one, or go back to a backup that was made before it"
        ) from None
    finally:
        engine.dispose()
    return revision or ""


def is_current(url: str) -> bool:
    """Whether the database has the schema that this program needs."""
    engine = open_engine(url)
    with engine.connect() as connection:
        head = ScriptDirectory.from_config(_config(connection)).get_current_head()
        found = MigrationContext.configure(connection).get_current_revision()
    engine.dispose()
    return found == head
