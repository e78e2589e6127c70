"""What a coordinator knows: its strategies and rank policies, and whether it works."""

from __future__ import annotations

import json
from collections.abc import Mapping

import typer
from pydantic import JsonValue
from rich.console import Group, RenderableType

from admin.command import AsJson, answer, connect, connect_openly, facts, table
from protocol.views import Description


def strategies(ctx: typer.Context, as_json: AsJson = False) -> None:
    """The strategies that a plan may name, and their options."""
    with connect(ctx) as client:
        found = client.strategies()
    answer(found, as_json, Group(*map(_described, found)))


def ranks(ctx: typer.Context, as_json: AsJson = False) -> None:
    """The rank policies that a plan may name, and their options."""
    with connect(ctx) as client:
        found = client.rank_policies()
    answer(found, as_json, Group(*map(_described, found)))


def health(ctx: typer.Context, as_json: AsJson = False) -> None:
    """Whether the coordinator, its database and its blob store answer. Needs no token."""
    with connect_openly(ctx) as client:
        found = client.health()
    answer(found, as_json, facts([("status", found.status), ("version", found.version), *found.checks.items()]))


def _described(found: Description) -> RenderableType:
    promises = ", ".join(f"{name}: {_plain(value)}" for name, value in found.properties.items())
    options = found.options.get("properties", {})
    rows = (
        [_option(name, schema) for name, schema in options.items() if isinstance(schema, Mapping)] if isinstance(options, Mapping) else []
    )
    parts: list[RenderableType] = [f"{found.name}: {found.summary}"]
    parts += [f"  {promises}"] if promises else []
    parts += [table("  option", "default", "meaning", rows=rows)] if rows else []
    return Group(*parts, "")


def _option(name: str, schema: Mapping[str, JsonValue]) -> tuple[str, str, str]:
    return f"  {name}", _plain(schema["default"]) if "default" in schema else "–", str(schema.get("description", ""))


def _plain(value: JsonValue) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
