"""Merging on a dask cluster: a real scheduler, two workers; one of them lost, then the scheduler."""

from __future__ import annotations

import gc
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from distributed import LocalCluster, Scheduler, SpecCluster

from coordinator.blobs import Blobs
from coordinator.executors import open_executor
from coordinator.merge import Wide, merge_round
from protocol import errors
from protocol.plan import Layout
from tests.merging.rounds import merge, second_round
from tests.merging.small import LAYOUT, make_plan


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The URL of a scheduler with two workers, processes of their own."""
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as found:
        yield found.scheduler_address.replace("tcp://", "dask://")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # connections to a worker that was killed are closed by nobody
        gc.collect()


def test_the_published_bytes_are_those_of_threads(cluster: str, blobs: Blobs) -> None:
    _, task = second_round(blobs, make_plan())
    assert merge(task, blobs, cluster) == merge(task, blobs)


def test_every_worker_computes_with_one_torch_thread(cluster: str) -> None:
    with open_executor(cluster) as executor:
        assert [task.result() for task in [executor.submit(torch.get_num_threads) for _ in range(4)]] == [1] * 4


def test_it_is_as_wide_as_its_workers_are_together(cluster: str) -> None:
    with open_executor(cluster) as executor:
        assert isinstance(executor, Wide)
        assert executor.width() == 2


class Losing(Executor):
    """The cluster, which loses a worker when the fifth task comes."""

    def __init__(self, cluster: Executor) -> None:
        self._cluster = cluster
        self._victim = cluster.submit(os.getpid).result()
        self._tasks = 0

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self._tasks += 1
        if self._tasks == 5:
            os.kill(self._victim, signal.SIGKILL)
        return self._cluster.submit(function, *args, **kwargs)


def test_a_worker_that_is_killed_in_the_middle_of_a_merge_changes_nothing_of_what_is_published(cluster: str, blobs: Blobs) -> None:
    plan = make_plan(layout=Layout(modules={f"block.{k:02}": (8, 8) for k in range(24)}, base=LAYOUT.base))
    _, task = second_round(blobs, plan)
    with open_executor(cluster) as executor:
        assert merge_round(task, Losing(executor), blobs) == merge(task, blobs)


@contextmanager
def scheduler(port: int = 0) -> Iterator[str]:
    """The URL of a scheduler without workers."""
    options = {"host": "127.0.0.1", "port": port, "dashboard_address": ":0"}
    with SpecCluster(scheduler={"cls": Scheduler, "options": options}, workers={}) as found:
        yield found.scheduler_address.replace("tcp://", "dask://")


def test_a_scheduler_that_comes_back_is_given_the_tasks_that_come_then(blobs: Blobs) -> None:
    _, task = second_round(blobs, make_plan())
    with scheduler() as first:
        executor = open_executor(first)
    with pytest.raises(errors.Unavailable, match="a worker was lost in the middle of it"):
        merge_round(task, executor, blobs)
    with scheduler(int(first.rpartition(":")[2])):
        assert not executor.submit(os.getpid).done()
        executor.shutdown(wait=False)


def test_a_scheduler_that_is_not_there_is_said_to_be_unavailable() -> None:
    with pytest.raises(errors.Unavailable, match="no dask scheduler answers at localhost:9"):
        open_executor("dask://localhost:9")
