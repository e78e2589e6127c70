"""What is kept of runs: whole or not at all, never of other rows or settings beside these, and readable however old."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments import records
from experiments.__main__ import app
from experiments.experiment import FOLDER, read
from experiments.records import Finished, Header, Results, RoundRecord, Seconds
from protocol import errors

GIVEN = read(FOLDER / "quick.toml")
DELTA = GIVEN.contestant("delta")
NEWER = {"rounds", "data", "commit", "drawn", "steps"}  # what files of earlier versions do not have


def run(data: str | None = "sha256:these") -> Finished:
    """A run of two rounds."""
    settings = GIVEN.digest(DELTA)
    header = Header(
        experiment="quick",
        contestant="delta",
        seed=0,
        settings=settings,
        plan="",
        model="",
        ranks={"weak": 2, "strong": 4},
        mixes={kind: {"all": 1.0} for kind in ("weak", "strong")},
        headline=4,
        software={},
        machine={},
        rounds=2,
        data=data,
    )
    seconds = Seconds(whole=1.0, train=0.5, merge=0.1, measure=0.1)
    told = {"contributions": 1, "lost": 0, "ranks": {4: 1}, "bytes_up": 1.0, "bytes_down": 1.0, "kept": {}, "seconds": seconds}
    return Finished(
        header, [RoundRecord.model_validate({"round": n, "measures": {4: {"all": {"loss": 3.0 - n}}}, **told}) for n in range(3)]
    )


def found(results: Results) -> Finished | None:
    """The run, if it counts as one that ended."""
    return results.find(DELTA, 0, GIVEN.digest(DELTA))


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """A folder with that run."""
    made = Results(tmp_path)
    made.keep(run())
    return made


@pytest.mark.parametrize("end", [0, 30, -1, -40], ids=["empty", "in the first line", "before the last line's end", "in the last line"])
def test_a_file_that_was_cut_is_a_run_that_did_not_end(results: Results, end: int) -> None:
    file = results.file("delta", 0)
    whole = file.read_bytes()
    assert found(results) == run()
    file.write_bytes(whole[:end])
    if end == -1:  # only the line break is missing
        assert found(results) == run()
        return
    assert found(results) is None
    results.check(GIVEN, "sha256:these")
    with pytest.raises(errors.Conflict, match=r"delta--0\.jsonl is cut: its end is missing; `run` does it anew, or remove it"):
        results.all()


@pytest.mark.parametrize("lines", [1, 3])
def test_a_file_that_was_cut_between_two_lines_is_too(results: Results, lines: int) -> None:
    file = results.file("delta", 0)
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:lines]))
    assert found(results) is None


def test_files_without_what_newer_ones_say_are_read_and_gone_on_with(results: Results) -> None:
    file = results.file("delta", 0)
    old = [{key: value for key, value in json.loads(line).items() if key not in NEWER} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(line) + "\n" for line in old))
    (kept,) = results.all()
    assert (kept.header.rounds, kept.header.data, kept.header.commit, kept.rounds[1].drawn) == (None, None, None, {})
    results.check(GIVEN, "sha256:others")
    file.write_text(json.dumps(old[0]) + "\n")
    assert found(results) is None  # no run has no rounds, whatever its first line says


def test_a_file_that_is_no_run_is_named_and_never_written_over(results: Results) -> None:
    file = results.file("delta", 0)
    file.write_text(file.read_text().replace('"round":2', '"rounded":2'))
    with pytest.raises(errors.Conflict, match=r"delta--0\.jsonl is no run that this version can read \(round: Field required\)"):
        found(results)


def test_results_of_other_rows_are_not_gone_on_with(results: Results) -> None:
    results.check(GIVEN, "sha256:these")
    with pytest.raises(errors.Conflict, match=r"delta--0\.jsonl was made with other rows than the data files hold now"):
        results.check(GIVEN, "sha256:others")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "partitions").write_text("in the way")
    shown = CliRunner().invoke(app, ["run", str(FOLDER / "quick.toml"), "--out", str(tmp_path), "--only", "delta", "--seeds", "1"])
    assert shown.exit_code == 1
    (line,) = shown.stderr.splitlines()
    assert line.startswith(f"{tmp_path / 'partitions' / '0.jsonl'} cannot be written: ")
    assert line.endswith("; mend that, or choose another folder")


def test_a_report_that_cannot_be_written_is_one_line(results: Results) -> None:
    (results.folder / "experiment.toml").write_bytes((FOLDER / "quick.toml").read_bytes())
    (results.folder / "report.md").mkdir()
    shown = CliRunner().invoke(app, ["report", str(results.folder), "--write"])
    assert (shown.exit_code, shown.stderr) == (1, f"{results.folder / 'report.md'}: Is a directory\n")


def test_the_commit_is_that_of_the_checkout_if_it_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
        return subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    assert records.commit(tmp_path) is None
    git("init", "-q")
    assert records.commit(tmp_path) is None  # nothing was committed yet
    (tmp_path / "file").write_text("first")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    assert records.commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("second")
    assert records.commit(tmp_path) == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert records.commit(tmp_path) is None
