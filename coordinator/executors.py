"""Where merge tasks run: an executor is a URL.

    threads://N       N threads of this process        processes://N       N processes of their own
    dask://HOST:PORT  the workers of a dask scheduler     cuda://N         the GPU of that number, by default 0

Without N there are as many threads or processes as cores. Every worker gives torch one thread: more threads per task are
slower than more tasks, and with one a result repeats bit for bit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from importlib.util import find_spec

import torch

from coordinator import devices
from coordinator.processes import Processes
from protocol import errors

LARGEST = 1024  # workers of one machine; more is a slip of the keyboard


def open_executor(url: str) -> Executor:
    """The executor at a URL; shut it down when done.

    Raises InvalidRequest for a URL that names none, or a GPU that is not there, Unavailable for a cluster that does not answer.
    """
    if cluster := re.fullmatch("dask://([^/:]+:[0-9]{1,5})", url):
        return _cluster(cluster[1])
    if gpu := re.fullmatch("cuda://([0-9]{0,4})", url):
        return devices.gpu(int(gpu[1] or 0))
    found = re.fullmatch("([a-z]+)://([0-9]{0,4})", url)
    kind, workers = (found[1], int(found[2] or os.cpu_count() or 1)) if found else ("", 0)
    if kind not in _KINDS or not 1 <= workers <= LARGEST:
        kinds = " or ".join(f"{kind}://N" for kind in _KINDS)
        raise errors.InvalidRequest(f"an executor is {kinds} with N from 1 to {LARGEST}, cuda://N, or dask://HOST:PORT; {url!r} came")
    return _KINDS[kind](workers)


def _threads(workers: int) -> Executor:
    return ThreadPoolExecutor(workers, thread_name_prefix="merge", initializer=one_thread)


def _cluster(address: str) -> Executor:
    if find_spec("distributed") is None:
        raise errors.InvalidRequest("dask:// needs the package distributed: install HLoRA's extra `cluster`, here and on the workers")
    from coordinator.cluster import Cluster  # an extra, and slow to import

    return Cluster(address)


def one_thread() -> None:
    """Let torch compute with this thread alone, so that what it computes repeats bit for bit on every machine."""
    torch.set_num_threads(1)


_KINDS: Mapping[str, Callable[[int], Executor]] = {"threads": _threads, "processes": Processes}
