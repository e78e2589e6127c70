"""Executors by URL."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from coordinator.executors import open_executor
from protocol import errors


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
