"""The folder is the registry; other packages join by entry point; every strategy says what it is, here and in the docs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from coordinator import aggregation
from coordinator.aggregation import Strategy
from coordinator.assembly import module_piece
from coordinator.blobs import Blobs
from protocol import errors
from protocol.plan import Choice
from protocol.slices import Factors
from protocol.views import Energy
from tests.merging.rounds import merge, second_round
from tests.merging.small import make_plan, read
from tests.merging.test_strategies import Client, close, counted, handed, make_round, product, started
from tests.merging.test_truncation import dense as multiplied_out

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "writing-a-strategy.md").read_text(encoding="utf-8")
TABLE = (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8")


def install(folder: Path, module: str, source: str, target: str, name: str) -> None:
    """A package with one module and one entry point, as pip would leave it."""
    (folder / f"{module}.py").write_text(source, encoding="utf-8")
    facts = folder / f"{module}-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[{aggregation.GROUP}]\n{name} = {target}\n")


def test_the_files_of_the_folder_are_the_strategies() -> None:
    files = {path.stem for path in (ROOT / "coordinator" / "aggregation").glob("*.py")} - {"__init__"}
    assert set(aggregation.names()) == files
    assert {"hlora", "delta"} <= files


@pytest.mark.parametrize("name", aggregation.names())
def test_every_strategy_says_what_it_is(name: str) -> None:
    kind = aggregation.load(name)
    assert re.match(r"(arXiv:\d{4}\.\d{5}|https://)", kind.source)
    described = next(found for found in aggregation.describe() if found.name == name)
    assert re.fullmatch(r"[A-Z].{20,160}\.", described.summary)
    assert described.options["type"] == "object"
    claims = {"exact": kind.exact, "linear": kind.linear, "gauge_free": kind.gauge_free, "equal_ranks": kind.equal_ranks}
    claims["stale"] = kind.stale
    travelling = {"portion": kind.portion, "down": aggregation.DOWN[kind.portion], "up": aggregation.UP[kind.sides]}
    assert described.properties == {**claims, **travelling, "equation": kind.equation, "cost": kind.cost, "source": kind.source}


@pytest.mark.parametrize("name", aggregation.names())
def test_every_strategy_has_its_line_in_the_docs(name: str) -> None:
    kind = aggregation.load(name)
    claims = ["yes" if claim else "no" for claim in (kind.exact, kind.linear, kind.gauge_free)]
    claims += ["one" if kind.equal_ranks else "any", aggregation.DOWN[kind.portion], aggregation.UP[kind.sides]]
    assert f"| `{name}` | {' | '.join(claims)} | {kind.cost} | {kind.source} |" in TABLE
    assert f"- `{name}`: W ← {kind.equation.removeprefix('W ← ')}. {(kind.__doc__ or '').splitlines()[0]}" in TABLE


@pytest.mark.parametrize("name", ["nothing", "os", "__init__", "delta.os", "..delta", "", "Delta"])
def test_a_name_that_is_not_there_is_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(errors.InvalidPlan, match=r"there are delta, .*, hlora, "):
        aggregation.load(name)


def test_an_option_that_a_strategy_does_not_have_is_refused() -> None:
    with pytest.raises(errors.InvalidPlan, match=r"strategy hlora, option step: .* its options are: none"):
        aggregation.check(Choice(name="hlora", options={"step": 2}))
    with pytest.raises(errors.InvalidPlan, match=r"strategy delta, option momentum: .* its options are: step, momentum"):
        aggregation.check(Choice(name="delta", options={"momentum": 1.0}))


def test_a_strategy_written_after_the_page_works_from_its_own_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blobs: Blobs
) -> None:
    example = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    target = re.search(r'^stride = "(.*)"$', PAGE, re.MULTILINE)
    assert example is not None
    assert target is not None
    install(tmp_path, "stride", example[1], target[1], "stride")
    monkeypatch.syspath_prepend(tmp_path)

    assert "stride" in aggregation.names()
    assert any(found.name == "stride" for found in aggregation.describe())
    chosen = aggregation.check(Choice(name="stride", options={"step": 0.5}))
    made = make_round((20, 12), [Client(1, 1.0, 1.0, 1), Client(4, 2.0, 0.5, 2)])
    told = tuple(handed(type(chosen), made, c, number) for number, c in enumerate(made.contributions))
    round = replace(made, contributions=told)
    mean = sum(c.weight * (counted(c) - started(c)) for c in round.contributions)
    assert close(multiplied_out(chosen.combine(round)), product(round.adapter, 1.0) + 0.5 * mean)

    with pytest.raises(errors.InvalidPlan, match=r"strategy stride, option step: .* its options are: step"):
        aggregation.check(Choice(name="stride", options={"step": 11}))

    before, task = second_round(blobs, make_plan("stride", cap=6))
    assert {read(blobs, ref).label.rank for ref in before.starts.values()} == {6}, "clients of all ranks start from all of it"
    assert {input.directions for input in task.inputs} == {(0,), (0, 1), (0, 1, 2, 3)}
    assert merge(task, blobs) == merge(replace(task, inputs=task.inputs[::-1]), blobs)


def test_an_entry_point_that_is_no_strategy_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "impostor", "Impostor = dict\n", "impostor:Impostor", "impostor")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(errors.InvalidPlan, match="is no Strategy"):
        aggregation.load("impostor")


def test_a_strategy_that_keeps_factors_of_its_own_must_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
from coordinator.aggregation.delta import Delta

class Keeper(Delta):
    \"\"\"Keeps what it likes.\"\"\"

    def keep(self, round, w, best):
        return best
"""
    install(tmp_path, "keeper", text, "keeper:Keeper", "keeper")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(errors.InvalidPlan, match="must say singular = False"):
        aggregation.load("keeper")


