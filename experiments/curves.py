"""The pictures: each contestant's curve over rounds, and the energy of its update beyond the smallest rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.experiment import Experiment
from experiments.intervals import interval
from experiments.looks import Look, look, mixed
from experiments.records import ALL, Finished, RoundRecord
from experiments.summary import Line, lines

INK, GREY, FAINT = "#1c2330", "#6b7280", "#e5e7eb"
LEAST, PER_LABEL, AROUND = 4.6, 0.19, 1.1  # inches: the lowest picture, a label at a line's end, what is above and below the axes
FEW = 8  # measured rounds, up to which each is marked: between them nothing was seen
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": GREY,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "svg.hashsalt": "hlora",
}
Value = Callable[[RoundRecord], float | None]
Looks = Mapping[str, Look]


def draw(experiment: Experiment, runs: Sequence[Finished], png: Path, svg: Path) -> None:
    """Write the picture in both forms. The same results give the same SVG."""
    found = lines(experiment, runs)
    looks = {line.name: look(experiment, experiment.contestant(line.name)) for line in found}
    with matplotlib.rc_context(STYLE):
        height = max(LEAST, PER_LABEL * len(found) + 2 * AROUND)
        gap = PER_LABEL / (height - AROUND)  # as a share of the axes
        figure = Figure(figsize=(13.5, height), dpi=140, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
        if all(len(run.values) <= 2 for line in found for run in line.runs.values()):  # a beginning and an end are no curve
            _ends(left, experiment, found, looks)
        else:
            _curves(left, experiment, found, looks, gap)
        _energy(right, experiment, found, looks, gap)
        figure.savefig(png, facecolor="white")
        figure.savefig(svg, facecolor="white", metadata={"Date": None})


def _curves(axes: Axes, experiment: Experiment, found: Sequence[Line], looks: Looks, gap: float) -> None:
    metric = experiment.measures.metric

    def value(line: Line) -> Value:
        return lambda round: round.measures.get(next(iter(line.runs.values())).header.headline, {}).get(ALL, {}).get(metric)

    axes.set_title(f"Held-out {metric} of the global adapter")
    ends = _plotted(axes, [(line, value(line)) for line in found], looks)
    seen = [line for line in found if line.kind != "local"] or found  # who is alone may end far off, and would hide all others' differences
    firsts = [line.curve(run)[0][1] for line in seen for run in line.runs.values()]
    later = [y for line in seen for run in line.runs.values() for x, y in line.curve(run) if x > run.rounds[-1].round // 10] or firsts
    later += _guessed(experiment)
    low, high = min(later), max(later)
    axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) or None)  # the first rounds may be far off
    for guess in _guessed(experiment):
        axes.axhline(guess, color=GREY, linestyle="--", linewidth=1)
        axes.text(
            0.99, guess, "the majority's guess ", color=GREY, fontsize=8.5, ha="right", va="bottom", transform=axes.get_yaxis_transform()
        )
    _finished(axes)
    _labelled(axes, ends, looks, gap)


def _ends(axes: Axes, experiment: Experiment, found: Sequence[Line], looks: Looks) -> None:
    """The last value of each, with its interval."""
    axes.set_title(f"Held-out {experiment.measures.metric} after the last round")
    for place, line in enumerate(found):
        end = interval(list(line.final().values()))
        axes.errorbar(end.mean, place, xerr=end.half, fmt="o", capsize=5, color=looks[line.name].colour)
    axes.set_yticks(range(len(found)), [line.name for line in found], color=INK)
    axes.set_ylim(len(found) - 0.5, -0.5)
    for guess in _guessed(experiment):
        axes.axvline(guess, color=GREY, linestyle="--", linewidth=1)
        axes.text(guess, 0.01, " the majority's guess", color=GREY, fontsize=8.5, va="bottom", transform=axes.get_xaxis_transform())
    axes.set_xlabel(experiment.measures.metric)
    _ruled(axes, "x")


def _guessed(experiment: Experiment) -> list[float]:
    """How often the commonest label is right, where that is what is drawn."""
    return [experiment.majority] if experiment.majority is not None and experiment.measures.metric == "accuracy" else []


def _energy(axes: Axes, experiment: Experiment, found: Sequence[Line], looks: Looks, gap: float) -> None:
    smallest = experiment.ranks[0]
    axes.set_title(f"Energy beyond rank {smallest}")

    def value(round: RoundRecord) -> float | None:
        return 1 - round.kept[smallest] if round.round and smallest in round.kept else None

    ends = _plotted(axes, [(line, value) for line in found if mixed(experiment.contestant(line.name))], looks, (0.0, 1.0))
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_ylim(bottom=0)
    _finished(axes)
    _labelled(axes, ends, looks, gap)


def _plotted(axes: Axes, wanted: Iterable[tuple[Line, Value]], looks: Looks, bounds: tuple[float, float] | None = None) -> dict[str, float]:
    """Draw these lines; gives where each ends that has any values."""
    ends = {line.name: _plot(axes, line, value, looks[line.name], bounds) for line, value in wanted}
    return {name: end for name, end in ends.items() if end is not None}


def _plot(axes: Axes, line: Line, value: Value, look: Look, bounds: tuple[float, float] | None) -> float | None:
    """The mean over seeds, with its interval as a band, as far as there are such values; gives where it ends."""
    rows = [{round.round: found for round in run.rounds if (found := value(round)) is not None} for run in line.runs.values()]
    rounds = sorted(set.intersection(*(set(row) for row in rows)))
    means = [interval([row[n] for row in rows]) for n in rounds]
    marker, size = (look.marker, 3.5) if look.marker or len(rounds) > FEW else (".", 7.0)
    axes.plot(rounds, [x.mean for x in means], linestyle=look.line, color=look.colour, marker=marker, linewidth=1.8, markersize=size)
    if len(rows) > 2:  # of two seeds it would cover the picture, and say nothing
        least, most = bounds or (float("-inf"), float("inf"))
        low, high = [max(least, x.mean - (x.half or 0)) for x in means], [min(most, x.mean + (x.half or 0)) for x in means]
        axes.fill_between(rounds, low, high, color=look.colour, alpha=0.08, linewidth=0)
    return means[-1].mean if means else None


def _labelled(axes: Axes, ends: Mapping[str, float], looks: Looks, gap: float) -> None:
    """Each line's name beside its end, moved up or down as far as the others' names need."""
    ordered = sorted(ends, key=ends.__getitem__)
    heights = [float(axes.transLimits.transform((0, ends[name]))[1]) for name in ordered]
    wanted = [min(max(height, 0.0), 1.0) for height in heights]
    for name, height, at, place in zip(ordered, heights, wanted, spread(wanted, gap), strict=True):
        beyond = f", off at {ends[name]:.2f}" if abs(height - at) > gap else ""
        axes.plot([1.0, 1.025], [at, place], color=looks[name].colour, linewidth=0.8, transform=axes.transAxes, clip_on=False)
        axes.text(1.03, place, name + beyond, color=looks[name].colour, fontsize=9, va="center", transform=axes.transAxes)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places between 0 and 1 as near as can be to those that are wanted, which rise, and nowhere nearer to each other than the gap.

    With n gaps taken off the nth, places need only not fall: neighbours that would are put together at their mean.
    """
    groups: list[tuple[float, int]] = []
    for n, place in enumerate(wanted):
        groups.append((place - n * gap, 1))
        while len(groups) > 1 and groups[-2][0] > groups[-1][0]:
            (above, many), (below, more) = groups[-2:]
            groups[-2:] = [((above * many + below * more) / (many + more), many + more)]
    most = max(0.0, 1 - (len(wanted) - 1) * gap)
    level = [min(max(mean, 0.0), most) for mean, count in groups for _ in range(count)]
    return [place + n * gap for n, place in enumerate(level)]


def _finished(axes: Axes) -> None:
    axes.set_xlabel("round")
    axes.set_xlim(0, max(axes.dataLim.x1, 1))  # to the last round, where names begin
    _ruled(axes, "y")


def _ruled(axes: Axes, across: Literal["x", "y"]) -> None:
    axes.grid(axis=across, color=FAINT, linewidth=0.8)
    axes.spines["left"].set_visible(False)
    axes.set_axisbelow(True)
