"""The plan of benchmarks in which nothing is learned: a tiny module, and tensors of any size of which the coordinator takes the mean."""

from __future__ import annotations

from typing import Any

from protocol.plan import Plan


def plan(name: str, full: dict[str, list[int]], **more: Any) -> Plan:
    """A resolved plan over these fully trained tensors; `more` says cohort, rounds and what else is not the default."""
    layout = {
        "modules": {"module": [2, 2]},
        "full": full,
        "base": {"parameters": 1000, "layers": 1, "hidden": 2, "vocabulary": 10},
    }
    same = {
        "name": name,
        "model": {"id": "none", "fingerprint": f"sha256:{0:064}"},
        "task": {"kind": "causal-lm"},
        "data": "rows",
        "adapter": {"modules": "all-linear"},
        "layout": layout,
        "training": {"learning_rate": 0.001},
        "strategy": {"name": "fedavg"},
        "ranks": {"name": "fixed", "ladder": [1]},
        "evaluation": {"every": 0},
    }
    return Plan.model_validate(same | more)
