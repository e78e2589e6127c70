"""Whole federations in one process: the real agents, the real application, and time that is ours."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import zipfile
from datetime import timedelta
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from agent.data import Part
from agent.training import Outcome, Tell
from modelling.layout import resolve
from protocol import errors
from protocol.messages import Job
from protocol.plan import Plan
from protocol.slices import Slice
from protocol.states import RoundState, RunState
from protocol.views import RunDetail
from simulation import device
from simulation.__main__ import _simulate, read_plan
from simulation.federation import federation
from simulation.report import Report
from tests.tiny import tiny_encoder

ANIMALS = ("cow", "hen", "owl", "cat", "dog", "fox")
TOOLS = ("saw", "axe", "awl", "hoe", "nut", "jig")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("model") / "encoder")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four devices: two with many rows, one with few, one behind a slow link."""
    folder = tmp_path_factory.mktemp("fleet")
    for n, (name, rows, link) in enumerate([("amy", 48, 1e6), ("bob", 48, 1e6), ("cid", 12, 1e6), ("dot", 48, 120.0)]):
        home = folder / name
        home.mkdir()
        lines = [_row(n * 100 + i) for i in range(rows)]
        (home / "things.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        (home / "datasets.toml").write_text('[things]\nformat = "jsonl"\npath = "things.jsonl"\nheld_out = 0.25\nseed = 10\n')
        (home / "machine.toml").write_text(f"up_bytes_per_second = {link}\ndown_bytes_per_second = {link}\n")
    return folder


def _row(n: int) -> dict[str, str]:
    words, label = (ANIMALS, "animal") if n % 2 else (TOOLS, "tool")
    return {"text": f"the {words[n % 6]} is {words[(n // 6) % 6]}", "label": label}


def _plan(model: Path, **changes: object) -> Plan:
    told: dict[str, object] = {
        "name": "things",
        "model": {"id": str(model)},
        "task": {"labels": ["animal", "tool"], "kind": "sequence-classification", "max_length": 16},
        "data": "things",
        "adapter": {"modules": ["query", "value"]},
        "training": {"learning_rate": 0.02, "batch_size": 4, "precision": "float32", "epochs": 2},
        "ranks": {"name": "capacity", "ladder": [1, 2, 4, 8]},
        "cohort": {"target": 4, "quorum": 2},
        "times": {"job": 300, "round": 600, "lease": 60},
        "rounds": 3,
    }
    return resolve(Plan.model_validate(told | changes))


async def _digests(plan: Plan, fleet: Path, folder: Path, executor: str = "threads://") -> list[str]:
    async with federation(device.fleet(fleet), folder, executor=executor) as found:
        last = [run async for run in found.run(plan)][-1]
        assert last.state is RunState.finished, last.reason
        rounds = await found.rounds(last.id)
    return [round.adapter.digest for round in rounds if round.adapter is not None]


PLAN = """
name = "things"
data = "things"
rounds = 5
model = {{ id = "{model}" }}
training = {{ learning_rate = 0.01 }}
task = {{ kind = "sequence-classification", labels = ["animal", "tool"] }}
adapter = {{ modules = ["query"] }}
ranks = {{ ladder = [2, 4] }}
cohort = {{ target = 3, quorum = 3 }}
"""


async def test_a_federation_learns_and_each_device_trains_the_rank_that_it_can_afford(model: Path, fleet: Path, tmp_path: Path) -> None:
    async with federation(device.fleet(fleet), tmp_path) as found:
        run = [run async for run in found.run(_plan(model, rounds=6))][-1]
        rounds = await found.rounds(run.id)

    assert run.state is RunState.finished
    assert [round.state for round in rounds] == [RoundState.published] * 7
    assert rounds[-1].metrics["loss"] < rounds[0].metrics["loss"] - 0.2
    ranks = {job.client_name: job.rank.rank for job in rounds[1].jobs if job.kind == "train"}
    assert ranks["amy"] == ranks["bob"] == 8
    assert ranks["cid"] < 8
    assert ranks["dot"] < 8
    assert sum(job.weight for job in rounds[1].jobs if job.weight is not None) == pytest.approx(1)


async def test_the_same_seed_publishes_the_same_bytes_and_another_seed_others(model: Path, fleet: Path, tmp_path: Path) -> None:
    first = await _digests(_plan(model), fleet, tmp_path / "first")
    again = await _digests(_plan(model), fleet, tmp_path / "again")
    other = await _digests(_plan(model, seed=1), fleet, tmp_path / "other")

    assert first == again
    assert len(set(first)) == 4
    assert set(first).isdisjoint(other)


async def test_a_buffered_plan_ends_and_publishes_the_same_bytes_again(model: Path, fleet: Path, tmp_path: Path) -> None:
    """Four devices answer in a sweep and two make a version: what is left over is merged stale."""
    plan = _plan(model, buffer={"size": 2}, rounds=4)
    first = await _digests(plan, fleet, tmp_path / "first")
    again = await _digests(plan, fleet, tmp_path / "again")

    assert first == again
    assert len(set(first)) == 5


@pytest.mark.parametrize(("strategy", "up"), [("folded", 1.0), ("flora", 1.0), ("fedex", 1.0), ("ffa", 0.5)])
async def test_agents_train_what_a_strategy_hands_out_and_send_back_what_they_trained(
    strategy: str, up: float, model: Path, fleet: Path, tmp_path: Path
) -> None:
    plan = _plan(model, strategy={"name": strategy}, cap=12, rounds=1, evaluation={"every": 0}, ranks={"name": "fixed", "ladder": [2]})
    async with federation(device.fleet(fleet), tmp_path) as found:
        last = [run async for run in found.run(plan)][-1]
        assert last.state is RunState.finished, last.reason
        (_, first) = await found.rounds(last.id)
    assert first.manifest is not None
    assert {len(input.directions or (0, 1)) for input in first.manifest.inputs} == {2}
    assert plan.layout is not None
    trained = 4 * (plan.layout.numbers(2) - plan.layout.numbers(0))  # bytes of the directions; queries and values are square
    sizes = {job.slice.bytes for job in first.jobs if job.slice is not None}
    assert len(sizes) == 1
    assert 0 < sizes.pop() - 4 * plan.layout.numbers(0) - up * trained < 4096, "and a header"


async def test_hours_in_which_nobody_has_work_are_a_few_turns(model: Path, fleet: Path, tmp_path: Path) -> None:
    def broken(job: Job, start: Slice, tell: Tell) -> Outcome:
        raise errors.ModelRefusal("this machine trains nothing")

    plan = _plan(model, times={"job": 3600, "round": 7200})
    async with federation(device.fleet(fleet), tmp_path, train=broken) as found:
        began = found.time.now
        last = [run async for run in found.run(plan)][-1]

    assert last.state is RunState.paused
    assert last.reason is not None
    assert last.reason.startswith("waits for clients")
    assert found.time.now - began > timedelta(hours=2)
    assert found.turns < 100


async def test_what_travels_as_int8_publishes_the_same_bytes_again(model: Path, fleet: Path, tmp_path: Path) -> None:
    plan = _plan(model, strategy={"name": "rotating"}, uploads="int8", rounds=1, evaluation={"every": 0})
    first = await _digests(plan, fleet, tmp_path / "first")

    assert first == await _digests(plan, fleet, tmp_path / "again")
    assert len(set(first)) == 2


async def test_the_bytes_do_not_depend_on_where_modules_are_merged(model: Path, fleet: Path, tmp_path: Path) -> None:
    threads = await _digests(_plan(model, rounds=1), fleet, tmp_path / "threads", "threads://3")
    processes = await _digests(_plan(model, rounds=1), fleet, tmp_path / "processes", "processes://2")

    assert threads == processes


@pytest.mark.parametrize(("strategy", "head"), [("hlora", "trained"), ("delta", "trained"), ("delta", "frozen")])
async def test_the_pulled_adapter_measures_what_the_federation_measured(
    strategy: str, head: str, model: Path, fleet: Path, tmp_path: Path
) -> None:
    adapter = {"modules": ["query", "value"], "head": head}
    plan = _plan(model, strategy={"name": strategy}, adapter=adapter, evaluation={"rank": 4})
    async with federation(device.fleet(fleet), tmp_path / "federation") as found:
        run = [run async for run in found.run(plan)][-1]
        archive = await found.adapter(run.id, rank=4)
        first, last = [safetensors.torch.load(await found.tensors(run.id, round, 4)) for round in (0, 3)]
        held_out = [row for agent in device.fleet(fleet) for _, row in agent.catalogue.rows("things", Part.held_out)]
    with zipfile.ZipFile(io.BytesIO(archive)) as packed:
        packed.extractall(tmp_path / "adapter")

    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    tokens = AutoTokenizer.from_pretrained(model)([row["text"] for row in held_out], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = adapted(**tokens).logits
    labels = torch.tensor([["animal", "tool"].index(str(row["label"])) for row in held_out])

    heads = [name for name in first if "classifier" in name]
    assert len(heads) == 2
    assert all(torch.equal(first[name], last[name]) == (head == "frozen") for name in heads)
    assert run.metrics["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-4)
    assert run.metrics["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))


def test_the_command_tells_each_round_and_refuses_a_fleet_that_is_none(model: Path, fleet: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN.format(model=model))

    out = tmp_path / "out"
    rows = fleet / "amy" / "things.jsonl"
    good = rows.read_text()
    rows.write_text(good + '{"text": "cow"\n')
    broken = subprocess.run([sys.executable, "-m", "simulation", plan, fleet, "--out", out], capture_output=True, text=True, check=False)
    assert "device amy" in broken.stderr
    assert list(out.iterdir()) == [], "it cannot be told again to go there"
    rows.write_text(good)
    told = subprocess.run(
        [sys.executable, "-m", "simulation", plan, fleet, "--rounds", "1", "--json", "--out", out],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    refused = subprocess.run([sys.executable, "-m", "simulation", plan, tmp_path], capture_output=True, text=True, check=False)

    assert [json.loads(line)["number"] for line in told] == [0, 1]
    assert (out / "hlora.sqlite").is_file()
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["r"] == 4
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")


async def test_what_a_run_that_does_not_go_on_has_learned_is_kept(
    model: Path, fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on to round 1, and then the report ends it, as where it is paused."""
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN.format(model=model))

    async def paused(_report: Report, _federation: object, run: RunDetail) -> None:
        if run.round:
            raise errors.Conflict("the run is paused: waits for clients")

    monkeypatch.setattr(Report, "follow", paused)
    with pytest.raises(errors.Conflict, match="paused"):
        await _simulate(plan, fleet, tmp_path / "out", None, None, as_json=False)
    assert json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())["r"] == 4


def test_what_is_wrong_with_a_device_names_it(fleet: Path, tmp_path: Path) -> None:
    home = Path(shutil.copytree(fleet / "amy", tmp_path / "fleet" / "eve"))
    (home / "things.jsonl").write_text('{"text": "cow"\n')
    with pytest.raises(errors.DataRefusal, match=r"^device eve: 'things': things\.jsonl: row 1 is no JSON object"):
        device.fleet(home.parent)[0].profile()
    (home / "machine.toml").write_text("memory = 1\n")
    with pytest.raises(errors.InvalidProfile, match=r"eve/machine\.toml: memory is unknown; is memory_bytes meant\?$"):
        device.fleet(home.parent)


def test_a_plan_file_that_makes_no_plan_is_refused_with_the_line_at_fault(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    for text in (b"name = ", b'name = "caf\xe9"'):
        file.write_bytes(text)
        with pytest.raises(errors.InvalidPlan, match="is no TOML"):
            read_plan(file, {})
    file.write_text('name = "words"\nrounds = 0\n')
    with pytest.raises(errors.InvalidPlan, match=r"plan\.toml: "):
        read_plan(file, {"seed": None})
