"""Merging on a dask cluster: a real scheduler, two workers, and one of them lost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from distributed import LocalCluster

from coordinator.blobs import Blobs
from coordinator.executors import open_executor
from protocol import errors
from tests.merging.rounds import merge, second_round
from tests.merging.small import make_plan


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The URL of a scheduler with two workers, processes of their own."""
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as found:
        yield found.scheduler_address.replace("tcp://", "dask://")


def test_the_published_bytes_are_those_of_threads(cluster: str, blobs: Blobs) -> None:
    _, task = second_round(blobs, make_plan())
    assert merge(task, blobs, cluster) == merge(task, blobs)


def test_every_worker_computes_with_one_torch_thread(cluster: str) -> None:
    with open_executor(cluster) as executor:
        assert [task.result() for task in [executor.submit(torch.get_num_threads) for _ in range(4)]] == [1] * 4


def once_lost(marker: Path) -> int:
    """Ends its own process the first time."""
    if not marker.exists():
        marker.touch()
        os._exit(1)
    return os.getpid()


def test_a_lost_worker_costs_a_retry(cluster: str, tmp_path: Path) -> None:
    with open_executor(cluster) as executor:
        assert executor.submit(once_lost, tmp_path / "lost").result(timeout=60) != os.getpid()


def test_a_scheduler_that_is_not_there_is_said_to_be_unavailable() -> None:
    with pytest.raises(errors.Unavailable, match="no dask scheduler answers at localhost:9"):
        open_executor("dask://localhost:9")
