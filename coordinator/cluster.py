"""Merge tasks on a dask cluster: an executor whose workers are other machines."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import ParamSpec, TypeVar

import torch
from distributed import Client, WorkerPlugin

from protocol import errors

SECONDS = 10  # to reach the scheduler, for the first time or again
LEFT = ("closing", "closed")  # of a client that did not reach it again

P = ParamSpec("P")
T = TypeVar("T")


class Cluster(Executor):
    """The workers of a dask scheduler at HOST:PORT; they need this project installed and reach the same blobs.

    A task whose worker was lost is given to another by the scheduler itself. Where the scheduler is lost, the tasks under
    way are cancelled; what comes next goes to the one that answers there then. Raises Unavailable where none answers.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._connecting = threading.Lock()
        self._client, self._tasks = self._connect()

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run it on some worker. Raises Unavailable where no scheduler answers."""
        with self._connecting:
            if self._client.status in LEFT:
                self._client, self._tasks = self._connect()
            future: Future[T] = self._tasks.submit(function, *args, **kwargs)
        return future

    def width(self) -> int:
        """The tasks that all workers together carry out at a time; 0 while nobody says so, as where the scheduler was lost."""
        try:
            return sum(self._client.nthreads().values())
        except OSError:  # whoever submits a task next looks for the scheduler that is there then
            return 0

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the cluster, which goes on without us."""
        self._tasks.shutdown(wait=wait)
        self._client.close()

    def _connect(self) -> tuple[Client, Executor]:
        try:
            client = Client(f"tcp://{self._address}", timeout=SECONDS, set_as_default=False)
        except (OSError, TimeoutError) as error:
            raise errors.Unavailable(f"no dask scheduler answers at {self._address}: {error}") from None
        client.register_plugin(_OneThread())
        # A task that failed is not tried again here: whether repeating can help is known to whoever submitted it.
        return client, client.get_executor(pure=False)


class _OneThread(WorkerPlugin):  # type: ignore[misc]  # distributed ships no types
    """Gives every worker's torch one thread, also of workers that come later."""

    def setup(self, worker: object) -> None:
        torch.set_num_threads(1)
