"""Every strategy of the folder: what it promises, held against dense float64; and hlora's and delta's own equations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coordinator import aggregation
from coordinator.aggregation import Contribution, Given, ModuleRound, Portion, Sides, Strategy
from coordinator.lowrank import truncate
from protocol.plan import Choice
from protocol.slices import Factors
from tests.merging.small import best, dense
from tests.merging.test_truncation import dense as multiplied_out
from tests.merging.test_truncation import rand

STRATEGIES = aggregation.names()
LADDER = (1, 2, 4)


def strategy(name: str) -> Strategy:
    return aggregation.check(Choice(name=name))


def suited(name: str, round: ModuleRound) -> ModuleRound:
    """The round as that strategy hands it out, or for those that want equal ranks, as much of it as has the first client's."""
    kind = type(strategy(name))
    told = [handed(kind, round, c, number) for number, c in enumerate(round.contributions)]
    if not kind.equal_ranks:
        return replace(round, contributions=tuple(told))
    kept = [c for c in told if c.factors.rank == told[0].factors.rank]
    total = sum(c.weight for c in kept)
    return replace(round, contributions=tuple(replace(c, weight=c.weight / total) for c in kept))


def handed(kind: type[Strategy], round: ModuleRound, c: Contribution, number: int) -> Contribution:
    """The same training of what the strategy hands out: a file of more directions, those drawn, b alone."""
    if (kind.portion, kind.sides) == (Portion.leading, Sides.both):
        return c
    whole, rank = round.adapter, c.factors.rank
    assert isinstance(whole, Factors)
    held, directions = kind.portion.held(rank, whole.rank), kind.portion.trained(rank, whole.rank, str(number))
    on_top = max(0, held - whole.rank)
    file = Factors(
        b=torch.cat([whole.b / c.given.scale, torch.zeros(len(whole.b), on_top)], dim=1)[:, :held],
        a=torch.cat([whole.a, rand(on_top, whole.a.shape[1], seed=17)])[:held],
    )
    start, old = file.of(directions), loaded(c.given.factors)
    new = Factors(
        b=start.b + (loaded(c.factors).b - old.b), a=start.a + (loaded(c.factors).a - old.a) if kind.sides is Sides.both else start.a
    )
    return replace(c, factors=new, given=replace(c.given, factors=file), directions=None if directions is None else tuple(directions))


def loaded(factors: object) -> Factors:
    assert isinstance(factors, Factors)
    return factors


@dataclass(frozen=True)
class Client:
    """One client of a round, in short."""

    rank: int
    weight: float
    shrink: float
    seed: int


def make_round(shape: tuple[int, int], clients: Sequence[Client], *, version: int = 0, move: float = 1.0) -> ModuleRound:
    """Clients at ranks 1, 2, 4 with scales 4 / rank; slices are the leading part of a global adapter of rank 4."""
    n_out, n_in = shape
    adapter = Factors(b=rand(n_out, 4, seed=version), a=rand(4, n_in, seed=version + 1))
    given = {
        r: Given(f"sha256:{r:064}", Factors(b=adapter.b[:, :r] * r / 4, a=adapter.a[:r]), 4 / r) for r in LADDER
    }  # r/4 · b is the leading part divided by the scale
    total = sum(client.weight for client in clients)
    contributions = tuple(
        Contribution(
            factors=Factors(
                b=given[c.rank].factors.b + move * rand(n_out, c.rank, seed=c.seed),  # type: ignore[union-attr]  # Factors, as made above
                a=given[c.rank].factors.a + move * rand(c.rank, n_in, seed=c.seed + 1),  # type: ignore[union-attr]
            ),
            scale=given[c.rank].scale,
            weight=c.weight / total,
            shrink=c.shrink,
            given=given[c.rank],
        )
        for c in clients
    )
    return ModuleRound(shape=shape, round=1, adapter=adapter, contributions=contributions)


def product(factors: object, scale: float) -> Tensor:
    return dense(loaded(factors), scale)


def started(c: Contribution) -> Tensor:
    """The directions that a contribution trained, as they were given."""
    return product(c.started((len(loaded(c.factors).b), loaded(c.factors).a.shape[1])), c.given.scale)


def counted(c: Contribution) -> Tensor:
    """The update that a contribution counts as: where it started, and the share of its change that counts."""
    return started(c) + c.shrink * (product(c.factors, c.scale) - started(c))


