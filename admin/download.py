"""Long answers, written down while they come; whoever waits at a terminal sees how far they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn


@dataclass(frozen=True)
class Download:
    """An answer that is on its way."""

    size: int | None  # bytes; none where nobody said how long it is
    pieces: Iterator[bytes]


def save(download: Download, file: BinaryIO) -> None:
    """Write the answer as it comes. How far it is goes to the standard error, if that is a terminal, and is gone at the end."""
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=download.size)
        for piece in download.pieces:
            file.write(piece)
            progress.advance(task, len(piece))
