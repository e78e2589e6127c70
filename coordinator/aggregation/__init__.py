"""How contributions become the next global adapter. The folder is the registry: a file is a strategy.

A plan names a strategy by its file's name. Packages from outside add theirs through the entry-point group
`hlora.strategies`; see docs/writing-a-strategy.md.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from importlib.metadata import entry_points
from typing import ClassVar, TypeGuard

from pydantic import Field, ValidationError

from coordinator.contributions import Contribution, Given, ModuleRound, Weights, by_share, changes
from coordinator.portions import Portion
from coordinator.sums import Sum, Term
from protocol import errors
from protocol.plan import Choice, Sides
from protocol.strict import Strict
from protocol.views import Description

__all__ = ["GROUP", "Changes", "Contribution", "Given", "ModuleRound", "Portion", "Strategy", "check", "describe", "load", "names"]

GROUP = "hlora.strategies"


class Strategy(Strict, ABC):
    """How contributions become W. The fields of a strategy are its options; the docstring's first line is its summary."""

    exact: ClassVar[bool]  # the sum is the weighted mean of what clients made, without cross terms
    linear: ClassVar[bool]  # the sum is linear in the clients' products, so that it could be formed under masks
    gauge_free: ClassVar[bool]  # b m, m⁻¹ a gives the same sum as b, a
    equal_ranks: ClassVar[bool] = False  # it refuses a round of unequal ranks
    portion: ClassVar[Portion] = Portion.leading  # what is handed out, and what of it is trained
    sides: ClassVar[Sides] = Sides.both  # what of the trained directions is trained, and comes back
    equation: ClassVar[str]
    cost: ClassVar[str] = "D R² + R³"  # multiplications of one module's merge, D = n_out + n_in
    source: ClassVar[str]

    @abstractmethod
    def combine(self, round: ModuleRound) -> Sum:
        """The sum of which the next global adapter is the best approximation of the plan's rank."""


class Changes(Strategy, ABC):
    """Strategies that add the clients' changes to what is there: W ← W + η Σ w γ (s b a − s₀ b₀ a₀) + β (W − W before).

    The last term is server momentum in the form that needs no memory of its own (Polyak 1964): with M ← β M + Δ and
    W ← W + η M, the step before was η M.
    """

    step: float = Field(default=1.0, gt=0, le=10, description="η: what the mean change is multiplied by")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="β: the share of the adapter's last step that is taken again")

    def weights(self, round: ModuleRound) -> Weights:
        """For each contribution, one weight per direction."""
        return by_share(round)

    def combine(self, round: ModuleRound) -> Sum:
        """(1 + β) W − β W before + η Σ w γ (s b a − s₀ b₀ a₀)."""
        terms = changes(round, self.weights(round), self.step)
        if round.earlier is None or not self.momentum:
            return Sum(round.shape, [Term(round.adapter, 1.0), *terms])
        return Sum(round.shape, [Term(round.adapter, 1.0 + self.momentum), *terms, Term(round.earlier, -self.momentum)])


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
    properties |= {"equal_ranks": kind.equal_ranks, "equation": kind.equation, "cost": kind.cost}
    return Description(name=name, summary=summary, options=kind.model_json_schema(), properties=properties)


@functools.cache  # asked for with every job
def _files() -> list[str]:
    return [file.name for file in pkgutil.iter_modules(__path__)]


def _is_strategy(found: object) -> TypeGuard[type[Strategy]]:
    return isinstance(found, type) and issubclass(found, Strategy) and not inspect.isabstract(found) and found is not Changes
