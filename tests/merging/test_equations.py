"""Every strategy against its paper's equation, written out over dense matrices in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from coordinator import aggregation
from coordinator.aggregation import Contribution, ModuleRound
from coordinator.blobs import Blobs
from coordinator.contributions import untouched
from coordinator.lowrank import held, truncate
from coordinator.sums import Sum, Term
from protocol import errors
from protocol.slices import Factors
from tests.merging.rounds import heard, merge, second_round
from tests.merging.small import best, dense, make_plan, read, update
from tests.merging.test_strategies import (
    STRATEGIES,
    Client,
    close,
    counted,
    loaded,
    make_round,
    product,
    rounds,
    started,
    strategy,
    suited,
)
from tests.merging.test_truncation import dense as multiplied_out
from tests.merging.test_truncation import rand


def directions(factors: object, scale: float) -> list[Tensor]:
    """The rank-one parts s bᵢ aᵢ of a slice, dense."""
    assert isinstance(factors, Factors)
    return [dense(Factors(b=factors.b[:, i : i + 1], a=factors.a[i : i + 1]), scale) for i in range(factors.rank)]


def counted_directions(c: Contribution) -> list[Tensor]:
    pairs = zip(directions(c.factors, c.scale), directions(c.given.factors, c.given.scale), strict=True)
    return [c.shrink * new + (1 - c.shrink) * old for new, old in pairs]


def holders(round: ModuleRound, i: int) -> list[Contribution]:
    return [c for c in round.contributions if c.factors.rank > i]


@settings(deadline=None, max_examples=40)
@given(rounds)
def test_raflora_averages_every_partition_over_those_who_hold_it(round: ModuleRound) -> None:
    wanted = torch.zeros(round.shape, dtype=torch.float64)
    own = directions(round.adapter, 1.0)
    for low, high in ((0, 1), (1, 2), (2, 4)):  # the partitions of ranks 1, 2 and 4
        held = [c for c in round.contributions if c.factors.rank >= high]
        total = sum(c.weight for c in held)
        for i in range(low, high):
            wanted += sum((c.weight / total * counted_directions(c)[i] for c in held), torch.zeros(())) if held else own[i]
    assert close(multiplied_out(strategy("raflora").combine(round)), wanted)


@settings(deadline=None, max_examples=40)
@given(rounds)
def test_reweighted_adds_to_each_direction_the_mean_change_of_those_who_train_it(round: ModuleRound) -> None:
    wanted = product(round.adapter, 1.0)
    for i in range(4):
        held = holders(round, i)
        for c in held:
            change = counted_directions(c)[i] - directions(c.given.factors, c.given.scale)[i]
            wanted = wanted + c.weight / sum(x.weight for x in held) * change
    assert close(multiplied_out(strategy("reweighted").combine(round)), wanted)


@settings(deadline=None, max_examples=40)
@given(rounds)
def test_raflora_is_reweighted_where_slices_are_the_adapters_directions(round: ModuleRound) -> None:
    assert close(multiplied_out(strategy("raflora").combine(round)), multiplied_out(strategy("reweighted").combine(round)))


def padded_mean(round: ModuleRound, weights: list[float]) -> Tensor:
    """(Σ w s b)(Σ w a) with zeros up to rank 4, for rounds in which every change counts in full."""
    b, a = torch.zeros(round.shape[0], 4).double(), torch.zeros(4, round.shape[1]).double()
    for c, w in zip(round.contributions, weights, strict=True):
        assert isinstance(c.factors, Factors)
        r = c.factors.rank
        b[:, :r] += w * c.scale * c.factors.b.double()
        a[:r] += w * c.factors.a.double()
    return b @ a


@settings(deadline=None, max_examples=40)
@given(rounds)
def test_zero_padding_multiplies_the_averaged_factors(round: ModuleRound) -> None:
    full = replace(round, contributions=tuple(replace(c, shrink=1.0) for c in round.contributions))
    assert close(multiplied_out(strategy("zero_pad").combine(full)), padded_mean(full, [c.weight for c in full.contributions]))


@settings(deadline=None, max_examples=40)
@given(rounds)
def test_hetlora_weighs_by_the_norm_of_the_update(round: ModuleRound) -> None:
    full = replace(round, contributions=tuple(replace(c, shrink=1.0) for c in round.contributions))
    norms = [c.weight * float(product(c.factors, c.scale).norm()) for c in full.contributions]
    assert close(multiplied_out(strategy("hetlora").combine(full)), padded_mean(full, [x / sum(norms) for x in norms]))


def test_hetlora_weighs_by_share_where_nobody_has_an_update() -> None:
    round = make_round((6, 5), [Client(2, 1.0, 1.0, 1), Client(4, 1.0, 1.0, 2)])
    nothing = tuple(
        replace(c, factors=Factors(b=torch.zeros(6, c.factors.rank), a=rand(c.factors.rank, 5, seed=1))) for c in round.contributions
    )
    assert not multiplied_out(strategy("hetlora").combine(replace(round, contributions=nothing))).any()


def test_fedavg_is_zero_padding_for_equal_ranks_and_refuses_others() -> None:
    equal = make_round((12, 9), [Client(2, 1.0, 1.0, 1), Client(2, 3.0, 1.0, 2)])
    assert close(multiplied_out(strategy("fedavg").combine(equal)), padded_mean(equal, [0.25, 0.75]))
    with pytest.raises(errors.UnmergeableRound, match=r"ranks \[1, 2\] came"):
        strategy("fedavg").combine(make_round((12, 9), [Client(2, 1.0, 1.0, 1), Client(1, 1.0, 1.0, 2)]))


@pytest.mark.parametrize("name", ["zero_pad", "hetlora", "fedavg"])
def test_a_factor_moves_only_so_far_where_a_change_counts_in_part(name: str) -> None:
    whole = make_round((12, 9), [Client(2, 1.0, 1.0, 1)])
    (c,) = whole.contributions
    assert isinstance(c.factors, Factors)
    assert isinstance(c.given.factors, Factors)
    old = c.given.factors
    moved = Factors(b=old.b + 0.25 * (c.factors.b - old.b), a=old.a + 0.25 * (c.factors.a - old.a))
    part = replace(whole, contributions=(replace(c, shrink=0.25),))
    # float32 halves of halves: rounding of the factors above
    assert torch.allclose(multiplied_out(strategy(name).combine(part)), product(moved, c.scale), atol=1e-5)


CHANGES = [name for name in STRATEGIES if issubclass(aggregation.load(name), aggregation.Changes)]


@settings(deadline=None, max_examples=20)
@given(rounds)
@pytest.mark.parametrize("name", ["folded", "rotating", "flora", "fedex"])
def test_what_clients_changed_of_their_trained_directions_is_added_to_all_of_the_adapter(name: str, round: ModuleRound) -> None:
    round = suited(name, round)
    changes = torch.stack([c.weight * (counted(c) - started(c)) for c in round.contributions]).sum(dim=0)
    assert close(multiplied_out(strategy(name).combine(round)), product(round.adapter, 1.0) + changes)


@settings(deadline=None, max_examples=20)
@given(rounds)
def test_flora_stacks_the_fresh_products_beside_the_adapter(round: ModuleRound) -> None:
    round = suited("flora", round)
    stacked = torch.stack([c.weight * c.shrink * product(c.factors, c.scale) for c in round.contributions]).sum(dim=0)
    w = strategy("flora").combine(round)
    assert close(multiplied_out(w), product(round.adapter, 1.0) + stacked)
    assert w.rank == 4 + sum(c.factors.rank for c in round.contributions)


@pytest.mark.parametrize("name", ["rotating", "folded", "flora", "ffa", "delta"])
@pytest.mark.parametrize("power", [0.5, 1.0])
@settings(deadline=None, max_examples=20)
@given(rounds)
def test_reweighting_divides_by_a_power_of_the_share_of_those_who_train_a_direction(name: str, power: float, round: ModuleRound) -> None:
    round = suited(name, round)
    wanted, shares = product(round.adapter, 1.0), dict[int, float]()
    for c in round.contributions:
        for i in c.positions.tolist():
            shares[i] = shares.get(i, 0.0) + c.weight
    for c in round.contributions:
        new, old = directions(c.factors, c.scale), directions(c.started(round.shape), c.given.scale)
        for at, i in enumerate(c.positions.tolist()):
            wanted = wanted + c.weight / shares[i] ** power * c.shrink * (new[at] - old[at])
    assert close(multiplied_out(strategy(name).model_copy(update={"reweight": power}).combine(round)), wanted)


@settings(deadline=None, max_examples=20)
@given(rounds)
def test_ffa_adds_the_mean_change_of_b_beside_the_frozen_a(round: ModuleRound) -> None:
    round = suited("ffa", round)
    assert isinstance(round.adapter, Factors)
    b = round.adapter.b.double()
    for c in round.contributions:
        new, old = loaded(c.factors).b.double(), loaded(c.given.factors).b.double()
        b[:, : c.factors.rank] += c.weight * c.shrink * c.scale * (new - old)
    w = strategy("ffa").combine(round)
    kept = strategy("ffa").keep(round, w, Factors(b=round.adapter.b, a=round.adapter.a))
    assert close(kept.b, b)
    assert torch.equal(kept.a, round.adapter.a)
    assert close(multiplied_out(w), b @ round.adapter.a.double())


def test_ffa_is_the_papers_mean_of_b_where_ranks_are_equal() -> None:
    round = suited("ffa", make_round((12, 9), [Client(4, 1.0, 1.0, 1), Client(4, 3.0, 1.0, 2)]))
    mean = torch.stack([c.weight * c.scale * loaded(c.factors).b.double() for c in round.contributions]).sum(dim=0)
    assert close(multiplied_out(strategy("ffa").combine(round)), mean @ loaded(round.adapter).a.double())


def test_fedex_keeps_the_average_and_beside_it_what_the_average_misses_of_the_mean() -> None:
    """With frozen weights W₀ + R:  R ← R + Σ p s b a − (Σ p s b)(Σ p a), and training goes on from the averages."""
    crowd = [Client(2, 1.0, 1.0, 1), Client(2, 3.0, 1.0, 2)]
    round = suited("fedex", make_round((12, 9), crowd))
    frozen = product(round.adapter, 1.0) - started(round.contributions[0])
    mean = torch.stack([c.weight * product(c.factors, c.scale) for c in round.contributions]).sum(dim=0)
    w = strategy("fedex").combine(round)
    kept = strategy("fedex").keep(round, w, truncate(w, 9).padded(9))
    averages = Factors(b=kept.b[:, :2], a=kept.a[:2])
    assert torch.allclose(dense(averages), padded_mean(round, [0.25, 0.75]), atol=1e-5)
    residual = Factors(b=kept.b[:, 2:], a=kept.a[2:])
    assert torch.allclose(dense(residual), frozen + mean - padded_mean(round, [0.25, 0.75]), atol=1e-5)


def test_fedex_averages_a_direction_over_those_who_train_it() -> None:
    round = suited("fedex", make_round((12, 9), [Client(1, 1.0, 1.0, 1), Client(2, 3.0, 1.0, 2)]))
    w = strategy("fedex").combine(round)
    kept = strategy("fedex").keep(round, w, truncate(w, 9).padded(9))
    two = round.contributions[1]
    assert torch.allclose(kept.a[1], loaded(two.factors).a[1])
    assert torch.allclose(kept.b[:, 1], two.scale * loaded(two.factors).b[:, 1])
    assert torch.allclose(dense(kept), multiplied_out(w), atol=1e-5)


def test_what_a_round_says_of_fedex_is_said_of_what_it_keeps(blobs: Blobs) -> None:
    """With room for little beside the averages, what is kept holds less than the best approximation of the mean does."""
    before, task = second_round(blobs, make_plan("fedex", cap=5))
    found = merge(task, blobs)
    for module, energy in found.energy.items():
        whole = update(read(blobs, before.adapter), module)
        for p, y, sent, start in heard(task, blobs):
            began = dense(start.factors[module].leading(sent.label.rank), start.label.scale)
            whole += p * y * (update(sent, module) - began)
        kept = update(read(blobs, found.adapter), module)
        lost = float((whole - kept).square().sum() / whole.square().sum())
        assert 1 - energy.kept[5] == pytest.approx(lost, rel=1e-3, abs=1e-6)
        least = float((whole - best(whole, 5)).square().sum() / whole.square().sum())
        assert lost > 1.01 * least
        assert energy.short == pytest.approx(lost - least, rel=1e-3, abs=1e-6)
        for rank in (1, 2, 4):
            assert torch.allclose(update(read(blobs, found.slices[rank]), module), best(kept, rank), atol=1e-5)
            short = float((whole - best(kept, rank)).square().sum() / whole.square().sum())
            assert 1 - energy.kept[rank] == pytest.approx(short, rel=1e-3, abs=1e-6)


def test_what_is_farther_from_the_mean_than_nothing_says_so() -> None:
    """Two clients send the same product, one with both factors turned about: their average is another matrix altogether."""
    b, a = rand(12, 2, seed=1), rand(2, 9, seed=2)
    w = Sum((12, 9), [Term(Factors(b=b, a=a), 0.1)])
    own = truncate(Sum((12, 9), [Term(Factors(b=-b, a=a), 1.0)]), 2)
    total = truncate(w, 2).total
    assert held(w, own, total, [2])[2] == pytest.approx(1 - 1.1**2 / 0.1**2, rel=1e-6)


def test_the_directions_that_nobody_trained_are_those_that_no_portion_named() -> None:
    round = make_round((20, 12), [Client(1, 1.0, 1.0, 1)])
    rotated = replace(round, contributions=(replace(round.contributions[0], directions=(3,)),))
    assert untouched(rotated).weights().tolist() == [1.0, 1.0, 1.0, 0.0]
