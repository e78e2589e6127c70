"""The house rules that a program can check. Who imports whom is in pyproject.toml's contracts."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol import VERSION

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
ROOMS: list[str] = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
COMMANDS = sorted(path.parent.name for path in ROOT.glob("*/__main__.py"))

LONGEST_FILE = 300  # lines
LONGEST_FUNCTION = 40  # lines of code
ROOMLESS = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "shared"}  # names that admit anything
HANDED_ON = {Path("demo/processes.py")}  # gives its own environment to the processes that it starts
HEAVY = {"torch", "transformers", "peft", "fastapi", "sqlalchemy", "numpy", "matplotlib"}  # each takes long to import


def modules() -> Iterator[tuple[Path, ast.Module]]:
    """Every Python file of the rooms, by its path in the project."""
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield path.relative_to(ROOT), ast.parse(path.read_text("utf-8"))


def texts() -> Iterator[tuple[Path, str]]:
    """Every text of the repository, those of the next commit included."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in sorted(set(listed.stdout.splitlines())):
        if not name.endswith(".png") and (ROOT / name).is_file():
            yield Path(name), (ROOT / name).read_text("utf-8")


def test_every_file_can_be_read_in_one_sitting() -> None:
    lines = {path: len((ROOT / path).read_text("utf-8").splitlines()) for path, _ in modules()}
    assert {path: n for path, n in lines.items() if n > LONGEST_FILE} == {}


def test_every_function_is_small() -> None:
    found = []
    for path, module in modules():
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and path.parts[0] != "migrations":
                lines = (node.end_lineno or 0) - node.body[0].lineno + 1 - sum(map(lines_of_text, ast.walk(node)))
                found += [f"{path}: {node.name} has {lines} lines"] if lines > LONGEST_FUNCTION else []
    assert found == []


def lines_of_text(node: ast.AST) -> int:
    """How many lines more than one a string has: docstrings and templates are read, not followed."""
    text = isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    return (node.end_lineno or 0) - node.lineno if text and isinstance(node, ast.expr) else 0


def test_every_name_says_what_a_file_is_for() -> None:
    found = [
        path for path, _ in modules() if ROOMLESS.intersection(path.with_suffix("").parts) or re.search(r"_(v\d+|new|old)$", path.stem)
    ]
    assert found == []


def test_every_public_name_is_documented() -> None:
    found = []
    for path, module in modules():
        public = [node for node in module.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
        documented = [module, *(node for node in public if not node.name.startswith("_"))] if module.body else []
        missing = [node for node in documented if not ast.get_docstring(node)]
        found += [f"{path}: {getattr(node, 'name', 'the module')}" for node in missing if path.parts[0] != "migrations"]
    assert found == []


def test_only_settings_read_the_environment() -> None:
    readers = {"environ", "environb", "getenv", "BaseSettings"}
    found = {
        path
        for path, module in modules()
        for node in ast.walk(module)
        if getattr(node, "attr", None) in readers or getattr(node, "id", None) in readers
    }
    assert found - HANDED_ON == {Path("admin/settings.py"), Path("agent/settings.py"), Path("coordinator/settings.py")}


def test_no_text_names_a_place_that_only_one_machine_has() -> None:
    folders = "|".join(["work", "root", "opt"])
    private = re.compile(rf"(?<![\w.~-])/(?:{folders})/|\.\./sha" r"red|https?://[^\s/]*(?:pypi|artifact|nexus)", re.IGNORECASE)
    found = [
        f"{path}:{number}: {line.strip()[:120]}"
        for path, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if private.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_there_before_anything_heavy_is_imported(command: str) -> None:
    asked = [sys.executable, "-X", "importtime", "-m", command, "--help"]
    helped = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    assert helped.returncode == 0, helped.stderr[-2000:]
    assert "usage" in helped.stdout.lower()
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in helped.stderr.splitlines()}
    assert imported & HEAVY == set()


def test_the_version_is_the_same_everywhere() -> None:
    assert PROJECT["project"]["version"] == VERSION
    assert f"## {VERSION}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_every_room_is_in_the_wheel() -> None:
    assert {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests", "docs"} == set(ROOMS)
