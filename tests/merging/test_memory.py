"""Memory for large matrices: threads of one process share it, and every way of cutting a sum asks for what it takes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

import pytest
import torch

from coordinator import memory
from coordinator.folding import scratch
from coordinator.lowrank import truncate
from coordinator.memory import Memory
from coordinator.sums import Sum, Term
from coordinator.truncation import quicker, wide
from protocol.slices import Factors
from tests.merging.test_truncation import rand


def test_who_would_take_too_much_waits_until_there_is_room() -> None:
    shared, inside = Memory(100), Event()

    def second() -> None:
        with shared.taken(60):
            inside.set()

    with ThreadPoolExecutor(1) as pool:
        with shared.taken(50):
            waiting = pool.submit(second)
            assert not inside.wait(0.1)
        waiting.result(timeout=60)
    assert inside.is_set()


def test_who_fits_does_not_wait_and_who_is_alone_may_take_all_that_he_needs() -> None:
    shared = Memory(100)
    with shared.taken(50), shared.taken(50):
        pass
    with shared.taken(1000):
        pass


def test_what_fails_gives_its_memory_back() -> None:
    shared = Memory(100)
    with pytest.raises(ZeroDivisionError), shared.taken(100):
        _ = 1 / 0
    with shared.taken(100):
        pass


@pytest.mark.parametrize(
    ("shape", "stacked", "way"),
    [((300, 200), 100, "exact"), ((900, 800), 500, "quick"), ((300, 200), 250, "folded")],
)
def test_every_way_takes_its_matrices_out_of_what_is_shared(
    shape: tuple[int, int], stacked: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least as much as two Gram matrices and the stack, or the dense matrix, have bytes."""
    seen = _Seen()
    monkeypatch.setattr(memory, "SHARED", seen)
    truncate(_sum(shape, stacked), 8)
    assert {"folded": wide(shape, stacked, 8), "quick": quicker(shape, stacked, 8), "exact": not quicker(shape, stacked, 8)}[way]
    dense, stack = 8 * shape[0] * shape[1], 4 * (sum(shape) * stacked + 2 * stacked**2)
    assert len(seen.sizes) == 1
    assert seen.sizes[0] >= (dense if way == "folded" else stack)


def test_a_sum_whose_gram_matrices_would_take_more_than_the_dense_one_is_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where float32 proves nothing, and float64 would not fit."""
    shape, stacked = (900, 800), 500
    w, seen = _falling(shape, stacked), _Seen()
    before = truncate(w, 10)
    monkeypatch.setattr(memory, "SHARED", seen)
    monkeypatch.setattr(memory, "LIMIT", 0)
    monkeypatch.setattr("coordinator.lowrank.scratch", lambda shape: 0)
    after = truncate(w, 10)
    assert len(seen.sizes) == 2, "first what the quick way takes, given back before the dense form asks"
    assert seen.sizes[1] == scratch(shape)
    assert after.total == pytest.approx(before.total, rel=1e-5)
    assert torch.allclose(after.s, before.s, rtol=1e-4)


class _Seen:
    """Memory without end that writes down who asked."""

    def __init__(self) -> None:
        self.sizes = list[int]()

    @contextmanager
    def taken(self, size: int) -> Iterator[None]:
        self.sizes.append(size)
        yield


def _sum(shape: tuple[int, int], stacked: int) -> Sum:
    parts = [(k, min(50, stacked - k)) for k in range(0, stacked, 50)]
    return Sum(shape, [Term(Factors(b=rand(shape[0], r, seed=k), a=rand(r, shape[1], seed=k + 1)), 1.0) for k, r in parts])


def _falling(shape: tuple[int, int], stacked: int) -> Sum:
    """Ten directions, and all others so small that float32's Gram matrices do not see them."""
    sizes = torch.cat([torch.linspace(2.0, 1.0, 10), torch.full((stacked - 10,), 1e-6)])
    return Sum(shape, [Term(Factors(b=rand(shape[0], stacked, seed=1) * sizes, a=rand(stacked, shape[1], seed=2)), 1.0)])