clients = st.builds(
    Client,
    rank=st.sampled_from(LADDER),
    weight=st.floats(0.01, 100),
    shrink=st.sampled_from([1.0, 1.0, 0.5, 0.01]),
    seed=st.integers(0, 2**32),
)
rounds = st.builds(
    make_round, st.sampled_from([(20, 12), (5, 30), (30, 5), (3, 3)]), st.lists(clients, min_size=1, max_size=6), version=st.integers(0, 99)
)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-12 * float(a.abs().max() + b.abs().max() + 1))


@settings(deadline=None, max_examples=60)
@given(rounds)
def test_hlora_is_the_weighted_mean_of_the_scaled_products(round: ModuleRound) -> None:
    wanted = torch.stack([c.weight * counted(c) for c in round.contributions]).sum(dim=0)
    assert close(multiplied_out(strategy("hlora").combine(round)), wanted)


@settings(deadline=None, max_examples=60)
@given(rounds)
def test_delta_is_the_global_adapter_and_the_weighted_mean_of_the_changes(round: ModuleRound) -> None:
    changes = [c.weight * (counted(c) - product(c.given.factors, c.given.scale)) for c in round.contributions]
    wanted = product(round.adapter, 1.0) + torch.stack(changes).sum(dim=0)
    assert close(multiplied_out(strategy("delta").combine(round)), wanted)


@settings(deadline=None, max_examples=30)
@given(rounds, st.integers(1, 4))
def test_the_cut_of_the_sum_is_the_best_of_its_rank(round: ModuleRound, rank: int) -> None:
    for name in STRATEGIES:
        w = strategy(name).combine(suited(name, round))
        whole, found = multiplied_out(w), truncate(w, rank)
        optimum = float((whole - best(whole, rank)).norm())
        reached = float((whole - found.b.double() @ found.a.double()).norm())
        assert reached <= optimum + 1e-6 * float(sum(product(c.factors, c.scale).norm() for c in round.contributions) + whole.norm())


@pytest.mark.parametrize("name", STRATEGIES)
class TestEveryStrategy:
    """The laws, by what each strategy says of itself."""

    @settings(deadline=None, max_examples=30)
    @given(round=rounds, data=st.data())
    def test_the_order_of_contributions_changes_no_more_than_rounding(self, name: str, round: ModuleRound, data: st.DataObject) -> None:
        round = suited(name, round)
        mixed = replace(round, contributions=tuple(data.draw(st.permutations(round.contributions))))
        assert close(multiplied_out(strategy(name).combine(mixed)), multiplied_out(strategy(name).combine(round)))

    @settings(deadline=None, max_examples=30)
    @given(round=rounds)
    def test_two_contributions_of_half_the_weight_are_one(self, name: str, round: ModuleRound) -> None:
        round = suited(name, round)
        halves = tuple(replace(c, weight=c.weight / 2) for c in round.contributions for _ in range(2))
        assert close(
            multiplied_out(strategy(name).combine(replace(round, contributions=halves))), multiplied_out(strategy(name).combine(round))
        )

    @settings(deadline=None, max_examples=30)
    @given(round=rounds, factor=st.sampled_from([0.25, 2.0, 32.0]))
    def test_a_factor_may_stand_in_the_scale_or_in_b(self, name: str, round: ModuleRound, factor: float) -> None:
        round = suited(name, round)
        moved = tuple(replace(c, scale=c.scale * factor, factors=times(c.factors, 1 / factor)) for c in round.contributions)
        assert close(
            multiplied_out(strategy(name).combine(replace(round, contributions=moved))), multiplied_out(strategy(name).combine(round))
        )

    def test_equal_ranks_without_any_change_keep_the_adapter(self, name: str) -> None:
        still = suited(name, make_round((20, 12), [Client(rank=4, weight=w, shrink=1.0, seed=1) for w in (1.0, 2.0, 5.0)], move=0.0))
        assert close(multiplied_out(strategy(name).combine(still)), product(still.adapter, 1.0))


def saying(promise: str) -> list[str]:
    """The strategies that promise it: exact, linear or gauge_free."""
    return [name for name in STRATEGIES if getattr(aggregation.load(name), promise)]


@pytest.mark.parametrize("name", saying("gauge_free"))
@settings(deadline=None, max_examples=30)
@given(round=rounds, seed=st.integers(0, 2**32))
def test_the_gauge_does_not_matter_to_those_that_say_so(name: str, round: ModuleRound, seed: int) -> None:
    round = suited(name, round)
    turned = tuple(replace(c, factors=turn(c.factors, seed)) for c in round.contributions)
    assert close(
        multiplied_out(strategy(name).combine(replace(round, contributions=turned))), multiplied_out(strategy(name).combine(round))
    )


