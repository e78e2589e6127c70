"""The fuzzer's own process, which libFuzzer ends as it likes: `python -m benchmarks.fuzzing FLAGS FOLDER`. Needs the extra `fuzz`."""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path
from random import Random

import atheris

READERS = ["protocol.contents", "protocol.slices", "protocol.compact", "protocol.checks", "coordinator.reading"]
with atheris.instrument_imports(include=READERS):
    from benchmarks.damage import mutate
    from benchmarks.scrutiny import examine


def _mutated(data: bytes, longest: int, seed: int) -> bytes:
    """Mostly one that knows a slice's form; now and then libFuzzer's own, which knows what was compared with what."""
    chance = Random(seed)
    changed: bytes = atheris.Mutate(data, longest) if chance.random() < 0.2 else mutate(data, chance)
    return changed[:longest]


def main() -> None:
    """Fuzz until libFuzzer has enough, or has found something."""
    with tempfile.NamedTemporaryFile(prefix="hlora-fuzz-") as file:
        place = Path(file.name)

        def one(data: bytes) -> None:
            examine(data, place)

        # libFuzzer starts itself again to choose what is worth keeping, by the first word, in a shell.
        atheris.Setup([f"{shlex.quote(sys.executable)} -m benchmarks.fuzzing", *sys.argv[1:]], one, custom_mutator=_mutated)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
