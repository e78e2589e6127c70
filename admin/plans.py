"""Plan files: read, resolved against their base model, and looked at before they run."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Group, RenderableType

from admin import words
from admin.command import AsJson, answer, facts, group, table
from protocol import errors, feasible
from protocol.contents import body_length
from protocol.plan import Head, Plan
from protocol.strict import mistakes

UNCHECKED = " (not checked here)"  # which names there are, and their options, is the coordinator's to say when the run is made

app = group("Look at plans before they run.")
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="a plan as TOML, or as JSON if its name ends with .json")]


def read(path: Path) -> Plan:
    """The plan in a file. Raises InvalidPlan saying which line or field is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        return Plan.model_validate(data)
    except (OSError, UnicodeDecodeError) as error:
        raise errors.InvalidPlan(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise errors.InvalidPlan(f"{path} is no {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from None
    except ValidationError as error:
        wrong = list(mistakes(error, Plan))
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise errors.InvalidPlan(f"{path}: {'; '.join(wrong[:5])}{more}") from None


def resolved(plan: Plan) -> Plan:
    """The plan with its layout and its base model's fingerprint, which are looked up unless they are there.

    Raises InvalidPlan, also where it could never be carried out, or ModelRefusal, or InvalidRequest where the packages for it are not
    installed.
    """
    found = _looked_up(plan)
    feasible.check(found)
    return found


def _looked_up(plan: Plan) -> Plan:
    if plan.layout is not None and plan.model.fingerprint is not None:
        return plan
    try:
        from modelling.layout import resolve
    except ModuleNotFoundError as error:
        raise errors.InvalidRequest(
            f"this plan must be resolved against its base model, and {error.name} is not installed here; install HLoRA's extra `agent`, "
            "or resolve it elsewhere by `python -m admin plans resolve PLAN --out plan.json`"
        ) from None
    return resolve(plan)


@app.command()
def check(plan: PlanFile, as_json: AsJson = False) -> None:
    """Check a plan against its base model and say what it amounts to. Needs no coordinator."""
    found = resolved(read(plan))
    answer(found, as_json, Group(_summary(found), "", _costs(found)))


@app.command()
def resolve(
    plan: PlanFile,
    out: Annotated[Path | None, typer.Option(help="file to write; by default the standard output")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the plan as JSON with its layout and its base model's fingerprint, for `runs create` on a machine without the model."""
    found = resolved(read(plan))
    text = json.dumps(found.model_dump(mode="json"), indent=2, ensure_ascii=False)
    if out is not None:
        try:
            out.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise errors.InvalidRequest(f"{out} cannot be written: {error.strerror}") from None
        typer.echo(f"wrote {out}", err=True)
    if out is None or as_json:
        typer.echo(text)


def _summary(plan: Plan) -> RenderableType:
    layout = plan.layout
    assert layout is not None
    kinds = sorted({module.rpartition(".")[2] for module in layout.modules})
    return facts(
        [
            ("plan", plan.name),
            ("model", f"{plan.model.id}, {layout.base.parameters:,} parameters"),
            ("fingerprint", plan.model.fingerprint or ""),
            ("task", plan.task.kind),
            ("adapted", f"{len(layout.modules)} modules: {', '.join(kinds)}"),
            (_full_words(plan), ", ".join(layout.full)),
            ("strategy", plan.strategy.name + UNCHECKED),
            ("rank policy", plan.ranks.name + UNCHECKED),
            ("continues", plan.continues or ""),
        ]
    )


def _full_words(plan: Plan) -> str:
    return "trained in full" if plan.adapter.head is Head.trained else "frozen as made"


def _costs(plan: Plan) -> RenderableType:
    layout = plan.layout
    assert layout is not None
    trained = plan.adapter.trained(layout)
    columns = ("rank", "trained numbers", "slice", "trained slice", "scale")
    rows = [
        (
            str(rank),
            f"{trained.numbers(rank):,}",
            words.size(body_length(layout, rank, plan.wire)),
            words.size(body_length(trained, rank, plan.upload)),
            f"{plan.adapter.scale(rank):g}",
        )
        for rank in plan.ranks.ladder
    ]
    return table(*columns, rows=rows, right=columns)
