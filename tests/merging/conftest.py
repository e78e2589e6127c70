"""One torch thread, as every merge worker has, and a store."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from coordinator.blobs import Blobs


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    """A folder's blobs, empty."""
    return Blobs.open(tmp_path.as_uri())
