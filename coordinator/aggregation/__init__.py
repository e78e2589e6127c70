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
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import ClassVar, TypeGuard

from pydantic import Field, ValidationError

from coordinator.contributions import Contribution, Given, ModuleRound, Weights, averaged, by_direction, by_share, changes
from coordinator.portions import Portion
from coordinator.sums import Sum, Term
from protocol import errors
from protocol.plan import Choice, Plan, Sides
from protocol.slices import Factors
from protocol.strict import Strict
from protocol.views import Description

__all__ = [
    "GROUP",
    "Averages",
    "Changes",
    "Contribution",
    "Given",
    "ModuleRound",
    "Portion",
    "Sides",
    "Strategy",
    "check",
    "describe",
    "load",
    "names",
]

GROUP = "hlora.strategies"
# Numbers per module that a client of rank r is handed and sends back, R_g being the plan's cap and D = n_out + n_in.
DOWN: Mapping[Portion, str] = {
    Portion.leading: "r D",
    Portion.whole: "R_g D",
    Portion.carried: "R_g D",  # or r D, to whom cannot carry so much
    Portion.rotating: "R_g D",
    Portion.on_top: "(R_g + r) D",
}
UP: Mapping[Sides, str] = {Sides.both: "r D", Sides.b: "r n_out"}


class Strategy(Strict, ABC):
    """How contributions become W. The fields of a strategy are its options; the docstring's first line is its summary.

    A strategy is a statement of five choices that do not depend on each other: what is handed out and what of it is trained
    (`portion`), what comes back (`sides`), what is summed and with which weights (`combine`), what is kept (`keep`).
    """

    exact: ClassVar[bool]  # the sum is the weighted mean of what clients made, without cross terms
    linear: ClassVar[bool]  # the sum is linear in the clients' products, so that it could be formed under masks
    gauge_free: ClassVar[bool]  # b m, m⁻¹ a gives the same adapter as b, a
    equal_ranks: ClassVar[bool] = False  # it refuses a round of unequal ranks
    portion: ClassVar[Portion] = Portion.leading
    sides: ClassVar[Sides] = Sides.both
    stale: ClassVar[bool] = False  # contributions may have begun from different versions of the adapter, as with a buffer
    singular: ClassVar[bool] = True  # what is kept has singular form; otherwise a is the clients' own, and b has their scale in it
    equation: ClassVar[str]
    cost: ClassVar[str] = "D R² + R³"  # multiplications of one module's merge, D = n_out + n_in
    source: ClassVar[str]

    def check(self, plan: Plan) -> None:
        """Raise InvalidPlan for a plan with which the strategy could not do what it says."""

    @abstractmethod
    def combine(self, round: ModuleRound) -> Sum:
        """The sum that is the next global adapter, as far as the plan's cap holds it."""

    def keep(self, round: ModuleRound, w: Sum, best: Factors) -> Factors:
        """The factors that are kept of the sum, at most as many directions as its best approximation at the cap has."""
        return best


class Changes(Strategy, ABC):
    """Strategies that add the clients' changes to what is there: W ← W + η Σ w γ (s b a − s₀ b₀ a₀) + β (W − W before).

    The last term is server momentum in the form that needs no memory of its own (Polyak 1964): with M ← β M + Δ and
    W ← W + η M, the step before was η M. Both W are adapters as they were kept: what the cap left out of a step is no part of it.
    """

    stale = True

    step: float = Field(default=1.0, gt=0, le=10, description="η: what the mean change is multiplied by")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="β: the share of the adapter's last step that is taken again")
    reweight: float = Field(
        default=0.0, ge=0, le=1, description="ρ in p / qᵢ^ρ, the weight of direction i: at 1 it is averaged over those who train it"
    )

    def weights(self, round: ModuleRound) -> Weights:
        """For each contribution, one weight per direction: p / qᵢ^ρ."""
        return by_direction(round, self.reweight) if self.reweight else by_share(round)

    def changes(self, round: ModuleRound) -> list[Term]:
        """η Σ w γ (s b a − s₀ b₀ a₀)."""
        return changes(round, self.weights(round), self.step)

    def combine(self, round: ModuleRound) -> Sum:
        """(1 + β) W − β W before + η Σ w γ (s b a − s₀ b₀ a₀)."""
        terms = self.changes(round)
        if round.earlier is None or not self.momentum:
            return Sum(round.shape, [Term(round.adapter, 1.0), *terms])
        return Sum(round.shape, [Term(round.adapter, 1.0 + self.momentum), *terms, Term(round.earlier, -self.momentum)])


class Averages(Strategy, ABC):
    """Strategies that average b and a on their own, and keep these averages: W ← (Σ w s b)(Σ w a), lower ranks padded with zeros.

    What is handed out for rank r are the first r directions as they were averaged, in the clients' own gauge, as in the papers.
    """

    exact = False
    linear = False
    gauge_free = False
    singular = False
    cost = "D R + D r² + r³"

    def weights(self, round: ModuleRound) -> Weights:
        """For each contribution, one weight per direction."""
        return by_share(round)

    def combine(self, round: ModuleRound) -> Sum:
        """(Σ w s b)(Σ w a)."""
        return Sum(round.shape, [Term(averaged(round, self.weights(round)), 1.0)])

    def keep(self, round: ModuleRound, w: Sum, best: Factors) -> Factors:
        """Σ w s b and Σ w a themselves."""
        return w.terms[0].load(w.shape)


def names() -> list[str]:
    """Every strategy that a plan may name."""
    return sorted({*_files(), *(point.name for point in entry_points(group=GROUP))})


@functools.cache  # asked for with every job, and for every client in every look
def load(name: str) -> type[Strategy]:
    """The strategy of that name. Raises InvalidPlan for a name that is not there; nothing else is ever imported."""
    if name in _files():
        module = importlib.import_module(f"{__name__}.{name}")
        own = (found for found in vars(module).values() if _is_strategy(found) and found.__module__ == module.__name__)
        return _checked(name, next(own, None))
    for point in entry_points(group=GROUP, name=name):
        return _checked(name, point.load())
    raise errors.InvalidPlan(f"there is no strategy {name!r}; there are {', '.join(names())}")


def _checked(name: str, found: object) -> type[Strategy]:
    if not _is_strategy(found):
        raise errors.InvalidPlan(f"{name!r} is no Strategy but {found!r}")
    if found.singular and found.keep is not Strategy.keep:
        raise errors.InvalidPlan(f"strategy {name} keeps factors of its own (keep); then it must say singular = False")
    if found.portion.optional and not (found.singular and found.stale):
        raise errors.InvalidPlan(
            f"strategy {name} lets clients start from their slices where others start from the whole adapter (portion {found.portion}); "
            "that goes with sums of changes (stale = True) that keep singular form"
        )
    return found


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
    properties = {"exact": kind.exact, "linear": kind.linear, "gauge_free": kind.gauge_free, "stale": kind.stale, "source": kind.source}
    properties |= {"equal_ranks": kind.equal_ranks, "equation": kind.equation, "cost": kind.cost}
    properties |= {"portion": kind.portion, "down": DOWN[kind.portion], "up": UP[kind.sides]}
    return Description(name=name, summary=summary, options=kind.model_json_schema(), properties=properties)


def _files() -> list[str]:
    return [file.name for file in pkgutil.iter_modules(__path__) if not file.name.startswith("_")]


def _is_strategy(found: object) -> TypeGuard[type[Strategy]]:
    return isinstance(found, type) and issubclass(found, Strategy) and not inspect.isabstract(found) and found not in (Changes, Averages)
