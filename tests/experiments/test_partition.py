"""Rows shared out: whatever the kind, no row is given twice, sizes are what was asked for, and the seed says all."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.experiment import Partition
from experiments.partition import counted, shared_out
from protocol import errors

KINDS = ["iid", "dirichlet", "quantity", "by-source"]


def rows(news: int, questions: int) -> list[str]:
    return ["news"] * news + ["questions"] * questions


@pytest.mark.parametrize("kind", KINDS)
@given(
    clients=st.integers(1, 12), news=st.integers(1, 40), questions=st.integers(12, 60), alpha=st.floats(0.01, 100), seed=st.integers(0, 9)
)
def test_every_row_is_given_to_exactly_one_client(kind: str, clients: int, news: int, questions: int, alpha: float, seed: int) -> None:
    partition = Partition.model_validate({"kind": kind, "clients": clients, "alpha": alpha})
    of = rows(news, questions)
    found = shared_out(partition, of, of, seed)
    assert len(found) == clients
    assert sorted(n for mine in found for n in mine) == list(range(len(of)))
    assert all(found)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "by-source"])
def test_with_a_number_of_rows_every_client_has_exactly_so_many_and_none_is_shared(kind: str) -> None:
    of = rows(100, 300)
    found = shared_out(Partition.model_validate({"kind": kind, "clients": 20, "rows": 15, "alpha": 0.3}), of, of, seed=1)
    assert [len(mine) for mine in found] == [15] * 20
    assert len({n for mine in found for n in mine}) == 300


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_partition_and_another_seed_another(kind: str) -> None:
    partition, of = Partition.model_validate({"kind": kind, "clients": 8}), rows(40, 40)
    assert shared_out(partition, of, of, 3) == shared_out(partition, of, of, 3)
    assert shared_out(partition, of, of, 3) != shared_out(partition, of, of, 4)


def test_an_iid_client_has_the_mix_of_all_rows() -> None:
    of = rows(40, 120)
    for mine in shared_out(Partition(kind="iid", clients=10), of, of, 0):
        assert Counter(of[n] for n in mine) == {"news": 4, "questions": 12}


def test_a_client_by_source_has_rows_of_one_source_whatever_its_labels() -> None:
    sources, labels = rows(40, 120), ["yes", "no"] * 80
    found = shared_out(Partition(kind="by-source", over="label", clients=8), labels, sources, 0)
    owners = [{sources[n] for n in mine} for mine in found]
    assert all(len(owner) == 1 for owner in owners)
    assert Counter(next(iter(owner)) for owner in owners) == {"news": 2, "questions": 6}


def test_a_small_alpha_makes_mixes_and_sizes_unequal_and_a_large_one_equal() -> None:
    of = rows(400, 400)

    def mixes(alpha: float) -> list[float]:
        found = shared_out(Partition(kind="dirichlet", alpha=alpha, clients=20, rows=10), of, of, 0)
        return [sum(of[n] == "news" for n in mine) / 10 for mine in found]

    def sizes(alpha: float) -> list[int]:
        return [len(mine) for mine in shared_out(Partition(kind="quantity", alpha=alpha, clients=20), of, of, 0)]

    assert sum(share in (0.0, 1.0) for share in mixes(0.05)) > 15
    assert all(0.3 < share < 0.7 for share in mixes(1000.0))
    assert max(sizes(0.3)) > 4 * sorted(sizes(0.3))[10]
    assert max(sizes(1000.0)) < 1.5 * min(sizes(1000.0))


def test_more_clients_than_rows_are_refused() -> None:
    with pytest.raises(errors.DataRefusal, match="need 6; there are 5"):
        shared_out(Partition(clients=3, rows=2), rows(2, 3), rows(2, 3), 0)


def test_whole_numbers_are_in_proportion_and_sum_to_the_total() -> None:
    assert counted(20, [10, 5, 3, 2]) == [10, 5, 3, 2]
    assert counted(10, [1, 1, 1]) == [4, 3, 3]
    assert counted(7, [0.5, 0.25, 0.25]) == [3, 2, 2]
