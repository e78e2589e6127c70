"""PEFT folders as the coordinator writes them, from an adapter's bytes."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from coordinator import adapters
from coordinator.cards import Facts
from coordinator.reading import SliceReader
from coordinator.readout import Wanted
from protocol.contents import read_header
from protocol.plan import Plan


def files(plan: Plan, facts: Facts, adapter: bytes, wanted: Wanted) -> dict[str, bytes]:
    """The folder's files by name."""
    reader = SliceReader(read_header(adapter, len(adapter)), lambda start, stop: bytearray(adapter[start:stop]))
    with TemporaryDirectory() as folder:
        adapters.write(plan, facts, reader, wanted, Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}
