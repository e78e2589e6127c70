"""A store that only one process has cannot be merged from in another."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.app import build
from coordinator.settings import Settings
from protocol import errors


def test_blobs_in_memory_and_workers_in_other_processes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidRequest, match=r"memory://here are in this process alone; processes://2 .* use threads://N"):
        build(Settings(data=tmp_path, blobs_url="memory://here", executor="processes://2"))
    build(Settings(data=tmp_path, blobs_url="memory://here", executor="threads://1")).close()
