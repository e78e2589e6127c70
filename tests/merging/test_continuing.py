"""Runs that begin with an adapter that another one published: the same product, at any cap, for every strategy."""

from __future__ import annotations

import pytest
import torch

from coordinator import aggregation
from coordinator.blobs import Blobs
from coordinator.merge import first_adapter
from protocol import errors
from protocol.contents import Label
from protocol.plan import Dtype, Head, Layout, Plan, Scaling, Sides
from protocol.slices import Factors, Slice, pack
from tests.merging.rounds import merge, read_digest, second_round
from tests.merging.small import LAYOUT, best, make_plan, read, round_task, send, start_of, update

ABLE = [name for name in aggregation.names() if aggregation.load(name).sides is Sides.both]


def roomy(strategy: str, cap: int = 6, **changes: object) -> Plan:
    plan = make_plan(strategy, ladder=(4,) if strategy == "fedavg" else (1, 2, 4), cap=cap)
    return plan.model_copy(update=changes)


def published(blobs: Blobs, plan: Plan | None = None) -> str:
    """The adapter of a round in which clients of unequal ranks learned, of rank 6."""
    return second_round(blobs, plan or make_plan(cap=6))[0].adapter.digest


@pytest.mark.parametrize("strategy", ABLE)
def test_every_strategy_begins_with_the_product_that_it_continues(strategy: str, blobs: Blobs) -> None:
    digest = published(blobs)
    old = read_digest(blobs, digest)
    made = first_adapter(roomy(strategy, continues=digest), blobs)
    new = read(blobs, made.adapter)
    assert new.label == Label(rank=6, scale=1.0, round=0)
    for module in LAYOUT.modules:
        wanted = update(old, module)
        assert float(wanted.norm()) > 0.1
        assert torch.allclose(update(new, module), wanted, rtol=0, atol=1e-6 * float(wanted.norm()))
        squares = torch.linalg.svdvals(wanted).square()
        assert made.energy[module].total == pytest.approx(float(squares.sum()), rel=1e-6)
        assert made.energy[module].kept[4] == pytest.approx(float(squares[:4].sum() / squares.sum()), rel=1e-6)
    assert all(torch.equal(new.full[name], tensor) for name, tensor in old.full.items())
    start = read(blobs, start_of(made, 4))
    held = update(start, "block.q")
    assert torch.allclose(held, best(update(old, "block.q"), start.label.rank), rtol=0, atol=1e-5 * float(held.norm()))


@pytest.mark.parametrize("cap", [4, 6, 9])
def test_a_smaller_cap_holds_the_best_of_it_and_a_larger_one_has_room_to_learn(cap: int, blobs: Blobs) -> None:
    digest = published(blobs)
    plan = roomy("delta", cap, continues=digest, ranks=make_plan(ladder=(1, cap)).ranks)
    made = first_adapter(plan, blobs)
    slice = read(blobs, made.slices[cap])
    for module in LAYOUT.modules:
        wanted = best(update(read_digest(blobs, digest), module), cap)
        assert torch.allclose(update(slice, module), wanted, rtol=0, atol=1e-5 * float(wanted.norm()))
        factors = slice.factors[module]
        assert bool(factors.a.any(dim=1).all())
        assert int(factors.b.any(dim=0).sum()) == min(cap, 6)


@pytest.mark.parametrize("scaling", Scaling)
def test_the_run_goes_on_from_there(scaling: Scaling, blobs: Blobs) -> None:
    """Clients that learn nothing change nothing, and one that learns adds its change."""
    digest = published(blobs)
    plan = make_plan(cap=6, scaling=scaling).model_copy(update={"continues": digest})
    first = first_adapter(plan, blobs)
    learned = send(blobs, plan, start_of(first, 4), rank=4, seed=3)
    after = read(blobs, merge(round_task(blobs, plan, first, [learned]), blobs).adapter)
    for module in LAYOUT.modules:
        given, sent = read(blobs, first.slices[4]), read_digest(blobs, learned.digest)
        wanted = update(read_digest(blobs, digest), module) + update(sent, module) - update(given, module)
        assert torch.allclose(update(after, module), best(wanted, 6), rtol=0, atol=2e-6 * float(wanted.norm()))


def test_a_head_that_stays_frozen_stays_what_it_was_as_exact_as_it_travels(blobs: Blobs) -> None:
    digest = published(blobs)
    plan = roomy("delta", continues=digest, wire=Dtype.bfloat16)
    plan = plan.model_copy(update={"adapter": plan.adapter.model_copy(update={"head": Head.frozen})})
    made = first_adapter(plan, blobs)
    for name, tensor in read_digest(blobs, digest).full.items():
        assert torch.equal(read(blobs, made.adapter).full[name], tensor.bfloat16().float())
        assert torch.equal(read(blobs, made.slices[4]).full[name], tensor.bfloat16())


def test_it_is_read_from_where_it_lies_and_comes_to_the_same_bytes(blobs: Blobs, tmp_path_factory: pytest.TempPathFactory) -> None:
    plan = roomy("fedex", continues=published(blobs))
    scratch = Blobs.open(tmp_path_factory.mktemp("scratch").as_uri())
    assert first_adapter(plan, scratch, blobs) == first_adapter(plan, blobs)
    with pytest.raises(errors.NotFound):
        first_adapter(plan, scratch)


def test_it_comes_to_the_same_bytes_whatever_the_thread_was_told(blobs: Blobs) -> None:
    """At this size sums of several threads come out otherwise than of one."""
    layout = Layout(modules={"wide": (4096, 4096)}, base=LAYOUT.base)
    generator = torch.Generator().manual_seed(0)
    factors = Factors(b=torch.randn(4096, 64, generator=generator), a=torch.randn(64, 4096, generator=generator))
    digest = blobs.put(pack(Slice(Label(rank=64, scale=1.0, round=1), {"wide": factors}), layout, Dtype.float32)).digest
    plan = make_plan(layout=layout, ladder=(64,)).model_copy(update={"continues": digest})
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(first_adapter(plan, blobs))
    assert found[0] == found[1]


@pytest.mark.parametrize("origin", ["zero_pad", "fedex", "ffa", "flora"])
def test_what_strategies_keep_in_a_form_of_their_own_can_be_continued(origin: str, blobs: Blobs) -> None:
    digest = published(blobs, make_plan(origin, cap=6))
    made = first_adapter(roomy("delta", continues=digest), blobs)
    for module in LAYOUT.modules:
        wanted = update(read_digest(blobs, digest), module)
        assert torch.allclose(update(read(blobs, made.adapter), module), wanted, rtol=0, atol=1e-6 * float(wanted.norm()))


def test_what_the_wire_cannot_carry_is_refused(blobs: Blobs) -> None:
    factors = {name: Factors(b=torch.full((n_out, 1), 3e5), a=torch.full((1, n_in), 3e5)) for name, (n_out, n_in) in LAYOUT.modules.items()}
    huge = Slice(Label(rank=1, scale=1.0, round=1), factors, {name: torch.zeros(shape) for name, shape in LAYOUT.full.items()})
    digest = blobs.put(pack(huge, LAYOUT, Dtype.float32)).digest
    first_adapter(roomy("delta", continues=digest), blobs)
    with pytest.raises(errors.NonFiniteSlice, match="start a run whose wire is bfloat16 or float32"):
        first_adapter(roomy("delta", continues=digest, wire=Dtype.float16), blobs)
