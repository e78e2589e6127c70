"""Who used the processors meanwhile: a number means little without what else the machine did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic

import psutil
from pydantic import BaseModel

from benchmarks.service import Service, processor_seconds


class Load(BaseModel):
    """Cores that were busy meanwhile, two being all of a machine with two."""

    seconds: float
    coordinator: float
    database: float
    agents: float  # the process that plays them
    others: float  # whatever else ran on the machine


@dataclass
class Meter:
    """Looks at processors while a block lasts."""

    service: Service
    found: list[Load] = field(default_factory=list)

    @contextmanager
    def running(self) -> Iterator[None]:
        before = self._now()
        yield
        seconds, coordinator, database, agents, all_of_it = (after - then for after, then in zip(self._now(), before, strict=True))
        ours = coordinator + database + agents
        shares = {"coordinator": coordinator, "database": database, "agents": agents, "others": max(0.0, all_of_it - ours)}
        self.found.append(Load(seconds=seconds, **{name: spent / seconds for name, spent in shares.items()}))

    def _now(self) -> tuple[float, ...]:
        machine = psutil.cpu_times()
        busy = sum(machine) - machine.idle - getattr(machine, "iowait", 0.0) - getattr(machine, "guest", 0.0)
        return monotonic(), self.service.seconds(), self.service.database_seconds(), processor_seconds([psutil.Process()]), busy
