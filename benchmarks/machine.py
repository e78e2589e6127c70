"""What is said of the machine beside every number."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from pydantic import BaseModel


class Machine(BaseModel):
    """Where a number comes from."""

    processor: str
    cores: int
    threads: int
    python: str
    torch: str


def this_machine() -> Machine:
    """The machine that runs this."""
    return Machine(
        processor=_processor(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
    )


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text("utf-8").splitlines() if facts.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


@dataclass(frozen=True)
class Rates:
    """What one thread of this machine reaches: the best of a few tries."""

    bytes_per_second: float  # summing float32 that lie in memory
    flops_per_second: float  # multiplying float32 matrices of 1024 × 1024

    @classmethod
    def measured(cls) -> Self:
        """Measure them now, in about half a second."""
        long, square = torch.ones(16 << 20), torch.ones(1024, 1024)
        return cls(long.nbytes / _fastest(long.sum), 2 * 1024**3 / _fastest(lambda: square @ square))


def _fastest(work: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def resident_bytes() -> int | None:
    """What this process has in memory; none where the system does not say."""
    return _status("VmRSS")


def peak_bytes() -> int | None:
    """The most that it had since `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Begin to look for the peak anew, where the system can."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")


def _status(field: str) -> int | None:
    path = Path("/proc/self/status")
    found = re.search(rf"^{field}:\s+(\d+) kB", path.read_text("utf-8"), re.MULTILINE) if path.exists() else None
    return None if found is None else 1024 * int(found[1])
