"""The pictures: each contestant's curve over rounds, and the energy of its update beyond the smallest rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.experiment import Experiment
from experiments.intervals import interval
from experiments.records import ALL, Finished, RoundRecord
from experiments.summary import Line, better, lines

INK, GREY, FAINT = "#1c2330", "#6b7280", "#e5e7eb"
COLOURS = ("#0b6e4f", "#b45309", "#3f87bd", "#8c2f63", "#6a8d1f", "#c2410c", "#5b4bb7", "#0e7490", "#a16207", "#be123c")
BOUNDS = ("#9ca3af", "#6b7280", "#374151", "#111827")  # one rank for all, and other yardsticks, from light to dark
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


def draw(experiment: Experiment, runs: Sequence[Finished], folder: Path, name: str = "curves") -> list[Path]:
    """Write the picture as PNG and SVG; gives the files. The same results give the same SVG."""
    found = lines(experiment, runs)
    looks = _looks(experiment, found)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 5.0), dpi=140, layout="constrained")
        curves, energy = figure.subplots(1, 2, width_ratios=[1.7, 1])
        _curves(curves, experiment, found, looks)
        _energy(energy, experiment, found, looks)
        figure.legend(*curves.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
        files = [folder / f"{name}.png", folder / f"{name}.svg"]
        figure.savefig(files[0], facecolor="white")
        figure.savefig(files[1], facecolor="white", metadata={"Date": None})
    return files


def _looks(experiment: Experiment, found: Sequence[Line]) -> Mapping[str, dict[str, str]]:
    """Contestants of unequal ranks in colours, all others in grey and dashed."""
    mixed = [line.name for line in found if _mixed(experiment, line.name)]
    others = [line.name for line in found if line.name not in mixed]
    coloured = {name: {"color": COLOURS[n % len(COLOURS)], "linestyle": "-" if n < len(COLOURS) else ":"} for n, name in enumerate(mixed)}
    return coloured | {name: {"color": BOUNDS[n % len(BOUNDS)], "linestyle": "--"} for n, name in enumerate(others)}


def _mixed(experiment: Experiment, name: str) -> bool:
    contestant = experiment.contestant(name)
    return contestant.kind == "federated" and contestant.rank is None


def _curves(axes: Axes, experiment: Experiment, found: Sequence[Line], looks: Mapping[str, dict[str, str]]) -> None:
    metric = experiment.measures.metric
    axes.set_title(f"Held-out {metric} of the global adapter")
    ordered = sorted(found, key=lambda line: -better(experiment) * interval(list(line.final().values())).mean)

    def value(line: Line) -> Value:
        return lambda round: round.measures.get(next(iter(line.runs.values())).header.headline, {}).get(ALL, {}).get(metric)

    if all(len(run.values) <= 2 for line in found for run in line.runs.values()):  # a beginning and an end are no curve
        axes.set_title(f"Held-out {metric} after the last round")
        _ends(axes, ordered, looks)
        return
    for line in ordered:
        _plot(axes, line, value(line), looks[line.name])
    firsts = [line.curve(run)[0][1] for line in found for run in line.runs.values()]
    later = [y for line in found for run in line.runs.values() for x, y in line.curve(run) if x > run.rounds[-1].round // 10] or firsts
    low, high = min(later), max(later)
    axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) or None)  # the first rounds may be far off
    _finished(axes)


def _ends(axes: Axes, found: Sequence[Line], looks: Mapping[str, dict[str, str]]) -> None:
    """The last value of each, with its interval."""
    for place, line in enumerate(found):
        end = interval(list(line.final().values()))
        axes.errorbar(place, end.mean, yerr=end.half, fmt="o", capsize=5, color=looks[line.name]["color"], label=line.name)
    axes.set_xticks([])
    axes.set_xlim(-0.5, len(found) - 0.5)
    _ruled(axes)


def _energy(axes: Axes, experiment: Experiment, found: Sequence[Line], looks: Mapping[str, dict[str, str]]) -> None:
    smallest = experiment.ranks[0]
    axes.set_title(f"Energy beyond rank {smallest}")
    for line in found:
        if _mixed(experiment, line.name):
            _plot(axes, line, lambda round: 1 - round.kept[smallest] if round.round and smallest in round.kept else None, looks[line.name])
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    _finished(axes)


def _plot(axes: Axes, line: Line, value: Value, look: dict[str, str]) -> None:
    """The mean over seeds, with its interval as a band."""
    rows = [{round.round: found for round in run.rounds if (found := value(round)) is not None} for run in line.runs.values()]
    rounds = sorted(set.intersection(*(set(row) for row in rows)))
    means = [interval([row[n] for row in rows]) for n in rounds]
    axes.plot(rounds, [x.mean for x in means], color=look["color"], linestyle=look["linestyle"], linewidth=1.8, label=line.name)
    if len(rows) > 1:
        low, high = [x.mean - (x.half or 0) for x in means], [x.mean + (x.half or 0) for x in means]
        axes.fill_between(rounds, low, high, color=look["color"], alpha=0.12, linewidth=0)


def _finished(axes: Axes) -> None:
    axes.set_xlabel("round")
    axes.set_xlim(left=0)
    _ruled(axes)


def _ruled(axes: Axes) -> None:
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.spines["left"].set_visible(False)
    axes.set_axisbelow(True)
