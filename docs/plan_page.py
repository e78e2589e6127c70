"""The page of everything that a plan may say, from the classes that read plans."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from enum import EnumType
from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

import protocol.course
import protocol.plan
from protocol.plan import Plan

TABLES: Mapping[str, type[BaseModel]] = {
    "[model]": protocol.plan.Model,
    '[task], with kind = "sequence-classification"': protocol.plan.SequenceClassification,
    '[task], with kind = "causal-lm"': protocol.plan.CausalLM,
    "[adapter]": protocol.plan.Adapter,
    "[training]": protocol.course.Training,
    f"[strategy], without it {Plan.model_fields['strategy'].default.name}": protocol.plan.Choice,
    "[ranks]": protocol.plan.Ranks,
    "[cohort]": protocol.course.Cohort,
    "[times]": protocol.course.Times,
    "[evaluation]": protocol.course.Evaluation,
    "[norm], optional": protocol.course.NormBound,
    "[buffer], optional": protocol.course.Buffer,
}


def plan(written: str) -> str:
    """The page, under the words that say what wrote it."""
    beside = {name for name, info in Plan.model_fields.items() if not _is_table(info)}
    return f"""{written}
# The plan

A plan says what a run shall do. It is written as TOML, checked by `python -m admin plans check PLAN`, and carried out by
`python -m admin runs create PLAN`; over REST it is the same as JSON. What is not said has the default, and what is unknown is refused.
`fingerprint` and `layout` are filled in when the plan is [resolved](operating.md#running) against its base model.

```toml
{EXAMPLE}```

Strategies and their options stand in [strategies](strategies.md), rank policies and theirs in [ranks](ranks.md); what the words mean, in
[concepts](concepts.md) and the [glossary](glossary.md).

## At the top, before any table

{_settings(Plan, beside)}
{"".join(f"## {title}{chr(10)}{chr(10)}{_settings(kind)}{chr(10)}" for title, kind in TABLES.items()).rstrip()}
"""


EXAMPLE = """\
name = "reviews"
data = "reviews"                    # the alias of the data set on every device
rounds = 20

[model]
id = "sentence-transformers/all-MiniLM-L6-v2"

[task]
kind = "sequence-classification"
labels = ["bad", "good"]

[adapter]
modules = ["query", "value"]

[training]
learning_rate = 1e-3
cooling = 0.1                       # in the last round a tenth of that

[strategy]
name = "folded"                     # the default; which suits what: see strategies
options = { momentum = 0.5 }

[ranks]
ladder = [2, 4, 8, 16]

[cohort]
target = 10
quorum = 6
"""


def _is_table(info: FieldInfo) -> bool:
    kinds = (info.annotation, *get_args(info.annotation))
    return any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds)


def _settings(model: type[BaseModel], names: Collection[str] | None = None) -> str:
    rows = "\n".join(
        f"| `{name}` | {_required(info)} | {_meaning(info)} |"
        for name, info in model.model_fields.items()
        if (name != "kind" if names is None else name in names)
    )
    return f"| key | default | meaning |\n|---|---|---|\n{rows}\n"


def _required(info: FieldInfo) -> str:
    return "**needed**" if info.is_required() else "–" if info.default in (None, {}) else f"`{json.dumps(info.default)}`"


def _meaning(info: FieldInfo) -> str:
    """The description, and the words that may stand there, where they are a few."""
    kind = info.annotation
    words = [str(word) for word in kind] if isinstance(kind, EnumType) else [word for word in get_args(kind) if isinstance(word, str)]
    missing = [word for word in words if word not in (info.description or "")]
    return (info.description or "") + (f" ({', '.join(words)})" if missing else "")