@pytest.mark.parametrize("name", saying("linear"))
@settings(deadline=None, max_examples=30)
@given(shape=st.sampled_from([(20, 12), (5, 30)]), crowd=st.lists(clients, min_size=1, max_size=5), share=st.floats(0, 1))
def test_the_sum_is_linear_in_what_clients_send_where_it_says_so(
    name: str, shape: tuple[int, int], crowd: list[Client], share: float
) -> None:
    one = suited(name, make_round(shape, crowd, move=1.0))
    two = suited(name, make_round(shape, [replace(c, seed=c.seed + 7) for c in crowd], move=0.5))
    sides = strategy(name).sides
    mixed = replace(one, contributions=tuple(mix(c, d, share, sides) for c, d in zip(one.contributions, two.contributions, strict=True)))
    sums = [multiplied_out(strategy(name).combine(round)) for round in (one, two, mixed)]
    assert close(sums[2], share * sums[0] + (1 - share) * sums[1])


@pytest.mark.parametrize("name", saying("exact"))
@settings(deadline=None, max_examples=30)
@given(shape=st.sampled_from([(20, 12), (5, 30)]), crowd=st.lists(clients, min_size=1, max_size=5))
def test_the_sum_is_the_mean_of_what_clients_made_where_it_says_so(name: str, shape: tuple[int, int], crowd: list[Client]) -> None:
    """All train all directions here, so that no weight per direction differs from the client's."""
    round = suited(name, make_round(shape, [replace(c, rank=4) for c in crowd]))
    assert close(multiplied_out(strategy(name).combine(round)), mean_of_changes(round))


@pytest.mark.parametrize("name", sorted({*STRATEGIES} - {*saying("exact")}))
def test_the_sum_has_cross_terms_where_it_does_not_say_so(name: str) -> None:
    round = suited(name, make_round((20, 12), [Client(rank=4, weight=1.0, shrink=1.0, seed=k) for k in (1, 2)]))
    assert not close(multiplied_out(strategy(name).combine(round)), mean_of_changes(round))


def mean_of_changes(round: ModuleRound) -> Tensor:
    """W + Σ p γ (s b a − s₀ b₀ a₀)."""
    return product(round.adapter, 1.0) + torch.stack([c.weight * (counted(c) - started(c)) for c in round.contributions]).sum(dim=0)


def turn(factors: object, seed: int) -> Factors:
    """The same product from other factors: b m, m⁻¹ a."""
    assert isinstance(factors, Factors)
    q, _ = torch.linalg.qr(rand(factors.rank, factors.rank, seed=seed, dtype=torch.float64))
    m = q * torch.linspace(1, 2, factors.rank, dtype=torch.float64)
    return Factors(b=factors.b.double() @ m, a=torch.linalg.solve(m, factors.a.double()))


def times(factors: object, factor: float) -> Factors:
    assert isinstance(factors, Factors)
    return Factors(b=factors.b * factor, a=factors.a)


def mix(c: Contribution, d: Contribution, share: float, sides: Sides) -> Contribution:
    """A client that sends the mixture share · b₁ a₁ + (1 − share) · b₂ a₂ of two others' products."""
    one, two = loaded(c.factors), loaded(d.factors)
    b = share * one.b.double(), (1 - share) * two.b.double()
    if sides is Sides.b:  # a is theirs alike
        return replace(c, factors=Factors(b=b[0] + b[1], a=one.a))
    both = Factors(b=torch.cat(b, dim=1), a=torch.cat([one.a.double(), two.a.double()]))
    return replace(c, factors=both, directions=None if c.directions is None else c.directions * 2)


def test_delta_stacks_the_clients_the_adapter_and_each_slice_given_once() -> None:
    crowd = [Client(rank=r, weight=1.0, shrink=1.0, seed=k) for k, r in enumerate((1, 2, 2, 4, 4, 4))]
    assert strategy("delta").combine(make_round((40, 40), crowd)).rank == (1 + 2 + 2 + 4 + 4 + 4) + 4 + (1 + 2 + 4)


def test_hlora_stacks_the_clients_alone_unless_a_change_was_clipped() -> None:
    crowd = [Client(rank=r, weight=1.0, shrink=1.0, seed=k) for k, r in enumerate((1, 2, 4))]
    assert strategy("hlora").combine(make_round((40, 40), crowd)).rank == 7
    crowd[1] = replace(crowd[1], shrink=0.5)
    assert strategy("hlora").combine(make_round((40, 40), crowd)).rank == 9
