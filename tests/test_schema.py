"""The migrations lead to exactly the tables that the code knows, on both kinds of database."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Inspector, inspect

from coordinator import schema
from coordinator.database import open_engine
from coordinator.tables import Run
from tests.postgres import Server


def described(inspector: Inspector) -> dict[str, Any]:
    """Everything that the database itself says of its tables."""
    return {
        table: {
            "columns": {
                column["name"]: (str(column["type"]), column["nullable"], column["default"]) for column in inspector.get_columns(table)
            },
            "primary key": inspector.get_pk_constraint(table),
            "foreign keys": _sorted(inspector.get_foreign_keys(table)),
            "unique": _sorted(inspector.get_unique_constraints(table)),
            "checks": {check["name"]: " ".join(str(check["sqltext"]).split()) for check in inspector.get_check_constraints(table)},
            "indexes": _sorted(inspector.get_indexes(table)),
        }
        for table in inspector.get_table_names()
        if table != "alembic_version"
    }


def _sorted(found: list[Any]) -> list[Any]:
    return sorted(found, key=lambda entry: str(entry["name"]))


def compare(migrated: str, created: str) -> None:
    """Migrate one empty database, create the tables in the other, and expect the same of both."""
    schema.migrate(migrated)
    engines = open_engine(migrated), open_engine(created)
    Run.metadata.create_all(engines[1])
    found, wanted = (described(inspect(engine)) for engine in engines)
    for engine in engines:
        engine.dispose()
    assert found == wanted, "the migrations do not lead to coordinator/tables.py: write a migration for the difference"
    assert wanted.keys() == Run.metadata.tables.keys()


def test_migrations_match_the_tables_on_sqlite(tmp_path: Path) -> None:
    compare(f"sqlite:///{tmp_path / 'migrated.sqlite'}", f"sqlite:///{tmp_path / 'created.sqlite'}")


@pytest.mark.postgres
def test_migrations_match_the_tables_on_postgresql(postgres: Server) -> None:
    with postgres.database("template0") as migrated, postgres.database("template0") as created:
        compare(migrated, created)


def test_migrating_twice_changes_nothing(sqlite_url: str) -> None:
    assert schema.is_current(sqlite_url)
    assert schema.migrate(sqlite_url) == schema.migrate(sqlite_url)


def test_migrations_can_be_taken_back(database_url: str) -> None:
    engine = open_engine(database_url)
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parents[1] / "migrations"))
    with engine.execution_options(writes=True).begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    assert inspect(engine).get_table_names() == ["alembic_version"]
    engine.dispose()
    schema.migrate(database_url)
    assert schema.is_current(database_url)


def test_a_database_without_tables_is_not_current(tmp_path: Path) -> None:
    assert not schema.is_current(f"sqlite:///{tmp_path / 'empty.sqlite'}")
