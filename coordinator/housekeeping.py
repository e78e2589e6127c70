"""What is done every few minutes by one coordinator, whichever has the time: old things are given up, and their bytes deleted.

Every chore can be left at any point and done again, also by two at once: that one coordinator does them saves work, nothing
else. A chore that fails is written down and tried again next time; the others are done all the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, cast

import structlog
from sqlalchemy import CursorResult, or_, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from coordinator import events, parts, retention, sweeping
from coordinator.arrivals import Arrivals
from coordinator.blobs import Blobs
from coordinator.database import Database
from coordinator.quarantine import Quarantine
from coordinator.settings import Settings
from coordinator.tables import Housekept

log = structlog.get_logger()
EVENTS = 5000  # deleted in one transaction


class Housekeeping:
    """The chores of a coordinator, in the order in which one makes work for the next."""

    def __init__(self, database: Database, blobs: Blobs, quarantine: Quarantine, arrivals: Arrivals | None, settings: Settings) -> None:
        self._database, self._blobs, self._quarantine, self._settings = database, blobs, quarantine, settings
        self._arrivals = arrivals
        self._every = timedelta(seconds=settings.housekeeping_seconds)
        self._stop = threading.Event()
        self.swept = 0  # orphan blobs deleted by this process

    def run(self, stop: threading.Event) -> None:
        """Keep house whenever it is time, until told to stop; what has begun then is left for the next time."""
        self._stop = stop
        while not stop.wait(self._every.total_seconds() / 4):
            try:
                if self.due():
                    self.run_once()
            except SQLAlchemyError as error:
                log.warning("housekeeping-waits", reason=str(error.__cause__ or error))
            except Exception:  # whatever it is: without this thread nobody would keep house any more
                log.exception("housekeeping-failed")

    def due(self) -> bool:
        """Whether it is time and no other coordinator was first; whoever is told so does it."""
        with self._database.write() as session:
            now = self._database.clock(session)
            # In the future it lies only where the clock was set back: nobody waits until then.
            long_ago = or_(Housekept.at <= now - self._every, Housekept.at > now + self._every)
            turn = update(Housekept).where(long_ago).values(at=now).execution_options(synchronize_session=False)
            return cast(CursorResult[Any], session.execute(turn)).rowcount == 1

    def run_once(self) -> dict[str, int]:
        """Do every chore now; gives how many things each of them was about, without those that failed."""
        with self._database.read() as session:
            now = self._database.clock(session)
        chores: dict[str, Callable[[datetime], int]] = {
            "uploads": self._uploads,
            "rounds": self._rounds,
            "quarantined": self._quarantined,
            "events": self._events,
            "blobs": self._orphans,
            "files": self._files,
            "arrivals": self._arrived,
        }
        done: dict[str, int] = {}
        for name, chore in chores.items():
            if self._stop.is_set():
                break
            try:
                done[name] = chore(now)
            except Exception:
                log.exception("chore-failed", chore=name)
        log.info("house-kept", **done)
        return done

    def _uploads(self, now: datetime) -> int:
        with self._database.write() as session:
            return parts.sweep(session, now)

    def _rounds(self, now: datetime) -> int:
        keep = self._settings.keep_rounds
        return 0 if keep is None else self._repeat(lambda session: retention.forget(session, keep, now), retention.AT_ONCE)

    def _events(self, now: datetime) -> int:
        before = now - timedelta(days=self._settings.event_days)
        return self._repeat(lambda session: events.forget(session, before, EVENTS), EVENTS)

    def _repeat(self, step: Callable[[Session], int], most: int) -> int:
        """Do a step in one transaction after the other until it finds less than it can take at once; gives the sum."""
        total = 0
        while not self._stop.is_set():
            with self._database.write() as session:
                count = step(session)
            total += count
            if count < most:
                break
        return total

    def _quarantined(self, now: datetime) -> int:
        return self._quarantine.tidy(self._grace(now))

    def _orphans(self, now: datetime) -> int:
        blobs = size = 0
        for batch in sweeping.sweep(self._database, self._blobs, self._grace(now)):
            blobs, size = blobs + len(batch), size + sum(blob.bytes for blob in batch)
            self.swept += len(batch)
            if self._stop.is_set():
                break
        if blobs:
            with self._database.write() as session:
                events.record(session, now, "blobs-swept", blobs=blobs, bytes=size)
        return blobs

    def _files(self, _: datetime) -> int:
        return sweeping.clear(sweeping.leftovers(self._blobs, self._settings.spool_folder))

    def _arrived(self, now: datetime) -> int:
        return 0 if self._arrivals is None else self._arrivals.sweep(self._grace(now))

    def _grace(self, now: datetime) -> datetime:
        return now - timedelta(seconds=self._settings.sweep_grace_seconds)
