"""Tiny models, made once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch

from tests.federation import Federation, open_federation
from tests.tiny import tiny_decoder, tiny_encoder


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_decoder(tmp_path_factory.mktemp("models") / "decoder")


@pytest.fixture
async def federation(sqlite_url: str, tmp_path: Path) -> AsyncIterator[Federation]:
    async with open_federation(sqlite_url, tmp_path / "coordinator") as found:
        yield found
