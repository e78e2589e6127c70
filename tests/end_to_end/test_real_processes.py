"""One whole federation with real processes: coordinator, agents and the operator's command, on both databases.

A simulation of the same plan on the same home folders publishes the same bytes, so it tells what must come out, whatever is
killed on the way.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from modelling.export import load_adapter
from tests.tiny import tiny_encoder

pytestmark = pytest.mark.slow
PATIENCE = 120.0  # seconds; an outer bound, nothing is measured by it
TIERS = {"clinic": "large", "library": "small", "school": "small"}
PLAN = """
name = "things"
data = "things"
rounds = 3
model = { id = "MODEL" }
task = { kind = "sequence-classification", labels = ["animal", "tool"], max_length = 16 }
adapter = { modules = ["query", "value"] }
training = { learning_rate = 0.02, batch_size = 4, epochs = 20, precision = "float32" }
ranks = { name = "labels", ladder = [2, 8], options = { label = "tier", table = { small = 2, large = 8 }, default = 2 } }
cohort = { target = 3, quorum = 3 }
times = { lease = 6, no_progress = 60, job = 200, round = 300 }
"""


@dataclass
class Machine:
    """One operating system's worth of processes, all ended with the test."""

    environment: dict[str, str]
    running: ExitStack = field(default_factory=ExitStack)

    def start(self, *command: object, log: Path, **environment: str) -> subprocess.Popen[bytes]:
        with log.open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", *map(str, command)], env=self.environment | environment, stdout=out, stderr=out, cwd=log.parent
            )
        self.running.callback(_end, process)
        return process

    def call(self, *command: object, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *map(str, command)], env=self.environment | environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found = Machine(environment)
    with found.running:
        yield found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("model") / "encoder")


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    folder = tmp_path / "fleet"
    for n, (name, tier) in enumerate(TIERS.items()):
        home = folder / name
        home.mkdir(parents=True)
        (home / "things.jsonl").write_text("\n".join(json.dumps(_row(n * 50 + i)) for i in range(40)))
        (home / "datasets.toml").write_text('[things]\nformat = "jsonl"\npath = "things.jsonl"\nheld_out = 0.25\nseed = 10\n')
        (home / "machine.toml").write_text(f'labels = {{ tier = "{tier}" }}\n')
    return folder


def _row(n: int) -> dict[str, str]:
    words, label = (("cow", "hen", "owl"), "animal") if n % 2 else (("saw", "axe", "awl"), "tool")
    return {"text": f"the {words[n % 3]} is {words[(n // 3) % 3]}", "label": label}


def _until(what: Callable[[], object], why: str) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end, why
        time.sleep(0.05)


@dataclass
class Site:
    """A coordinator that can be killed and started again at the same address."""

    machine: Machine
    folder: Path
    database: str
    port: str = "0"
    process: subprocess.Popen[bytes] | None = None

    def settings(self) -> dict[str, str]:
        return {"HLORA_COORDINATOR_DATA": str(self.folder), "HLORA_COORDINATOR_DATABASE_URL": self.database}

    def start(self) -> str:
        log = self.folder / "coordinator.log"
        before = log.stat().st_size if log.exists() else 0
        self.process = self.machine.start("coordinator", "serve", "--port", self.port, log=log, **self.settings())
        _until(lambda: re.search(r"url=http://\S+:(\d+)", log.read_text()[before:]), "the coordinator does not listen")
        found = re.search(r"url=(http://\S+:(\d+))", log.read_text()[before:])
        assert found is not None
        self.port = found[2]
        return found[1]

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def test_killed_and_restarted_processes_publish_the_bytes_of_the_simulation(
    machine: Machine, model: Path, fleet: Path, tmp_path: Path, database_url: str
) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN.replace("MODEL", str(model)))
    simulated = [json.loads(line) for line in machine.call("simulation", plan, fleet, "--json").splitlines()]

    (tmp_path / "site").mkdir()
    site = Site(machine, tmp_path / "site", database_url)
    url = site.start()
    operator = {"HLORA_URL": url, "HLORA_TOKEN": machine.call("coordinator", "token", "tester", **site.settings())}

    def agent(name: str) -> subprocess.Popen[bytes]:
        return machine.start("agent", "run", "--home", fleet / name, log=tmp_path / f"{name}.log")

    for name, tier in TIERS.items():
        made = json.loads(machine.call("admin", "enrolments", "create", "--label", f"tier={tier}", "--json", **operator))
        machine.call("agent", "enrol", url, "--name", name, "--home", fleet / name, HLORA_AGENT_TOKEN=made["token"])
    agents = {name: agent(name) for name in TIERS}
    run = json.loads(machine.call("admin", "runs", "create", plan, "--json", **operator))["id"]

    def reached(number: int) -> bool:
        return _published(machine, operator, run) >= number

    _until(lambda: reached(1), "no round was published")
    agents["clinic"].kill()
    agents["clinic"].wait()
    site.kill()
    assert site.start() == url
    agents["clinic"] = agent("clinic")
    watched = machine.start("admin", "runs", "watch", run, "--json", log=tmp_path / "watch.log", **operator)

    assert watched.wait(PATIENCE) == 0, (tmp_path / "watch.log").read_text()
    rounds = [json.loads(machine.call("admin", "rounds", "show", run, n, "--json", **operator)) for n in range(4)]
    assert [round["adapter"]["digest"] for round in rounds] == [round["adapter"]["digest"] for round in simulated]
    assert {job["client_name"]: job["rank"]["rank"] for job in rounds[1]["jobs"] if job["kind"] == "train"} == {
        "clinic": 8,
        "library": 2,
        "school": 2,
    }

    folder = tmp_path / "pulled"
    machine.call("admin", "adapter", "pull", run, "--rank", "8", "--out", folder, **operator)
    words = AutoTokenizer.from_pretrained(model)(["the cow is hen", "the saw is axe"], padding=True, return_tensors="pt")
    adapted = load_adapter(folder, labels=["animal", "tool"]).model
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    with torch.no_grad():
        assert adapted(**words).logits.argmax(1).tolist() == [0, 1]
        assert not torch.allclose(adapted(**words).logits, base(**words).logits)

    for process in agents.values():
        process.send_signal(signal.SIGTERM)
    assert [process.wait(PATIENCE) for process in agents.values()] == [0, 0, 0]
    assert site.process is not None
    site.process.send_signal(signal.SIGTERM)
    assert site.process.wait(PATIENCE) == 0


def _published(machine: Machine, operator: dict[str, str], run: str) -> int:
    return int(json.loads(machine.call("admin", "runs", "show", run, "--json", **operator))["round"])
