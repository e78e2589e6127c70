"""Server momentum: the recursion that it stands for, over stored adapters, and with a cap that cuts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from coordinator.blobs import Blobs
from coordinator.initial import first_adapter
from coordinator.merge import Input
from protocol.slices import Factors
from tests.merging.rounds import changes, merge
from tests.merging.small import LAYOUT, best, make_plan, read, round_task, send, update
from tests.merging.test_equations import CHANGES
from tests.merging.test_strategies import Client, close, counted, loaded, make_round, product, started, strategy, suited
from tests.merging.test_truncation import dense as multiplied_out
from tests.merging.test_truncation import rand


@pytest.mark.parametrize("name", CHANGES)
def test_momentum_is_the_recursion_with_a_memory(name: str) -> None:
    beta, eta = 0.8, 0.5
    crowd = [Client(4, 1.0, 1.0, 1), Client(4, 2.0, 1.0, 2)]
    round = suited(name, make_round((20, 12), crowd, version=3))
    earlier = Factors(b=rand(20, 4, seed=70), a=loaded(round.adapter).a if name == "ffa" else rand(4, 12, seed=71))
    round = replace(round, earlier=earlier)
    chosen = strategy(name).model_copy(update={"momentum": beta, "step": eta})
    memory = (product(round.adapter, 1.0) - product(earlier, 1.0)) / eta  # M, of which the last step was η M
    mean = sum(c.weight * (counted(c) - started(c)) for c in round.contributions)
    assert close(multiplied_out(chosen.combine(round)), product(round.adapter, 1.0) + eta * (beta * memory + mean))
    first = replace(round, earlier=None)
    assert close(multiplied_out(chosen.combine(first)), product(round.adapter, 1.0) + eta * mean)


def test_momentum_goes_on_over_rounds_from_stored_adapters(blobs: Blobs) -> None:
    plan = make_plan("delta", options={"momentum": 0.5}, ladder=(4,), cap=9)
    before = first_adapter(plan, blobs)
    one = merge(round_task(blobs, plan, before, [send(blobs, plan, before.slices[4], seed=1)]), blobs)
    sent: list[Input] = [send(blobs, plan, one.slices[4], train=lambda start, seed: start)]  # nothing learned
    two = merge(replace(round_task(blobs, plan, one, sent, 2), earlier=before.adapter.digest), blobs)
    module = "block.q"
    w0, w1, w2 = (update(read(blobs, x.adapter), module) for x in (before, one, two))
    assert torch.allclose(w2 - w1, 0.5 * (w1 - w0), atol=1e-5)


def test_momentum_knows_steps_as_the_cap_left_them(blobs: Blobs) -> None:
    """W₂ is the best of (1 + β) W₁ − β W₀ + Δ, in which W₁ is what two directions could hold of the round before."""
    plan = make_plan("delta", options={"momentum": 0.5}, ladder=(1, 2), cap=2)
    states = [first_adapter(plan, blobs)]
    for number in (1, 2, 3):
        sent = [send(blobs, plan, states[-1].slices[2], seed=10 * number + k) for k in range(3)]
        task = round_task(blobs, plan, states[-1], sent, number)
        states.append(merge(replace(task, earlier=states[-2].adapter.digest if number > 1 else None), blobs))
        for module in LAYOUT.modules:
            now, before = (update(read(blobs, x.adapter), module) for x in (states[-2], states[max(0, number - 2)]))
            wanted = 1.5 * now - 0.5 * before + changes(task, blobs, module)
            assert float((wanted - best(wanted, 2)).norm()) > 0.1 * float(wanted.norm()), "the cap cuts"
            assert torch.allclose(update(read(blobs, states[-1].adapter), module), best(wanted, 2), atol=1e-5)
