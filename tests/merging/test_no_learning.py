"""What merging alone does to the adapter when nobody learns anything, round after round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from coordinator import aggregation
from coordinator.blobs import Blobs
from coordinator.executors import open_executor
from coordinator.merge import first_adapter, merge_round
from protocol.slices import Slice
from tests.merging.small import make_plan, read, round_task, send, trained, untrained, update

ROUNDS = 50
LADDER = (1, 2, 4)
CHANGES = [name for name in aggregation.names() if issubclass(aggregation.load(name), aggregation.Changes)]
# Three clients of equal weight: the first direction is held by all of them, the second by two, the others by one.
SHARES = torch.tensor([1, 2 / 3, 1 / 3, 1 / 3], dtype=torch.float64)


def played(strategy: str, folder: Path) -> list[Slice]:
    """The adapter after a first round of learning, and after each round without any."""
    plan, blobs = make_plan(strategy, cap=9 if strategy == "fedex" else 4), Blobs.open(folder.as_uri())
    before = first_adapter(plan, blobs)
    found: list[Slice] = []
    with open_executor("threads://1") as executor:
        start = [send(blobs, plan, before.start(4), rank=4, train=trained)]
        before = merge_round(round_task(blobs, plan, before, start), executor, blobs)
        found.append(read(blobs, before.adapter))
        for round in range(2, ROUNDS + 2):
            sent = [send(blobs, plan, before.start(rank), rank=rank, seed=round, train=untrained) for rank in LADDER]
            before = merge_round(round_task(blobs, plan, before, sent, round), executor, blobs)
            found.append(read(blobs, before.adapter))
    return found


def singular_values(adapter: Slice) -> Tensor:
    found: Tensor = torch.linalg.svdvals(update(adapter, "block.q"))
    return found[:4]


def sizes(adapter: Slice) -> Tensor:
    """‖bᵢ‖ ‖aᵢ‖ of each direction as it is kept: its singular value, where what is kept has singular form."""
    factors = adapter.factors["block.q"]
    found: Tensor = factors.b.double().norm(dim=0) * factors.a.double().norm(dim=1)
    return found


@pytest.mark.parametrize(("strategy", "power"), [("hlora", 1), ("zero_pad", 2)])
def test_a_direction_shrinks_by_the_share_of_those_who_hold_it_or_its_square(strategy: str, power: int, tmp_path: Path) -> None:
    found = [sizes(adapter) for adapter in played(strategy, tmp_path)]
    for t, s in enumerate(found):
        assert torch.allclose(s, SHARES ** (power * t) * found[0], rtol=0, atol=1e-6 * float(found[0][0]))
    assert float(found[-1][2]) < 1e-6 * float(found[0][2])


@pytest.mark.parametrize("strategy", [*CHANGES, "raflora"])
def test_strategies_that_add_changes_or_average_over_holders_lose_nothing(strategy: str, tmp_path: Path) -> None:
    found = [singular_values(adapter) for adapter in played(strategy, tmp_path)]
    assert float(found[0][3]) == pytest.approx(float(found[-1][3]), rel=1e-4)
    for s in found:
        assert torch.allclose(s, found[0], rtol=0, atol=1e-5 * float(found[0][0]))
