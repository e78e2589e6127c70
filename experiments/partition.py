"""Rows shared out among clients: sizes, and mixes of kinds, both from a seed.

kind         sizes                     mixes
iid          equal                     that of all rows
dirichlet    equal                     q ~ Dirichlet(α p) for each client, p the mix of all rows (Hsu et al. 2019)
quantity     s ~ Dirichlet(α, …, α)    that of all rows
by-source    equal                     one source for each client, sources by their share of the rows

No row is given twice; without a number of rows per client every row is given. Nothing here is read but counts.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from experiments.experiment import Partition
from protocol import errors

Pools = Mapping[str, Sequence[int]]  # kind → the numbers of its rows


def shared_out(partition: Partition, kinds: Sequence[str], sources: Sequence[str], seed: int) -> list[list[int]]:
    """The numbers of each client's rows, rising; kinds and sources say what each row is.

    Every client has at least one row. Raises DataRefusal for more clients, or rows for each of them, than there are rows.
    """
    chance = random.Random(f"partition/{seed}")
    wanted = partition.clients * (partition.rows or 1)
    if wanted > len(kinds):
        raise errors.DataRefusal(
            f"{partition.clients} clients with {partition.rows or 1} rows or more need {wanted}; there are {len(kinds)}"
        )
    of = sources if partition.kind == "by-source" else kinds
    pools = {kind: [n for n, name in enumerate(of) if name == kind] for kind in sorted(set(of))}
    sizes = _sizes(partition, len(kinds), chance)
    mixes = _mixes(partition, {kind: len(pool) / len(of) for kind, pool in pools.items()}, chance)
    return _drawn(sizes, mixes, pools, chance)


def counted(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to the weights, that sum to the total: rounded down, the largest remainders rounded up."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(x) for x in exact]
    ordered = sorted(range(len(exact)), key=lambda n: (counts[n] - exact[n], n))
    for n in ordered[: total - sum(counts)]:
        counts[n] += 1
    return counts


def _sizes(partition: Partition, rows: int, chance: random.Random) -> list[int]:
    total = rows if partition.rows is None else partition.rows * partition.clients
    if partition.kind != "quantity":
        return counted(total, [1.0] * partition.clients)
    shares = _dirichlet([partition.alpha] * partition.clients, chance)
    return [1 + more for more in counted(total - partition.clients, shares)]  # a client without rows is none


def _mixes(partition: Partition, whole: Mapping[str, float], chance: random.Random) -> list[dict[str, float]]:
    match partition.kind:
        case "dirichlet":
            weights = [partition.alpha * share for share in whole.values()]
            return [dict(zip(whole, _dirichlet(weights, chance), strict=True)) for _ in range(partition.clients)]
        case "by-source":
            counts = counted(partition.clients, list(whole.values()))
            owned = [{kind: 1.0} for kind, count in zip(whole, counts, strict=True) for _ in range(count)]
            chance.shuffle(owned)
            return owned
        case _:
            return [dict(whole) for _ in range(partition.clients)]


def _dirichlet(weights: Sequence[float], chance: random.Random) -> list[float]:
    """One draw: independent gamma variates, divided by their sum."""
    drawn = [chance.gammavariate(weight, 1.0) for weight in weights]
    return [x / sum(drawn) for x in drawn] if sum(drawn) > 0 else [1 / len(drawn)] * len(drawn)


def _drawn(sizes: Sequence[int], mixes: Sequence[Mapping[str, float]], pools: Pools, chance: random.Random) -> list[list[int]]:
    """Each client's rows, kind by kind in the proportions of its mix; where a kind has run out, of those that are left."""
    left = {kind: list(pool) for kind, pool in pools.items()}
    for pool in left.values():
        chance.shuffle(pool)
    clients: list[list[int]] = []
    for size, mix in zip(sizes, mixes, strict=True):
        mine: list[int] = []
        for kind, count in zip(left, counted(size, [mix.get(kind, 0.0) for kind in left]), strict=True):
            mine += _taken(left[kind], count)
        while len(mine) < size:
            fullest = max(left, key=lambda kind: len(left[kind]))
            mine += _taken(left[fullest], size - len(mine))
        clients.append(sorted(mine))
    return clients


def _taken(pool: list[int], count: int) -> list[int]:
    """That many rows off the pool's end, or what is left of it."""
    taken = pool[len(pool) - min(count, len(pool)) :]
    del pool[len(pool) - len(taken) :]
    return taken
