"""A whole round: from stored slices to the next adapter and its slices."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from coordinator.blobs import Blobs
from coordinator.merge import first_adapter, merge_round
from protocol.plan import Dtype, Float, Layout, Split
from protocol.slices import TORCH_DTYPES, Slice
from tests.merging.rounds import changes, heard, merge, products, read_digest, second_round
from tests.merging.small import LAYOUT, best, make_plan, read, round_task, send, start_of, untrained, update

STRATEGIES = ["hlora", "delta"]


@pytest.mark.parametrize("wire", get_args(Float))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_adapter_is_the_best_approximation_of_the_strategys_sum(strategy: str, wire: Dtype, blobs: Blobs) -> None:
    plan = make_plan(strategy, wire=wire)
    before, task = second_round(blobs, plan)
    adapter = read(blobs, merge(task, blobs).adapter)
    for module in LAYOUT.modules:
        if strategy == "hlora":
            wanted = products(task, blobs, module)
        else:
            wanted = update(read(blobs, before.adapter), module) + changes(task, blobs, module)
        assert torch.allclose(update(adapter, module), best(wanted, 4), rtol=0, atol=1e-6 * float(wanted.norm()))


@pytest.mark.parametrize("cap", [4, 9])
@pytest.mark.parametrize("split", Split)
@pytest.mark.parametrize("wire", get_args(Float))
def test_every_slice_is_the_adapters_leading_part_in_the_dtype_and_at_the_scale_of_the_plan(
    wire: Dtype, split: Split, cap: int, blobs: Blobs
) -> None:
    plan = make_plan("delta", wire=wire, split=split, cap=cap)
    _, task = second_round(blobs, plan)
    merged = merge(task, blobs)
    adapter = read(blobs, merged.adapter)
    assert (adapter.label.rank, adapter.label.scale, adapter.label.round) == (cap, 1.0, 2)
    assert merged.slices.keys() == {1, 2, 4}
    for rank, ref in merged.slices.items():
        slice = read(blobs, ref)
        assert (slice.label.rank, slice.label.scale, slice.label.round, slice.label.base) == (rank, 4 / rank, 2, None)
        for module, factors in slice.factors.items():
            assert factors.b.dtype == TORCH_DTYPES[wire]
            whole = update(adapter, module)
            hair = 4 * torch.finfo(TORCH_DTYPES[wire]).eps
            assert torch.allclose(update(slice, module), best(whole, rank), rtol=0, atol=hair * float(whole.norm()))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fully_trained_tensors_are_averaged_by_weight_and_by_what_counts_of_their_change(strategy: str, blobs: Blobs) -> None:
    plan = make_plan(strategy)
    _, task = second_round(blobs, plan)
    merged = merge(task, blobs)
    for name in LAYOUT.full:
        parts = [p * (y * t.full[name].double() + (1 - y) * g.full[name].double()) for p, y, t, g in heard(task, blobs)]
        wanted = torch.stack(parts).sum(dim=0)
        for ref in (merged.adapter, *merged.slices.values()):
            assert torch.allclose(read(blobs, ref).full[name].double(), wanted, atol=1e-6)


@pytest.mark.parametrize(("wire", "uploads"), [(Dtype.bfloat16, Dtype.int8), (Dtype.bfloat16, Dtype.float32), (Dtype.float32, None)])
def test_steps_of_a_head_that_its_wire_cannot_tell_add_up(wire: Dtype, uploads: Dtype | None, blobs: Blobs) -> None:
    """Near one everybody adds 0.002 in each round: bfloat16 has nothing between 1 and 1.0078."""

    def moved(start: Slice, seed: int) -> Slice:
        return replace(start, full={name: (t.float() + 0.002 if seed else torch.ones_like(t.float())) for name, t in start.full.items()})

    plan = make_plan("delta", wire=wire, uploads=uploads, ladder=(4,))
    merged, heads = first_adapter(plan, blobs), []
    for round in range(1, 12):
        inputs = [send(blobs, plan, start_of(merged, 4), seed=round - 1, train=moved)]
        merged = merge(round_task(blobs, plan, merged, inputs, round=round), blobs)
        heads.append(read(blobs, merged.adapter).full)
    for name, last in heads[-1].items():
        assert torch.allclose(last - heads[0][name], torch.full_like(last, 0.02), rtol=0, atol=2e-4)


def test_merging_again_keeps_nothing_new(blobs: Blobs) -> None:
    _, task = second_round(blobs, make_plan())
    merge(task, blobs)
    kept = {found.digest for found in blobs.digests()}
    merge(task, blobs)
    assert {found.digest for found in blobs.digests()} == kept


def test_weights_have_no_unit(blobs: Blobs) -> None:
    _, task = second_round(blobs, make_plan())
    thousandfold = tuple(replace(x, weight=1000 * x.weight) for x in task.inputs)
    assert merge(replace(task, inputs=thousandfold), blobs) == merge(task, blobs)


def test_a_contribution_without_weight_might_as_well_not_have_come(blobs: Blobs) -> None:
    before, task = second_round(blobs, make_plan())
    idle = send(blobs, task.plan, before.slices[4], seed=77, weight=0.0)
    assert merge(replace(task, inputs=(*task.inputs, idle)), blobs) == merge(task, blobs)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_clients_that_send_the_same_bytes_count_twice(strategy: str, blobs: Blobs) -> None:
    plan = make_plan(strategy)
    before = first_adapter(plan, blobs)
    one, other = send(blobs, plan, before.slices[4], seed=1), send(blobs, plan, before.slices[2], seed=2)
    twice = merge(round_task(blobs, plan, before, [one, one, other]), blobs)
    double = merge(round_task(blobs, plan, before, [replace(one, weight=2.0), other]), blobs)
    for module in LAYOUT.modules:
        a, b = (update(read(blobs, found.adapter), module) for found in (twice, double))
        assert torch.allclose(a, b, rtol=0, atol=1e-6 * float(a.norm()))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_single_client_at_the_cap_gets_back_what_it_sent(strategy: str, blobs: Blobs) -> None:
    plan = make_plan(strategy)
    before = first_adapter(plan, blobs)
    sent = send(blobs, plan, before.slices[4], seed=1)
    merged = merge(round_task(blobs, plan, before, [sent]), blobs)
    for module in LAYOUT.modules:
        wanted = update(read_digest(blobs, sent.digest), module)
        for ref in (merged.adapter, merged.slices[4]):
            assert torch.allclose(update(read(blobs, ref), module), wanted, rtol=0, atol=1e-6 * float(wanted.norm()))


def test_a_change_counts_against_the_slice_it_started_from_however_old(blobs: Blobs) -> None:
    plan = make_plan("delta")
    old = first_adapter(plan, blobs)
    before, task = second_round(blobs, plan)
    late = send(blobs, plan, old.slices[2], seed=5)
    adapter = read(blobs, merge(replace(task, inputs=(late,)), blobs).adapter)
    for module in LAYOUT.modules:
        change = update(read_digest(blobs, late.digest), module) - update(read(blobs, old.slices[2]), module)
        wanted = best(update(read(blobs, before.adapter), module) + change, 4)
        assert torch.allclose(update(adapter, module), wanted, rtol=0, atol=1e-6 * float(wanted.norm()))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nobody_learning_at_the_cap_changes_nothing(strategy: str, blobs: Blobs) -> None:
    plan = make_plan(strategy)
    before, _ = second_round(blobs, plan)
    sent = [send(blobs, plan, before.slices[4], seed=k, train=untrained) for k in range(3)]
    after = merge(round_task(blobs, plan, before, sent, round=2), blobs)
    for module in LAYOUT.modules:
        was, now = (update(read(blobs, found.adapter), module) for found in (before, after))
        assert torch.allclose(was, now, rtol=0, atol=1e-6 * float(was.norm()))


def test_the_kept_energy_of_every_rung_is_told(blobs: Blobs) -> None:
    plan = make_plan("hlora", cap=6)
    _, task = second_round(blobs, plan)
    energy = merge(task, blobs).energy
    assert list(energy) == list(LAYOUT.modules)
    for module, found in energy.items():
        squares = torch.linalg.svdvals(products(task, blobs, module)).square()
        assert found.total == pytest.approx(float(squares.sum()), rel=1e-9)
        assert found.kept == pytest.approx({r: float(squares[:r].sum() / squares.sum()) for r in (1, 2, 4, 6)}, rel=1e-6)
        assert found.stacked_rank == 1 + 2 + 2 + 4 + 4 + 2 + 4  # five clients, and the slices of the two that were clipped


def test_round_zero_changes_nothing_and_every_pair_can_learn(blobs: Blobs) -> None:
    plan = make_plan(cap=6)
    merged = first_adapter(plan, blobs)
    adapter = read(blobs, merged.adapter)
    assert (adapter.label.rank, adapter.label.round) == (6, 0)
    slices = {rank: read(blobs, ref) for rank, ref in merged.slices.items()}
    for module in LAYOUT.modules:
        assert not update(adapter, module).any()
        for rank, slice in slices.items():
            assert not slice.factors[module].b.any()
            assert bool(slice.factors[module].a.any(dim=1).all())
            assert torch.equal(slice.factors[module].a, slices[4].factors[module].a[:rank])
    for name, shape in LAYOUT.full.items():
        assert adapter.full[name].shape == shape
        assert all(torch.equal(slice.full[name], adapter.full[name]) for slice in slices.values())
    assert not adapter.full["head.bias"].any()
    assert adapter.full["head.weight"].any()
    assert all(found.total == 0 and found.kept == {1: 1, 2: 1, 4: 1, 6: 1} for found in merged.energy.values())


def test_round_zero_depends_on_the_seed_alone(blobs: Blobs) -> None:
    assert first_adapter(make_plan(seed=1), blobs) == first_adapter(make_plan(seed=1), blobs)
    one, two = (read(blobs, first_adapter(make_plan(seed=seed), blobs).slices[4]) for seed in (1, 2))
    assert not torch.equal(one.factors["block.q"].a, two.factors["block.q"].a)
    assert not torch.equal(one.full["head.weight"], two.full["head.weight"])


def test_a_run_without_fully_trained_tensors_is_merged_too(blobs: Blobs) -> None:
    plan = make_plan(layout=Layout(modules=LAYOUT.modules, base=LAYOUT.base))
    before = first_adapter(plan, blobs)
    merged = merge(round_task(blobs, plan, before, [send(blobs, plan, before.slices[4])]), blobs)
    assert not read(blobs, merged.adapter).full


class Weighing(ThreadPoolExecutor):
    """Notes what every task weighs on its way to a worker."""

    weights: list[int]

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.weights.append(len(pickle.dumps((fn, args, kwargs))))
        return super().submit(fn, *args, **kwargs)


def test_keys_travel_and_tensors_do_not(blobs: Blobs) -> None:
    layout = Layout(modules={f"block.{k}": (60, 60) for k in range(200)}, base=LAYOUT.base)
    plan = make_plan(layout=layout)
    before = first_adapter(plan, blobs)
    task = round_task(blobs, plan, before, [send(blobs, plan, before.slices[4], seed=k) for k in range(3)])
    with Weighing(1) as executor:
        executor.weights = []
        merge_round(task, executor, blobs)
    assert len(executor.weights) == 200
    assert max(executor.weights) < 3000  # three pairs of factors have 5760 bytes, the names and shapes of all modules 4000
