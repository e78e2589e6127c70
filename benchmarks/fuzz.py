"""The slice's reader under a coverage-guided fuzzer: nothing but refusals may come of any bytes, in bounded time and memory.

It starts from real slices and from what earlier runs found worth keeping; what reaches more of the reader is kept.
"""

from __future__ import annotations

import base64
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel

from benchmarks.damage import seeds
from benchmarks.machine import Machine, this_machine
from protocol import errors

LIMITS = {"timeout": 5, "rss_limit_mb": 2048, "max_len": 16384}  # seconds, and MB, of one execution; bytes of one slice
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Fuzzed(BaseModel):
    """What a run of the fuzzer did."""

    executions: int
    seconds: float
    started_from: int  # slices
    coverage: int  # edges of the reader that were reached
    features: int  # edges with how often, and comparisons
    kept: int  # slices that together reach all of it
    slowest_seconds: int  # of one execution, rounded down
    peak_megabytes: int
    finding: str | None  # what broke a promise: the end of its trace
    input: str | None  # and the slice that did, as base64
    machine: Machine


def fuzz(runs: int, corpus: Iterable[bytes]) -> tuple[Fuzzed, list[bytes]]:
    """Execute so often, or until something is found; gives what happened, and few slices that reach all that was reached."""
    start = [*seeds(), *corpus]
    with tempfile.TemporaryDirectory(prefix="hlora-fuzz-") as folder:
        place = Path(folder)
        grown, least = place / "grown", place / "least"
        grown.mkdir()
        least.mkdir()
        for number, data in enumerate(start):
            (grown / str(number)).write_bytes(data)
        began = time.perf_counter()
        flags = [f"-{name}={limit}" for name, limit in LIMITS.items()]
        said = _libfuzzer(*flags, f"-runs={runs}", "-print_final_stats=1", f"-artifact_prefix={place}/found-", str(grown))
        seconds = time.perf_counter() - began
        found = next((file.read_bytes() for file in place.glob("found-*")), None)
        if found is None:
            _libfuzzer(*flags, "-merge=1", str(least), str(grown))
        kept = [file.read_bytes() for file in sorted(least.iterdir())]
        return _told(said, seconds, len(start), found, len(kept)), kept


def _libfuzzer(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.fuzzing", *arguments]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=Path(__file__).parents[1]).stderr


def _told(said: str, seconds: float, start: int, found: bytes | None, kept: int) -> Fuzzed:
    def last(pattern: str) -> int:
        numbers = re.findall(pattern, said)
        if not numbers:
            raise errors.Unavailable(f"the fuzzer did not run: {said[-500:]}")
        return int(numbers[-1])

    return Fuzzed(
        executions=last(r"(?m)^#(\d+)") if found else last(r"number_of_executed_units: (\d+)"),
        seconds=seconds,
        started_from=start,
        coverage=last(r"\bcov: (\d+)"),
        features=last(r"\bft: (\d+)"),
        kept=kept,
        slowest_seconds=last(r"slowest_unit_time_sec: +(\d+)"),
        peak_megabytes=last(r"peak_rss_mb: +(\d+)"),
        finding=None if found is None else said[max(0, said.find("Uncaught")) :][:3000],
        input=None if found is None else base64.b64encode(found).decode(),
        machine=this_machine(),
    )


def read_corpus(file: Path) -> list[bytes]:
    """Slices that were kept, one on each line: compressed, in base64."""
    return [zlib.decompress(base64.b64decode(line)) for line in file.read_text("ascii").splitlines()]


def write_corpus(file: Path, kept: Iterable[bytes]) -> None:
    """Keep slices, shortest first."""
    lines = (base64.b64encode(zlib.compress(data, 9)).decode() for data in sorted(kept, key=lambda data: (len(data), data)))
    file.write_text("".join(f"{line}\n" for line in lines), "ascii")


def report(found: Fuzzed) -> str:
    """The run for a person."""
    return (
        f"{found.executions} slices in {found.seconds:.0f} s from {found.started_from}: {found.coverage} edges, {found.features} features, "
        f"slowest {found.slowest_seconds} s, peak {found.peak_megabytes} MB, {found.finding or 'nothing found'}"
    )


@app.command()
def main(
    runs: Annotated[int, typer.Option(help="executions")] = 1_000_000,
    corpus: Annotated[Path | None, typer.Option(help="file of slices to start from; what reaches more is added to it")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print a JSON line")] = False,
) -> None:
    """Feed damaged slices to their reader, guided by what they reach. Exits with 1 if it found something."""
    if find_spec("atheris") is None:
        raise typer.BadParameter("the fuzzer needs the package atheris: install HLoRA's extras `coordinator` and `fuzz`")
    found, kept = fuzz(runs, read_corpus(corpus) if corpus is not None and corpus.exists() else ())
    typer.echo(found.model_dump_json() if as_json else report(found))
    if found.finding is not None:
        raise typer.Exit(1)
    if corpus is not None:
        write_corpus(corpus, kept)


if __name__ == "__main__":
    app()
