"""The demonstration itself: one command, real processes, a tiny model, one's own data."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from demo.__main__ import app
from demo.processes import ROOT
from modelling.export import load_adapter
from tests.tiny import tiny_encoder

WORDS = {"animal": ("cow", "hen", "owl"), "tool": ("saw", "axe", "awl")}


def test_data_that_are_not_there_are_one_line_and_code_1(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert re.search(r"The demonstration failed: .*nowhere has 0 \.jsonl files; give a folder", done.stderr)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("model") / "encoder")


@pytest.fixture
def own_data(tmp_path: Path) -> Path:
    """Three departments, of 90, 60 and 30 rows."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, start, count in (("clinic", 0, 90), ("library", 100, 60), ("school", 200, 30)):
        rows = []
        for n in range(start, start + count):
            label = ("animal", "tool")[n % 2]
            rows.append({"say": f"the {WORDS[label][n % 3]} number {n} is {WORDS[label][n // 3 % 3]}", "is": label})
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def demonstrate(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "demo", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HLORA_COORDINATOR_PORT": "1", "HLORA_TOKEN": "somebody else's"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_one_command_leaves_a_summary_a_picture_and_an_adapter(tmp_path: Path, model: Path, own_data: Path) -> None:
    out = tmp_path / "out"
    own = ("--data", own_data, "--text", "say", "--label", "is", "--model", model)
    done = demonstrate(*own, "--rounds", 1, "--out", out, "--json")

    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary == json.loads((out / "summary.json").read_text())
    assert [client["name"] for client in summary["clients"]] == ["clinic", "library", "school"]
    assert all(client["rank"] in (2, 4, 8, 16) and client["reason"] for client in summary["clients"])
    assert summary["rounds"] == 1
    assert min(summary["bytes_up"], summary["bytes_down"], summary["seconds"]) > 0
    assert 0 < summary["accuracy_majority"] < 1
    # PEFT outside the federation finds what the departments found inside it.
    assert summary["accuracy_pulled_adapter_own_rank"] == pytest.approx(summary["accuracy_after"])
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert load_adapter(out / "adapter" / "rank-4", labels=["animal", "tool"]).model.peft_config["default"].r == 4
    assert "round 1 of 1: accuracy" in done.stderr


@pytest.mark.slow
def test_a_demonstration_that_takes_too_long_stops_and_says_so(tmp_path: Path, model: Path, own_data: Path) -> None:
    own = ("--data", own_data, "--text", "say", "--label", "is", "--model", model)
    done = demonstrate(*own, "--minutes", 0.1, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "The demonstration failed: the time is up while waiting for" in done.stderr
