"""Means over seeds with their 95 % intervals, and differences between contestants, seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

K = TypeVar("K")

# Student's t: the 97.5 % quantile for 1 to 30 degrees of freedom.
QUANTILES = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)


@dataclass(frozen=True)
class Interval:
    """A mean, how far its 95 % interval reaches to each side (nothing is known from one value), and of how many values."""

    mean: float
    half: float | None
    count: int

    @property
    def apart(self) -> bool:
        """Whether zero lies outside: a difference that is one."""
        return self.half is not None and abs(self.mean) > self.half

    @property
    def chance(self) -> float:
        """How probable a mean so far from zero is where nothing differs; 1 where nothing is known."""
        if not self.half:
            return 1.0 if self.half is None or self.mean == 0 else 0.0
        return beyond(abs(self.mean) / self.half * quantile(self.count - 1), self.count - 1)


def beyond(t: float, freedom: int) -> float:
    """The probability that Student's t lies farther from zero than that, to either side (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle, odd = math.atan2(t, math.sqrt(freedom)), freedom % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for n in range(2 + odd, freedom + 1, 2):  # cos θ + 2/3 cos³ θ + …, or 1 + 1/2 cos² θ + …; of one degree of freedom nothing
        total += term
        term *= (n - 1) / n * math.cos(angle) ** 2
    within = math.sin(angle) * total
    return 1 - (2 / math.pi * (angle + within) if odd else within)


def standing(found: Mapping[K, Interval], level: float = 0.05) -> set[K]:
    """Which differences stand by Holm's procedure: of so many, one would be among them by chance with that probability at most."""
    stand: set[K] = set()
    for n, pair in enumerate(sorted(found, key=lambda pair: found[pair].chance)):
        if found[pair].chance > level / (len(found) - n):
            break
        stand.add(pair)
    return stand


def quantile(freedom: int) -> float:
    """Student's t for a two-sided 95 % interval.

    Beyond the table by the normal quantile's first two corrections, right to four digits (Abramowitz and Stegun, 26.7.5).
    """
    if freedom <= len(QUANTILES):
        return QUANTILES[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def interval(values: Sequence[float]) -> Interval:
    """The mean ± t s / √n of at least one value."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, None, 1)
    return Interval(mean, quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values)), len(values))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[int, float]:
    """Ours − theirs, over the seeds that both have."""
    return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """The mean of these differences with their interval; none without a seed that both have."""
    found = paired(ours, theirs)
    return interval(list(found.values())) if found else None
