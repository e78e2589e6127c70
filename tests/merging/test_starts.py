"""What training starts from where it is no slice: what its files hold, who shares them, and what a round makes of them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch

from coordinator import aggregation
from coordinator.blobs import Blobs
from coordinator.merge import first_adapter
from protocol import errors
from protocol.contents import read_header
from protocol.plan import Choice, Dtype, Layout, Plan, Scaling, Split
from protocol.slices import TORCH_DTYPES, Factors, Slice
from tests.merging.rounds import merge, read_digest, second_round
from tests.merging.small import LAYOUT, best, dense, make_plan, read, round_task, send, start_of, trained, untrained, update

CAP = 6
FROM_ALL = ["folded", "rotating", "flora", "fedex"]  # clients start from all of the adapter
WIDE = Layout(modules={"block.wide": (44, 40)}, base=LAYOUT.base)
OWN_FACTORS = ["zero_pad", "hetlora", "ffa"]  # clients start from the first directions as they are kept


def roomy(strategy: str, scaling: Scaling = Scaling.rank) -> Plan:
    """A plan of the usual cap; for fedex of one that has room for all that the averages of two rounds miss."""
    cap, layout = (36, WIDE) if strategy == "fedex" else (CAP, LAYOUT)
    return make_plan(strategy, cap=cap, layout=layout, scaling=scaling)


def leading(slice: Slice, rank: int, module: str) -> torch.Tensor:
    factors = slice.factors[module].of(range(rank))
    return slice.label.scale * (factors.b.double() @ factors.a.double())


@pytest.mark.parametrize("wire", [Dtype.float32, Dtype.bfloat16])
@pytest.mark.parametrize("split", Split)
@pytest.mark.parametrize("strategy", FROM_ALL)
def test_who_starts_from_all_of_the_adapter_has_all_of_it_at_its_own_scale(strategy: str, split: Split, wire: Dtype, blobs: Blobs) -> None:
    before, _ = second_round(blobs, make_plan(strategy, cap=CAP, split=split, wire=wire))
    adapter = read(blobs, before.adapter)
    for rank, ref in before.starts.items():
        start = read(blobs, ref)
        assert (start.label.rank, start.label.scale) == (CAP + rank if strategy == "flora" else CAP, 4 / rank)
        for module, factors in start.factors.items():
            whole = update(adapter, module)
            hair = 4 * torch.finfo(TORCH_DTYPES[wire]).eps
            assert torch.allclose(update(start, module), whole, rtol=0, atol=hair * CAP * float(whole.norm()))
            assert bool(factors.a.any(dim=1).all()), "every direction can learn"
            assert not factors.b[:, CAP:].any(), "fresh directions begin as nothing"
    for name in LAYOUT.full:
        assert torch.equal(read(blobs, start_of(before, 1)).full[name], read(blobs, before.slices[1]).full[name])


@pytest.mark.parametrize("strategy", OWN_FACTORS)
def test_who_starts_from_kept_factors_has_the_first_ones_as_they_are(strategy: str, blobs: Blobs) -> None:
    before, _ = second_round(blobs, make_plan(strategy, cap=CAP))
    adapter = read(blobs, before.adapter)
    for rank, ref in before.starts.items():
        start = read(blobs, ref)
        assert start.label.rank == rank
        for module, factors in start.factors.items():
            assert torch.equal(factors.a, adapter.factors[module].a[:rank])
            assert torch.allclose(update(start, module), leading(adapter, rank, module), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("strategy", [*FROM_ALL, *OWN_FACTORS])
def test_slices_are_the_best_of_their_rank_whatever_training_starts_from(strategy: str, blobs: Blobs) -> None:
    before, _ = second_round(blobs, roomy(strategy))
    adapter = read(blobs, before.adapter)
    for rank, ref in before.slices.items():
        for module in adapter.factors:
            whole = update(adapter, module)
            reached = float((whole - update(read(blobs, ref), module)).norm())
            assert reached <= float((whole - best(whole, rank)).norm()) + 1e-5 * float(whole.norm())


@pytest.mark.parametrize("strategy", aggregation.names())
def test_files_beside_the_slices_are_made_only_where_slices_do_not_serve(strategy: str, blobs: Blobs) -> None:
    published = first_adapter(make_plan(strategy, cap=CAP), blobs)
    kind = aggregation.load(strategy)
    assert bool(published.starts) == (not kind.singular or kind.portion is not aggregation.Portion.leading)
    assert {rank: start_of(published, rank) for rank in (1, 2, 4)} == (published.starts or published.slices)


def test_ranks_of_one_scale_share_the_file_that_holds_all_of_the_adapter(blobs: Blobs) -> None:
    shared = first_adapter(make_plan("folded", scaling=Scaling.constant), blobs)
    assert len({ref.digest for ref in shared.starts.values()}) == 1
    own = first_adapter(make_plan("folded", scaling=Scaling.root), blobs)
    assert len({ref.digest for ref in own.starts.values()}) == 3


@pytest.mark.parametrize("scaling", Scaling)
@pytest.mark.parametrize("strategy", [*FROM_ALL, "delta"])
def test_the_next_adapter_is_the_best_of_the_whole_one_and_the_changes(strategy: str, scaling: Scaling, blobs: Blobs) -> None:
    """Over stored files with ranks, scales, shares and bounded changes that differ."""
    plan = roomy(strategy, scaling)
    before, task = second_round(blobs, plan)
    after = read(blobs, merge(task, blobs).adapter)
    total = sum(input.weight for input in task.inputs)
    for module in after.factors:
        wanted = update(read(blobs, before.adapter), module)
        for input in task.inputs:
            given, sent = read_digest(blobs, input.base), read_digest(blobs, input.digest)
            old = given.factors[module].of(input.directions)
            start = given.label.scale * (old.b.double() @ old.a.double())
            wanted = wanted + input.weight / total * input.shrink * (update(sent, module) - start)
        assert torch.allclose(update(after, module), best(wanted, plan.global_rank), rtol=0, atol=2e-6 * float(wanted.norm()))


@pytest.mark.parametrize("scaling", Scaling)
@pytest.mark.parametrize("strategy", [*FROM_ALL, *OWN_FACTORS, "fedavg"])
def test_equal_ranks_that_learn_nothing_change_nothing_whatever_their_scale(strategy: str, scaling: Scaling, blobs: Blobs) -> None:
    plan = roomy(strategy, scaling)
    first = first_adapter(plan, blobs)
    before = merge(round_task(blobs, plan, first, [send(blobs, plan, start_of(first, 4), rank=4, seed=k) for k in range(2)]), blobs)
    idle = [send(blobs, plan, start_of(before, 4), rank=4, seed=k, train=untrained) for k in range(2)]
    after = merge(round_task(blobs, plan, before, idle, round=2), blobs)
    for module, factors in read(blobs, before.adapter).factors.items():
        was, now = dense(factors), update(read(blobs, after.adapter), module)
        assert float(was.norm()) > 0.1
        assert torch.allclose(was, now, rtol=0, atol=1e-6 * float(was.norm()))


@pytest.mark.parametrize("wire", [Dtype.bfloat16, Dtype.float16])
@pytest.mark.parametrize("size", [1.0, 1e-5])
@pytest.mark.parametrize("strategy", sorted({*aggregation.names()} - {"fedavg"}))
def test_what_a_round_says_of_rounding_holds_for_all_that_it_hands_out(strategy: str, size: float, wire: Dtype, blobs: Blobs) -> None:
    """Small factors too, of which float16 keeps few digits."""
    plan = make_plan(strategy, cap=CAP, wire=wire)
    first = first_adapter(plan, blobs)
    sent = [send(blobs, plan, start_of(first, r), rank=r, seed=r, train=partial(slightly_trained, size)) for r in (1, 2, 4)]
    found = merge(round_task(blobs, plan, first, sent), blobs)
    adapter = read(blobs, found.adapter)
    kept = aggregation.load(strategy).singular
    worst = dict.fromkeys(LAYOUT.modules, 0.0)
    for module, rank in product(LAYOUT.modules, (1, 2, 4)):
        whole, slice, start = update(adapter, module), read(blobs, found.slices[rank]), read(blobs, start_of(found, rank))
        meant = best(whole, rank), leading(adapter, min(start.label.rank, CAP), module)
        cuts = [(update(slice, module), meant[0]), (update(start, module), meant[0] if kept and start.label.rank == rank else meant[1])]
        worst[module] = max(worst[module], *(float((x - y).norm() / y.norm()) for x, y in cuts if y.norm() > 0))
    for module, energy in found.energy.items():
        assert energy.rounding is not None
        assert worst[module] <= energy.rounding + 1e-6
        assert energy.rounding <= 3 * worst[module] + 1e-6 or wire is Dtype.float16


def slightly_trained(size: float, start: Slice, seed: int) -> Slice:
    """b moved by so much, and a not at all."""
    done = trained(start, seed)
    moved = {
        name: Factors(b=f.b + (size * (done.factors[name].b.float() - f.b.float())).to(f.b), a=f.a) for name, f in start.factors.items()
    }
    return replace(done, factors=moved)


@pytest.mark.parametrize("directions", [None, (0,), (0, 0), (0, CAP), (-1, 0), (0, 1, 2)])
def test_directions_that_nobody_can_have_trained_are_refused(directions: tuple[int, ...] | None, blobs: Blobs) -> None:
    _, task = second_round(blobs, make_plan("rotating", cap=CAP))
    two = next(input for input in task.inputs if input.rank == 2)
    with pytest.raises(errors.MismatchedSlice, match=f"{two.digest} has rank 2 and is said to have trained"):
        merge(replace(task, inputs=(replace(two, directions=directions),)), blobs)


def test_ffa_sends_b_alone_and_never_leaves_the_first_rows_of_a(blobs: Blobs) -> None:
    plan = make_plan("ffa", cap=CAP, wire=Dtype.bfloat16)
    first = read(blobs, first_adapter(plan, blobs).adapter)
    before, task = second_round(blobs, plan)
    after = read(blobs, merge(task, blobs).adapter)
    for input in task.inputs:
        data = blobs.read(input.digest)
        assert {name for name in read_header(data, len(data)).entries if "/a" in name} == set()
    for module in LAYOUT.modules:
        assert torch.equal(first.factors[module].a, after.factors[module].a)
        assert torch.equal(read(blobs, start_of(before, 4)).factors[module].a.float(), after.factors[module].a[:4])
        assert float(after.factors[module].b.norm()) > 0


def test_rotating_clients_train_other_directions_every_round_and_each_its_own(blobs: Blobs) -> None:
    kind = aggregation.load("rotating")
    drawn = {(round, client): kind.portion.trained(4, 16, f"0/{round}/{client}/directions") for round in (1, 2) for client in "ab"}
    assert len({tuple(found or ()) for found in drawn.values()}) == 4
    assert all(found == sorted(set(found or ())) and len(found) == 4 and 0 <= found[0] <= found[-1] < 16 for found in drawn.values())
    often = [i for n in range(1000) for i in kind.portion.trained(4, 16, str(n)) or ()]
    assert all(190 < often.count(i) < 310 for i in range(16)), "every direction as often as any other: 250 ± 14 times"


def test_a_cap_without_room_for_what_the_average_misses_is_refused() -> None:
    strategy = aggregation.check(Choice(name="fedex"))
    with pytest.raises(errors.InvalidPlan, match=r"the cap is 4: set one above 4"):
        strategy.check(make_plan("fedex", cap=4))
    strategy.check(make_plan("fedex", cap=5))


def test_more_directions_than_any_slice_may_have_are_refused() -> None:
    wide = Layout(modules={"block.wide": (4096, 5000)}, base=LAYOUT.base)
    strategy = aggregation.check(Choice(name="flora"))
    strategy.check(make_plan("flora", cap=4092, layout=wide))
    with pytest.raises(errors.InvalidPlan, match=r"hands out 4097 directions.*at most 4096"):
        strategy.check(make_plan("flora", cap=4093, layout=wide))
