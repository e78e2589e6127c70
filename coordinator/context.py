"""What a request may need, built once by the application."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Executor
from dataclasses import dataclass, field

from coordinator.arrivals import Arrivals
from coordinator.bell import Bell
from coordinator.blobs import Blobs
from coordinator.conductor import Conductor
from coordinator.database import Database
from coordinator.desk import Desk
from coordinator.housekeeping import Housekeeping
from coordinator.quarantine import Quarantine
from coordinator.settings import Settings


@dataclass(frozen=True)
class Context:
    """The coordinator's parts."""

    settings: Settings
    database: Database
    blobs: Blobs
    executor: Executor
    bell: Bell
    desk: Desk
    conductor: Conductor
    quarantine: Quarantine
    arrivals: Arrivals | None  # where blobs lie in no object store there are none
    housekeeping: Housekeeping
    sending: Counter[str] = field(default_factory=Counter)  # by client, the slices whose bytes are coming

    def close(self) -> None:
        """Let go of workers and connections."""
        self.executor.shutdown(wait=True, cancel_futures=True)
        self.database.close()
