"""What a round's cut kept of the merged update and what it left out, by rank and by module: the round's certificate in words."""

from __future__ import annotations

import math

from rich.console import RenderableType

from admin import words
from admin.command import table
from protocol.views import Energy, RoundView

EVERYWHERE = "all modules"
ROUNDING = 1e-12  # of a share of energies that were summed in float64


def by_rank(found: RoundView) -> RenderableType:
    """Of every rank: what it keeps and leaves out over all modules, and in the module that loses most."""
    rows = []
    for rank, whole in sorted(found.kept_energy.items()):
        worst = min(found.energy, key=lambda module: found.energy[module].kept.get(rank, 1.0))
        rows.append((str(rank), words.share(whole), _left_out(whole), _left_out(found.energy[worst].kept.get(rank)), worst))
    columns = ("rank", "kept energy", "left out", "most", "in module")
    return table(*columns, rows=rows, right=columns[:-1])


def by_module(found: RoundView) -> RenderableType:
    """Of every module: its size, the directions that entered, what each rank leaves out, and how far that may be from the least."""
    ranks = sorted(found.kept_energy)
    columns = ("module", "‖W‖", "directions", *(f"left out at {rank}" for rank in ranks), "short of the best")
    energies = {EVERYWHERE: _together(found), **found.energy}
    return table(*columns, rows=[_line(module, energy, ranks) for module, energy in energies.items()], right=columns[1:])


def _together(found: RoundView) -> Energy:
    modules = found.energy.values()
    total = math.fsum(energy.total for energy in modules)
    short = math.fsum(energy.short * energy.total for energy in modules) / total if total > 0 else 0.0
    return Energy(total=total, kept=found.kept_energy, stacked_rank=max(energy.stacked_rank for energy in modules), short=short)


def _line(module: str, energy: Energy, ranks: list[int]) -> tuple[str, ...]:
    short = f"by at most {words.share(energy.short)}" if energy.short > ROUNDING else "is the best"
    lost = [_left_out(energy.kept.get(rank)) for rank in ranks]
    return (module, f"{math.sqrt(energy.total):.4g}", str(energy.stacked_rank), *lost, short)


def _left_out(kept: float | None) -> str:
    return words.share(None if kept is None else 1.0 - kept)
