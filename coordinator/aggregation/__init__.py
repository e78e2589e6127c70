"""How contributions become the next global adapter. The folder is the registry: a file is a strategy.

A plan names a strategy by its file's name. Packages from outside add theirs through the entry-point group
`hlora.strategies`; see docs/writing-a-strategy.md.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import ClassVar, TypeGuard

from pydantic import ValidationError

from coordinator.sums import Stored, Sum
from protocol import errors
from protocol.messages import Description
from protocol.plan import Choice, Strict
from protocol.slices import Factors

GROUP = "hlora.strategies"


@dataclass(frozen=True)
class Given:
    """A slice as it was handed out; equal digests are equal slices."""

    digest: str
    factors: Factors | Stored
    scale: float


@dataclass(frozen=True)
class Contribution:
    """One accepted slice's factors of one module, and the slice that they started from.

    What a client claims is its change, scale · b @ a − given.scale · given.b @ given.a. Where that was larger than the
    plan allows, only the share `shrink` of it counts.
    """

    factors: Factors | Stored
    scale: float
    weight: float  # p ≥ 0; those of a round sum to one
    shrink: float  # γ in (0, 1]
    given: Given


@dataclass(frozen=True)
class ModuleRound:
    """All that a strategy may know of one module in one round, in an order that depends on contents alone."""

    shape: tuple[int, int]  # (n_out, n_in)
    round: int
    adapter: Factors | Stored  # W before the round: scale 1
    contributions: tuple[Contribution, ...]


class Strategy(Strict, ABC):
    """How contributions become W. The fields of a strategy are its options; the docstring's first line is its summary."""

    exact: ClassVar[bool]  # the sum is the weighted mean of what clients made, without cross terms
    linear: ClassVar[bool]  # the sum is linear in the clients' products, so that it could be formed under masks
    gauge_free: ClassVar[bool]  # b m, m⁻¹ a gives the same sum as b, a
    source: ClassVar[str]

    @abstractmethod
    def combine(self, round: ModuleRound) -> Sum:
        """The sum of which the next global adapter is the best approximation of the plan's rank."""


def names() -> list[str]:
    """Every strategy that a plan may name."""
    return sorted({*_files(), *(point.name for point in entry_points(group=GROUP))})


def load(name: str) -> type[Strategy]:
    """The strategy of that name. Raises InvalidPlan for a name that is not there; nothing else is ever imported."""
    if name in _files():
        module = importlib.import_module(f"{__name__}.{name}")
        return next(found for found in vars(module).values() if _is_strategy(found) and found.__module__ == module.__name__)
    for point in entry_points(group=GROUP, name=name):
        if _is_strategy(found := point.load()):
            return found
        raise errors.InvalidPlan(f"the entry point {name!r} of {GROUP} is no Strategy but {found!r}")
    raise errors.InvalidPlan(f"there is no strategy {name!r}; there are {', '.join(names())}")


def check(choice: Choice) -> Strategy:
    """The strategy that a plan chose, with its options. Raises InvalidPlan for an unknown name, option or value."""
    kind = load(choice.name)
    try:
        return kind.model_validate(dict(choice.options))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        allowed = ", ".join(kind.model_fields) or "none"
        raise errors.InvalidPlan(f"strategy {choice.name}, option {where}: {first['msg']}; its options are: {allowed}") from None


def describe() -> list[Description]:
    """What every strategy says of itself."""
    return [_describe(name, load(name)) for name in names()]


def _describe(name: str, kind: type[Strategy]) -> Description:
    summary = (kind.__doc__ or name).strip().splitlines()[0]
    properties = {"exact": kind.exact, "linear": kind.linear, "gauge_free": kind.gauge_free, "source": kind.source}
    return Description(name=name, summary=summary, options=kind.model_json_schema(), properties=properties)


def _files() -> list[str]:
    return [file.name for file in pkgutil.iter_modules(__path__)]


def _is_strategy(found: object) -> TypeGuard[type[Strategy]]:
    return isinstance(found, type) and issubclass(found, Strategy) and found is not Strategy
