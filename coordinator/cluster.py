"""Merge tasks on a dask cluster: an executor whose workers are other machines."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import ParamSpec, TypeVar

import torch
from distributed import Client, WorkerPlugin

from protocol import errors

SECONDS = 10  # to reach the scheduler
RETRIES = 2  # of a task that failed; one whose worker was lost is given to another by the scheduler itself

P = ParamSpec("P")
T = TypeVar("T")


class Cluster(Executor):
    """The workers of a dask scheduler at HOST:PORT; they need this project installed and reach the same blobs.

    Raises Unavailable where no scheduler answers.
    """

    def __init__(self, address: str) -> None:
        try:
            self._client = Client(f"tcp://{address}", timeout=SECONDS, set_as_default=False)
        except (OSError, TimeoutError) as error:
            raise errors.Unavailable(f"no dask scheduler answers at {address}: {error}") from None
        self._client.register_plugin(_OneThread())
        self._tasks = self._client.get_executor(pure=False, retries=RETRIES)

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run it on some worker."""
        future: Future[T] = self._tasks.submit(function, *args, **kwargs)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the cluster, which goes on without us."""
        self._tasks.shutdown(wait=wait)
        self._client.close()


class _OneThread(WorkerPlugin):  # type: ignore[misc]  # distributed ships no types
    """Gives every worker's torch one thread, also of workers that come later."""

    def setup(self, worker: object) -> None:
        torch.set_num_threads(1)
