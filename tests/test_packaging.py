"""What is handed out: the wheel, its extras, the two images, and the commands that make them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import admin.settings
import agent.settings
import coordinator.settings

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))
SETTINGS = {
    f"{kind.model_config['env_prefix']}{name.upper()}"
    for kind in (admin.settings.Settings, agent.settings.Settings, coordinator.settings.Settings)
    for name in kind.model_fields
}


def name_of(requirement: str) -> str:
    """A requirement's package, in the normal form."""
    return re.split(r"[\[<>=!~ ;]", requirement)[0].lower().replace("_", "-")


def needed(extra: str) -> set[str]:
    """The packages of an extra, those of the extras that it names included."""
    found: set[str] = set()
    for requirement in EXTRAS[extra]:
        inner = re.fullmatch(r"hlora\[(.*)\]", requirement)
        found |= set().union(*(needed(name) for name in inner[1].split(","))) if inner else {name_of(requirement)}
    return found


def stages() -> dict[str, str]:
    """The Dockerfile's stages by name, each with the text of the stages that it builds on."""
    found: dict[str, str] = {}
    for stage in re.split(r"(?m)^(?=FROM )", DOCKERFILE)[1:]:
        match = re.match(r"FROM (\S+) AS (\S+)\n", stage)
        assert match, stage
        found[match[2]] = found.get(match[1], "") + stage
    return found


def test_coordinator_and_agent_need_none_of_each_others_packages() -> None:
    web = {"fastapi", "uvicorn", "sqlalchemy", "alembic", "psycopg", "obstore", "prometheus-client"}
    training = {"transformers", "peft", "psutil", "httpx"}
    assert needed("coordinator") >= web
    assert needed("coordinator").isdisjoint(training)
    assert needed("agent") >= training
    assert needed("agent").isdisjoint(web)


def test_the_demo_needs_no_tools_of_developers() -> None:
    assert needed("demo").isdisjoint({"pytest", "ruff", "mypy", "hypothesis"})


def test_every_direct_requirement_is_pinned_in_the_tested_set() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    pinned = {name_of(line) for line in lines}
    direct = {name_of(requirement) for requirement in PROJECT["dependencies"]}.union(*(needed(extra) for extra in EXTRAS))
    assert direct - {"datasets"} <= pinned  # the hub's library is nobody's default and is tested by nobody
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "exact, and without a local version such as +cpu"


def test_the_wheel_holds_every_room_and_its_migrations_and_nothing_else(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("hlora-*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    written = {str(path.relative_to(ROOT)) for room in PACKAGES for path in (ROOT / room).rglob("*.py")}
    assert written <= held
    assert "migrations/script.py.mako" in held
    assert {name.partition("/")[0] for name in held} == set(PACKAGES)


@pytest.mark.parametrize("target", ["coordinator", "agent"])
def test_an_image_is_made_of_what_is_there(target: str) -> None:
    text = stages()[target]
    copied = [source for line in re.findall(r"(?m)^COPY (.*) \S+$", text) for source in line.split()]
    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert {*PACKAGES, "pyproject.toml", "constraints.txt"} <= set(copied)
    let_through = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert [source for source in copied if f"!{source}" not in let_through] == []


@pytest.mark.parametrize("target", ["coordinator", "agent"])
def test_an_image_runs_a_command_that_is_there_as_nobody_special(target: str) -> None:
    text = stages()[target]
    entry, command = (json.loads(re.findall(rf"(?m)^{word} (\[.*\])$", text)[-1]) for word in ("ENTRYPOINT", "CMD"))
    assert entry == ["python", "-m", target]
    helped = subprocess.run([sys.executable, *entry[1:], *command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert helped.returncode == 0, helped.stderr
    assert re.findall(r"(?m)^USER (\w+)$", text) == ["hlora"]
    assert re.search(r"(?m)^VOLUME /var/lib/hlora$", text)
    assert "HEALTHCHECK" in text


@pytest.mark.parametrize("target", ["coordinator", "agent"])
def test_an_image_installs_its_own_extras(target: str) -> None:
    (asked,) = re.findall(r"'\.\[([\w,]+)\]'", stages()[target])
    packages = set().union(*(needed(extra) for extra in asked.split(",")))
    assert packages >= needed(target)
    assert packages.isdisjoint({"transformers", "peft"} if target == "coordinator" else {"fastapi", "sqlalchemy"})


def test_every_variable_of_images_and_services_is_a_setting() -> None:
    services = [variable for service in COMPOSE["services"].values() for variable in service.get("environment", {})]
    named = {*re.findall(r"\bHLORA_\w+", DOCKERFILE), *(variable for variable in services if variable.startswith("HLORA_"))}
    assert named
    assert named <= SETTINGS


def test_services_are_built_from_stages_and_hold_no_secret() -> None:
    built = [service["build"]["target"] for service in COMPOSE["services"].values() if "build" in service]
    assert built == ["coordinator", "agent"]
    assert set(built) <= stages().keys()
    values = [str(value) for service in COMPOSE["services"].values() for key, value in service["environment"].items() if "PASSWORD" in key]
    assert values
    assert all(value.startswith("${POSTGRES_PASSWORD:?") for value in values)


def test_the_gate_runs_the_commands_that_developers_run() -> None:
    gate = ROOT / ".ci" / "run"
    assert os.access(gate, os.X_OK)
    asked = set(re.findall(r"(?m)^make (\w+)", gate.read_text("utf-8")))
    offered = set(re.findall(r"(?m)^([a-z]+):.*## ", (ROOT / "Makefile").read_text("utf-8")))
    assert asked == {"test", "check"}
    assert offered == {"help", "demo", "test", "check", "fix", "simulate", "bench", "docs", "clean"}
