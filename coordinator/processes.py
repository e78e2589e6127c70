"""Merge tasks in processes of this machine: an executor that outlives its workers, and workers that do not outlive it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


class Processes(Executor):
    """Processes of their own, started when there is work.

    Where one of them dies, the tasks that are under way in all of them raise BrokenExecutor; what comes next runs in new ones.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._opening = threading.Lock()
        self._pool = self._open()

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run it in some process."""
        with self._opening:
            try:
                return self._pool.submit(function, *args, **kwargs)
            except BrokenExecutor:
                self._pool.shutdown(wait=False)
                self._pool = self._open()
                return self._pool.submit(function, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes."""
        self._pool.shutdown(wait=wait, cancel_futures=cancel_futures)

    def _open(self) -> ProcessPoolExecutor:
        # Spawned: a process forked after torch has run hangs.
        return ProcessPoolExecutor(self._workers, mp_context=get_context("spawn"), initializer=_begin)


def _begin() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with_parent, name="parent", daemon=True).start()


def _leave_with_parent() -> None:
    """End this process when the one that started it was killed: it waits for tasks in vain, and would do so for ever."""
    parent = parent_process()
    assert parent is not None, "a worker was started by somebody"
    parent.join()
    os._exit(1)
