"""The federation that is to be disturbed: its plan, its machines, and what it comes to when nothing happens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.victims import quick
from protocol.plan import Plan
from protocol.views import RoundView
from simulation.device import fleet
from simulation.federation import federation

Published = tuple[str, ...]  # the digests of a round's adapter and of its slices

TIERS = ("large", "small", "small")
MODULES = {f"layer.{number}.{name}": (768, 768) for number in range(3) for name in ("query", "value")}  # a slice of rank 8: 295 kB


def plan(agents: int, rounds: int) -> Plan:
    """Every machine takes part in every round, at a rank of its own; so the bytes do not depend on who is slow."""
    return Plan.model_validate(
        {
            "name": "chaos",
            "model": {"id": "none", "fingerprint": f"sha256:{0:064}"},
            "task": {"kind": "causal-lm"},
            "data": "rows",
            "adapter": {"modules": ["query", "value"]},
            "layout": {"modules": MODULES, "base": {"parameters": 10**6, "layers": 3, "hidden": 768, "vocabulary": 1000}},
            "training": {"learning_rate": 0.001},
            "strategy": {"name": "delta"},
            "ranks": {"name": "labels", "ladder": [4, 8], "options": {"label": "tier", "table": {"small": 4, "large": 8}, "default": 4}},
            "cohort": {"target": agents, "quorum": agents},
            "times": {"lease": 3, "no_progress": 30, "job": 600, "round": 1200},
            "evaluation": {"every": 3},
            "rounds": rounds,
        }
    )


@dataclass(frozen=True)
class Home:
    """An agent's home folder, and the labels of its machine."""

    folder: Path
    labels: dict[str, str]

    @property
    def name(self) -> str:
        return self.folder.name


def homes(folder: Path, agents: int) -> list[Home]:
    """New homes, each with rows of its own."""
    found = []
    for number in range(agents):
        home = Home(folder / f"agent-{number}", {"tier": TIERS[number % len(TIERS)]})
        home.folder.mkdir(parents=True)
        rows = [json.dumps({"text": f"row {row} of {home.name}"}) for row in range(20 + number)]
        (home.folder / "rows.jsonl").write_text("\n".join(rows))
        (home.folder / "datasets.toml").write_text('[rows]\nformat = "jsonl"\npath = "rows.jsonl"\nheld_out = 0.25\n')
        (home.folder / "machine.toml").write_text(f'labels = {{ tier = "{home.labels["tier"]}" }}\n')
        found.append(home)
    return found


def published(round: RoundView) -> Published:
    """The names of all bytes that a round published."""
    adapter = "" if round.adapter is None else round.adapter.digest
    return adapter, *(round.slices[rank].digest for rank in sorted(round.slices))


async def undisturbed(plan: Plan, machines: Path, folder: Path) -> list[Published]:
    """What each round of the plan publishes on these machines when nothing goes wrong, simulated in one process."""
    async with federation(fleet(machines), folder, train=quick) as found:
        async for run in found.run(plan):
            last = run
        return [published(round) for round in await found.rounds(last.id)]
