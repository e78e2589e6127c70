"""Experiments in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    """The bench lets nobody log less than errors; what comes after it in this process logs as it did."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)
