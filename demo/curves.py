"""The picture: accuracy by round, each department's rank by round, and how much of the update each rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from demo.report import Report, ranks
from protocol.views import RankView

INK, GREY, FAINT = "#1c2330", "#6b7280", "#e5e7eb"
CURVE, BASE = "#0b6e4f", "#b45309"
RUNGS = ("#d5e5f2", "#92bfdf", "#3f87bd", "#0f4c81")  # the ladder's colours, from the smallest rank to the largest
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
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


def draw(report: Report, file: Path) -> None:
    """Write the picture as PNG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 5.2), dpi=160, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
        panels: dict[str, Axes] = figure.subplot_mosaic(
            [["accuracy", "ranks"], ["accuracy", "energy"]], width_ratios=[1.25, 1], height_ratios=[1.5, 1]
        )
        _accuracy(panels["accuracy"], report)
        _ranks(panels["ranks"], report)
        _energy(panels["energy"], report)
        figure.savefig(file, facecolor="white")


def _accuracy(axes: Axes, report: Report) -> None:
    values, last = report.accuracies, len(report.accuracies) - 1
    axes.set_title("Held-out accuracy, measured by the departments")
    axes.axhline(report.majority, color=BASE, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.annotate(
        f"best single guess {report.majority:.1%}", (last, report.majority), (0, 5), textcoords="offset points", ha="right", color=BASE
    )
    axes.plot(values, color=CURVE, linewidth=2.4, marker="o", markersize=6, markeredgecolor="white", markeredgewidth=1.2, clip_on=False)
    axes.annotate(f"untrained {values[0]:.1%}", (0, values[0]), (8, -14), textcoords="offset points", color=GREY)
    axes.annotate(f"{values[-1]:.1%}", (last, values[-1]), (0, 10), textcoords="offset points", ha="center", color=CURVE, fontweight="bold")
    axes.set_xlabel("round")
    axes.set_xticks(range(last + 1))
    axes.set_xlim(-0.15, last + 0.15)
    axes.set_ylim(0, min(1.0, max(*values, report.majority) * 1.15 + 0.02))
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.spines["left"].set_visible(False)
    axes.set_axisbelow(True)


def _ranks(axes: Axes, report: Report) -> None:
    """A row for each department, a square for each round, shaded by rank."""
    axes.set_title("Rank given to each department, by round")
    ladder: Sequence[int] = report.outcome.run.plan.ranks.ladder
    names = [department.name for department in report.departments]
    for column, found in enumerate(report.outcome.rounds[1:]):
        for name, view in ranks(found).items():
            row, rung = names.index(name), ladder.index(view.rank)
            shade = RUNGS[round(rung * (len(RUNGS) - 1) / max(1, len(ladder) - 1))]
            axes.barh(row, 0.94, left=column + 0.03, height=0.86, color=shade)
            ink = "white" if shade in RUNGS[2:] else INK
            axes.text(column + 0.5, row, str(view.rank), ha="center", va="center", fontsize=8.5, color=ink)
    width = max(1, len(report.outcome.rounds) - 1)
    for name, view in ranks(report.outcome.rounds[-1]).items():
        words, row = ", ".join(_binding(view, ladder)), names.index(name)
        axes.annotate(words, (width, row), (6, 0), textcoords="offset points", va="center", color=GREY, fontsize=9)
    axes.set_yticks(range(len(names)), [f"{d.name}  {len(d.train):>4,}" for d in report.departments])
    axes.set_xticks([n + 0.5 for n in range(len(report.outcome.rounds) - 1)], [str(found.number) for found in report.outcome.rounds[1:]])
    axes.set_xlim(0, width)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.spines[:].set_visible(False)
    for words, side, offset, align in (("rows", 0, -6, "right"), ("limited by", 1, 6, "left")):
        axes.annotate(
            words, (side, 1), (offset, 3), xycoords="axes fraction", textcoords="offset points", ha=align, color=GREY, fontsize=8.5
        )


def _binding(view: RankView, ladder: Sequence[int]) -> list[str]:
    """What keeps a rank from being larger. The others are asked within what the owner allows, so the owner goes first."""
    if view.limits.get("owner") == view.rank:
        return ["owner"]
    return [limit for limit, rank in view.limits.items() if rank == view.rank < ladder[-1]]


def _energy(axes: Axes, report: Report) -> None:
    axes.set_title("Share of the global update that a rank holds")
    rounds = [found for found in report.outcome.rounds[1:] if found.kept_energy]
    numbers = [found.number for found in rounds]
    ladder = report.outcome.run.plan.ranks.ladder
    for rung, rank in enumerate(ladder):
        shade = RUNGS[round(rung * (len(RUNGS) - 1) / max(1, len(ladder) - 1))]
        values = [found.kept_energy.get(rank, float("nan")) for found in rounds]
        axes.plot(numbers, values, color=shade, linewidth=2.2, marker="o", markersize=3.5, clip_on=False)
        if values:
            axes.annotate(str(rank), (numbers[-1], values[-1]), (8, 0), textcoords="offset points", va="center", fontsize=9, color=GREY)
    axes.set_xlabel("round")
    axes.set_xticks(numbers)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.spines["left"].set_visible(False)
    axes.set_axisbelow(True)
