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
from protocol.plan import Dtype
from protocol.slices import Slice
from tests.merging.small import make_plan, read, round_task, send, start_of, trained, untrained, update

ROUNDS = 50
LADDER = (1, 2, 4)
CHANGES = [name for name in aggregation.names() if issubclass(aggregation.load(name), aggregation.Changes)]
EPSILON, BFLOAT16 = torch.finfo(torch.float32).eps, torch.finfo(torch.bfloat16).eps
# Three clients of equal weight: the first direction is held by all of them, the second by two, the others by one.
SHARES = torch.tensor([1, 2 / 3, 1 / 3, 1 / 3], dtype=torch.float64)


def played(strategy: str, wire: Dtype, folder: Path) -> list[Slice]:
    """The adapter after a first round of learning, and after each of fifty rounds without any."""
    plan, blobs = make_plan(strategy, cap=9 if strategy == "fedex" else 4, wire=wire), Blobs.open(folder.as_uri())
    before = first_adapter(plan, blobs)
    found: list[Slice] = []
    with open_executor("threads://1") as executor:
        learned = [send(blobs, plan, start_of(before, 4), rank=4, train=trained)]
        before = merge_round(round_task(blobs, plan, before, learned), executor, blobs)
        found.append(read(blobs, before.adapter))
        for round in range(2, ROUNDS + 2):
            sent = [send(blobs, plan, start_of(before, rank), rank=rank, seed=round, train=untrained) for rank in LADDER]
            before = merge_round(round_task(blobs, plan, before, sent, round), executor, blobs)
            found.append(read(blobs, before.adapter))
    assert len(found) == 1 + ROUNDS
    return found


def sizes(adapter: Slice, module: str) -> Tensor:
    """‖bᵢ‖ ‖aᵢ‖ of each direction as it is kept: its singular value, where what is kept has singular form."""
    factors = adapter.factors[module]
    found: Tensor = factors.b.double().norm(dim=0) * factors.a.double().norm(dim=1)
    return found


# What is resolved beside the largest direction, as a share of it. hlora decomposes sums: float32 factors resolve their epsilon; what
# a half wire rounds off the largest direction, epsilon of it, falls on the others, and of that only epsilon is along them. zero_pad
# never mixes directions, so each is as exact as its own numbers are, however small.
@pytest.mark.parametrize(
    ("strategy", "power", "wire", "resolved"),
    [
        ("hlora", 1, Dtype.float32, 4 * EPSILON),
        ("hlora", 1, Dtype.bfloat16, BFLOAT16**2),
        ("zero_pad", 2, Dtype.float32, 0.0),
        ("zero_pad", 2, Dtype.bfloat16, 0.0),
    ],
)
def test_for_fifty_rounds_a_direction_shrinks_by_the_share_of_those_who_hold_it_or_its_square(
    strategy: str, power: int, wire: Dtype, resolved: float, tmp_path: Path
) -> None:
    """σᵢ after t rounds is mᵢᵗ or mᵢ²ᵗ of what it was, to one rounding of float32 a round; roundings of the wire do not add up, but
    walk at random.
    """
    adapters = played(strategy, wire, tmp_path)
    for module in ("block.q", "block.v"):
        found = [sizes(adapter, module) for adapter in adapters]
        for t, s in enumerate(found):
            predicted = SHARES ** (power * t) * found[0]
            visible = predicted > resolved * found[0][0]
            tolerance = (t + 1) * EPSILON + (0.0 if wire is Dtype.float32 else (t + 1) ** 0.5 * BFLOAT16)
            assert ((s / predicted - 1).abs()[visible] <= tolerance).all(), (module, t)
            assert (s[~visible] <= 2 * resolved * found[0][0]).all(), (module, t)


@pytest.mark.parametrize("wire", [Dtype.float32, Dtype.bfloat16])
@pytest.mark.parametrize("strategy", CHANGES)
def test_for_fifty_rounds_strategies_that_add_changes_lose_nothing_on_either_wire(strategy: str, wire: Dtype, tmp_path: Path) -> None:
    """What a client sends back as it came is no change, however it was rounded on the way."""
    assert max(losses(played(strategy, wire, tmp_path))) <= 4 * EPSILON


@pytest.mark.parametrize(("wire", "loss"), [(Dtype.float32, 4 * EPSILON), (Dtype.bfloat16, 2 * BFLOAT16)])
def test_for_fifty_rounds_averages_over_holders_lose_what_their_wire_rounds_off_and_no_more(
    wire: Dtype, loss: float, tmp_path: Path
) -> None:
    assert max(losses(played("raflora", wire, tmp_path))) <= loss


def losses(adapters: list[Slice]) -> list[float]:
    """‖W − W₀‖ / ‖W₀‖ over all modules, of each adapter W with the first one's W₀."""
    updates = [torch.cat([update(adapter, module).flatten() for module in adapter.factors]) for adapter in adapters]
    return [float((w - updates[0]).norm() / updates[0].norm()) for w in updates]
