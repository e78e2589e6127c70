"""Executors by URL."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

from coordinator.blobs import Blobs
from coordinator.executors import open_executor
from coordinator.merge import merge_round
from protocol import errors
from tests.merging.rounds import merge, second_round
from tests.merging.small import make_plan


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine on which torch would take two threads, here and in processes that are started from here."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("url", ["threads://2", "threads://", "processes://1"])
def test_every_worker_computes_with_one_torch_thread(url: str) -> None:
    with open_executor(url) as executor:
        assert [task.result() for task in [executor.submit(torch.get_num_threads) for _ in range(4)]] == [1] * 4


def test_processes_are_processes_and_threads_are_threads() -> None:
    with open_executor("processes://1") as executor:
        assert executor.submit(os.getpid).result() != os.getpid()
    with open_executor("threads://1") as executor:
        assert executor.submit(os.getpid).result() == os.getpid()


@pytest.mark.parametrize(
    "url", ["", "threads", "threads://0", "threads://-1", "threads://two", "threads://1025", "threads://2/x", "forks://2", "//2"]
)
def test_any_other_url_is_refused_with_those_that_are_taken(url: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="threads://N or processes://N"):
        open_executor(url)


def test_after_a_process_died_new_ones_merge_the_round_to_the_same_bytes(blobs: Blobs) -> None:
    _, task = second_round(blobs, make_plan())
    with open_executor("processes://2") as executor:
        executor.submit(os._exit, 1)
        with pytest.raises(errors.Unavailable, match="a worker was lost in the middle of it"):
            merge_round(task, executor, blobs)
        assert merge_round(task, executor, blobs) == merge(task, blobs)


KILLED = """
import os
from coordinator.executors import open_executor
print(open_executor("processes://1").submit(os.getpid).result(), flush=True)
os.kill(os.getpid(), 9)
"""


def test_processes_end_when_the_one_that_started_them_is_killed() -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, check=False, timeout=60)
    assert killed.returncode == -9
    end = time.monotonic() + 20
    with suppress(ProcessLookupError):
        while True:
            os.kill(int(killed.stdout), 0)
            assert time.monotonic() < end, "it is still there"
            time.sleep(0.02)


def test_a_cluster_without_its_package_is_refused_with_what_to_install() -> None:
    code = (
        "import sys; sys.modules['distributed'] = None; from coordinator.executors import open_executor; open_executor('dask://there:8786')"
    )
    refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert refused.returncode == 1
    last = refused.stderr.splitlines()[-1]
    assert "InvalidRequest: dask:// needs the package distributed: install HLoRA's extra `cluster`, here and on the workers" in last