@pytest.mark.parametrize("claim", ["stale = False", "singular = False"])
def test_only_sums_of_changes_in_singular_form_let_clients_begin_differently(
    claim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"from coordinator.aggregation.folded import Folded\n\nclass Mixed(Folded):\n    {claim}\n"
    name = claim.partition(" ")[0]
    install(tmp_path, name, text, f"{name}:Mixed", f"mixed_{name}")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(errors.InvalidPlan, match="goes with sums of changes"):
        aggregation.load(f"mixed_{name}")


def test_a_file_of_the_folder_without_a_strategy_is_refused_and_one_that_hides_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "halves.py").write_text("HALF = 0.5\n")
    (tmp_path / "_parts.py").write_text("PART = 0.25\n")
    monkeypatch.setattr(aggregation, "__path__", [*aggregation.__path__, str(tmp_path)])
    assert "_parts" not in aggregation.names()
    with pytest.raises(errors.InvalidPlan, match="'halves' is no Strategy"):
        aggregation.load("halves")


@pytest.mark.parametrize("cap", [4, 6])
def test_factors_that_do_not_fit_are_not_kept(cap: int) -> None:
    plan = make_plan("fedavg", ladder=(4,), cap=cap)
    energy, best = Energy(total=1.0, kept={}, stacked_rank=4), Factors(b=torch.zeros(20, cap), a=torch.zeros(cap, 12))
    for kept in (Factors(b=torch.zeros(20, cap + 1), a=torch.zeros(cap + 1, 12)), Factors(b=torch.zeros(19, 2), a=torch.zeros(2, 12))):
        with pytest.raises(errors.UnmergeableRound, match=f"at most {cap} directions of 20 × 12"):
            module_piece(plan, 1, "block.q", kept, best, energy)


def test_a_strategy_must_say_how_it_combines() -> None:
    class Silent(Strategy):
        """Says nothing."""

    with pytest.raises(TypeError, match="combine"):
        Silent()  # type: ignore[abstract]  # that is what is tested
