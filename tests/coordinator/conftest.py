"""The whole coordinator, on both databases where its state matters and on SQLite where it does not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog

from tests.federation import Federation, open_federation


@pytest.fixture(autouse=True, scope="session")
def _plain_logs() -> None:
    """As the command has them: the prettier traces take seconds each."""
    text = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[structlog.processors.add_log_level, text])


@pytest.fixture
async def federation(database_url: str, tmp_path: Path) -> AsyncIterator[Federation]:
    """A coordinator without clients, on either database."""
    async with open_federation(database_url, tmp_path) as found:
        yield found


@pytest.fixture
async def small(sqlite_url: str, tmp_path: Path) -> AsyncIterator[Federation]:
    """A coordinator without clients, on SQLite: for what no database decides."""
    async with open_federation(sqlite_url, tmp_path) as found:
        yield found
