"""What is said of the machine beside every number."""

from __future__ import annotations

import os
import platform
from pathlib import Path

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
