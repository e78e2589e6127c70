"""What the documents say is so: their commands, links, states, plans and variables are looked up in the code."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from enum import StrEnum
from importlib import import_module
from pathlib import Path

import pytest
import typer

from docs import generate
from protocol.plan import Plan
from protocol.states import ClientState, JobState, RoundState, RunState
from tests.test_packaging import SETTINGS

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
TEXTS = [*PAGES, ROOT / "compose.yaml", ROOT / "Dockerfile", ROOT / "Makefile"]
SECTIONS = ["**Question.**", "**Decision.**", "**Why.**", "**What follows.**"]
TEST_VARIABLES = {"HLORA_TEST_POSTGRES", "HLORA_TEST_INTERLEAVINGS"}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in some language."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", page.read_text("utf-8"))


def commands(text: str) -> Iterator[list[str]]:
    """Every `python -m ROOM …` in a text, in words."""
    for found in re.findall(r'python -m ((?:coordinator|agent|admin|simulation|demo|benchmarks|experiments)\b[^`\n|;)"]*)', text):
        for separator in (" && ", " > ", " # ", "  "):
            found = found.partition(separator)[0]
        yield found.split()


def misused(words: list[str]) -> str | None:
    """What is wrong with a command: a part or an option that does not exist."""
    room, *rest = words
    app: typer.Typer = import_module(room if "." in room else f"{room}.__main__").app
    here = typer.main.get_command(app)
    for word in rest:
        option = re.match(r"--?[a-z][a-z-]*", word)
        known = {name for parameter in here.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
        if option and option[0] not in known:
            return f"{' '.join(words)}: there is no option {option[0]}"
        inner = getattr(here, "commands", {})
        if inner and not option and re.fullmatch("[a-z-]+", word):
            if word not in inner:
                return f"{' '.join(words)}: there is no {word}"
            here = inner[word]
    return None


@pytest.mark.parametrize("name", generate.DOCUMENTS)
def test_a_generated_document_is_what_the_code_says(name: str) -> None:
    assert (ROOT / "docs" / name).read_text("utf-8") == generate.DOCUMENTS[name](), "run make docs"


def test_every_command_that_is_shown_exists() -> None:
    found = [(page.name, misused(words)) for page in TEXTS for words in commands(page.read_text("utf-8"))]
    assert found
    assert [wrong for wrong in found if wrong[1]] == []


def test_every_target_of_make_that_is_shown_exists() -> None:
    offered = set(re.findall(r"(?m)^([a-z]+):.*## ", (ROOT / "Makefile").read_text("utf-8")))
    shown = {(page.name, target) for page in PAGES for target in re.findall(r"(?:`|^|&& )make ([a-z]+)\b", page.read_text("utf-8"), re.M)}
    assert shown
    assert {(page, target) for page, target in shown if target not in offered} == set()


def test_every_variable_that_is_named_is_a_setting() -> None:
    named = {(page.name, name) for page in TEXTS for name in re.findall(r"\bHLORA_[A-Z_]+\b", page.read_text("utf-8"))}
    assert {(page, name) for page, name in named if name not in SETTINGS | TEST_VARIABLES} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)$", there.read_text("utf-8"))
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


def test_every_page_is_in_the_list_of_pages() -> None:
    linked = set(re.findall(r"\]\(([^)#]+)\)", (ROOT / "docs" / "README.md").read_text("utf-8")))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - linked == {"README.md"}


@pytest.mark.parametrize("state", [RunState, RoundState, JobState, ClientState])
def test_the_state_diagrams_show_exactly_the_states(state: type[StrEnum]) -> None:
    diagrams = [block for block in blocks(ROOT / "docs" / "concepts.md", "mermaid") if block.startswith("stateDiagram-v2")]
    shown = [set(re.findall(r"(\w+) -->|--> (\w+)", diagram)) for diagram in diagrams]
    names = [{name for pair in pairs for name in pair if name} for pairs in shown]
    assert {str(member) for member in state} in names


def test_what_is_shown_as_python_is_python() -> None:
    shown = [(page.name, block) for page in PAGES for block in blocks(page, "python")]
    assert shown
    for name, block in shown:
        compile(block, name, "exec")


def test_every_plan_that_is_shown_could_be_resolved() -> None:
    plans = [tomllib.loads(block) for page in PAGES for block in blocks(page, "toml")]
    whole = [Plan.model_validate(plan) for plan in plans if "cohort" in plan]
    assert whole


def test_every_decision_answers_the_same_questions() -> None:
    for path in (ROOT / "docs" / "decisions").glob("[0-9t]*.md"):
        found = re.findall(r"(?m)^\*\*[\w ]+\.\*\*", path.read_text("utf-8"))
        assert [section for section in SECTIONS if section not in found] in ([], ["**What follows.**"]), path.name


def test_every_property_in_the_security_page_names_its_module_and_its_test() -> None:
    rows = re.findall(r"(?m)^\| .* \| `([\w/.]+)` \| `([\w/.]+)::(\w+)` \|$", (ROOT / "docs" / "security.md").read_text("utf-8"))
    assert len(rows) >= 10
    for module, file, test in rows:
        assert (ROOT / module).exists(), module
        assert re.search(rf"def {test}\(", (ROOT / file).read_text("utf-8")), f"{file} has no {test}"


def test_the_glossary_is_sorted_and_says_each_word_once() -> None:
    words = re.findall(r"(?m)^\| \*\*(.*?)\*\* \|", (ROOT / "docs" / "glossary.md").read_text("utf-8"))
    assert words == sorted(set(words))
