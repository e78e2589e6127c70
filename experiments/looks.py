"""How a contestant is drawn: the same in every picture, after what it is and not after where it stands.

colour     the strategy, `reweighted` where directions that few train count for more; where one rank is for all, darker with the rank,
           and grey for federated averaging
shade      the darker the more momentum
line       solid; dashed with one rank for all; dotted with a cap, ranks or numbers of its own; with the balanced split dotted, or in short
           dashes, with the right one sparsely dotted; dash and dot for what is no federation
dots       the learning rate cools
"""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.colors import to_hex, to_rgb

from experiments.experiment import Contestant, Experiment
from experiments.plans import overlaid
from protocol.plan import Plan

COLOURS = {
    "delta": "#2f7ed8",
    "folded": "#2e9e4f",
    "rotating": "#12a5a5",
    "reweighted": "#8fae1b",
    "hlora": "#d1342f",
    "zero_pad": "#8a4fc7",
    "raflora": "#e8820c",
    "flora": "#8b5a2b",
    "fedex": "#e05aa8",
    "ffa": "#b59a00",
    "hetlora": "#5a5fd6",
    "fedavg": "#8c939e",
}
OTHER = "#4b5563"  # a strategy that is not one of these, and what is no federation
DARKEST = 16  # the rank at which the colour of one rank for all is darkest
DARKER = 0.64  # how much of a colour's light a momentum of 1 would take


@dataclass(frozen=True)
class Look:
    """A line's colour, its dashes, and what marks its measured rounds."""

    colour: str
    line: str | tuple[int, tuple[int, ...]]  # as matplotlib names dashes
    marker: str


def look(experiment: Experiment, contestant: Contestant) -> Look:
    """The contestant's look."""
    plan = overlaid(experiment.plan, contestant.plan)
    training, strategy = plan.get("training"), plan.get("strategy") or {"name": Plan.model_fields["strategy"].default.name}
    assert isinstance(strategy, dict), "checked with the plan"
    options = strategy.get("options")
    cools = isinstance(training, dict) and training.get("cooling", 1.0) != 1.0
    options = options if isinstance(options, dict) else {}
    momentum = options.get("momentum")
    dark = DARKER * momentum if isinstance(momentum, int | float) else 0.0
    name = "reweighted" if options.get("reweight") else str(strategy["name"])
    colour = COLOURS.get(name, OTHER) if contestant.kind == "federated" else OTHER
    light = (1 - dark) * (1 - min(contestant.rank or 0, DARKEST) / (1.4 * DARKEST))
    return Look(_shaded(colour, light), _dashes(contestant), "o" if cools else "")


def mixed(contestant: Contestant) -> bool:
    """Whether ranks differ in its federation."""
    return contestant.kind == "federated" and contestant.rank is None


def _dashes(contestant: Contestant) -> str | tuple[int, tuple[int, ...]]:
    adapter = contestant.plan.get("adapter")
    split = adapter.get("split", "left") if isinstance(adapter, dict) else "left"
    if contestant.kind != "federated":
        return "-."
    if contestant.rank is not None:
        return "--" if split == "left" else (0, (2, 1))
    if split == "right":
        return (0, (1, 4))
    return ":" if split == "balanced" or contestant.plan.keys() & {"cap", "wire", "uploads", "ranks"} else "-"


def _shaded(colour: str, light: float) -> str:
    return to_hex(tuple(part * light for part in to_rgb(colour)))
