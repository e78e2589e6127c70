"""The loop that carries runs forward: `tick()` looks once at everything that is due, `run()` looks for ever.

All state is in the database and the blob store. A tick may be killed anywhere and repeated by anybody; a bug in one run
is written down with that run and does not stop the others. Any number of conductors may share a database: a run is
advanced by one at a time, and a round is merged by whoever claims it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from datetime import datetime

import structlog
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from coordinator import outage, publishing, runs
from coordinator.assembly import Merged
from coordinator.bell import Bell
from coordinator.blobs import Blobs
from coordinator.database import Database
from coordinator.initial import first_adapter
from coordinator.merge import RoundTask, merge_round
from coordinator.publishing import Claim
from coordinator.stores import room
from protocol.crash import Point
from protocol.errors import HLoRAError, Unavailable
from protocol.plan import Plan

log = structlog.get_logger()
SHARE = 0.05  # of a processor that looks may take: most of it is left to those who answer a fleet that calls all the time
GLANCE = 0.05  # seconds between two looks, during a rest, whether a round has all its answers
PUBLISHING = (0.1, 0.5, 2.0, 5.0, 10.0)  # seconds between the attempts to publish a round while the database is away
BRIEF = 0.05  # processor seconds that they may take at once before a rest follows


class Conductor:
    """Opens, fills, closes, merges and publishes the rounds of all running runs."""

    def __init__(self, database: Database, blobs: Blobs, executor: Executor, bell: Bell, *, pace: float) -> None:
        self._database, self._blobs, self._executor, self._bell, self._pace = database, blobs, executor, bell, pace
        self._merged = threading.Event()  # a round was merged, and nobody has looked since

    def tick(self) -> bool:
        """Look once at everything that is due; says whether something was merged, so that the next look is worth its while."""
        with self._database.read() as session:
            now = self._database.clock(session)
        self._advance_all(now)
        return self._merge_all()

    def _advance_all(self, now: datetime) -> None:
        """Let every run see the same time: however long the look takes, nothing ends that had not ended when it began."""
        with self._database.read() as session:
            due = runs.alive(session)
        for run in due:
            self._advance(run, now)

    def _advance(self, run: str, now: datetime) -> None:
        try:
            with self._database.write() as session:
                woken = runs.advance(session, run, now, self._pace)
        except OperationalError:
            raise
        except Exception as error:  # a defect that one run meets must not stop the others
            log.exception("advance-failed", run=run)
            with self._database.write() as session:
                runs.fail(session, run, _words(error), now)
        else:
            self._bell.ring(woken)

    def run(self, stop: threading.Event, longest_pause: float) -> None:
        """Tick until told to stop, merging in a thread beside: other runs go on meanwhile. A merge that has begun is finished."""
        closed = threading.Event()
        merging = threading.Thread(target=self._merge_on, args=(stop, closed, longest_pause), name="merging")
        merging.start()
        ahead, before = 0.0, time.monotonic()  # processor seconds that were taken beyond the share, up to that time
        while not stop.is_set():
            self._merged.clear()
            began = time.thread_time()  # not the clock: a look that waited for others to work would make them wait in turn
            self._attend(self._look)
            closed.set()
            now = time.monotonic()
            ahead = max(0.0, ahead - SHARE * (now - before)) + time.thread_time() - began
            before = now
            if ahead > BRIEF:
                self._rest(stop, min(longest_pause, (ahead - BRIEF) / SHARE))
            self._bell.await_conductor_call(min(longest_pause, outage.BEAT.total_seconds()))
        closed.set()
        merging.join()

    def _rest(self, stop: threading.Event, seconds: float) -> None:
        """Leave the processor to others, but not while a round only waits to be closed, or to be followed by the next."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._merged.is_set() and not stop.wait(min(left, GLANCE)):
            if self._attend(self._answered):
                return

    def _answered(self) -> bool:
        with self._database.read() as session:
            return runs.answered(session)

    def _look(self) -> bool:
        """One look of the live loop: before anything can be overdue, time in which nobody was at work is given back."""
        with self._database.read() as session:
            now = self._database.clock(session)
            late = outage.late(session, now)
        if late:
            with self._database.write(Point.beat_committed) as session:
                outage.beat(session, now)
        self._advance_all(now)
        return False

    def _merge_on(self, stop: threading.Event, closed: threading.Event, longest_pause: float) -> None:
        """Merge what is due, one round at a time, until told to stop."""
        while not stop.is_set():
            closed.clear()
            if self._attend(lambda: self._merge_all(stop)):
                self._merged.set()
                self._bell.ring_conductor()
            else:
                closed.wait(longest_pause)

    def _attend(self, look: Callable[[], bool]) -> bool:
        """What a look says; nothing stops the loop. A database that is away, or a full disk, is waited for."""
        try:
            return look()
        except (SQLAlchemyError, Unavailable) as error:
            log.warning("conductor-waits", reason=str(error.__cause__ or error))
        except Exception:  # whatever it is: a coordinator without conductor would answer, and never do anything again
            log.exception("tick-failed")
        return False

    def _merge_all(self, stop: threading.Event | None = None) -> bool:
        with self._database.read() as session:
            waiting = publishing.due(session, self._database.clock(session))
        trouble: Unavailable | None = None
        for round_id in waiting:
            with self._database.write(Point.merge_claimed) as session:
                claim = publishing.claim(session, round_id, self._database.clock(session))
            try:
                if claim is not None and stop is not None and stop.is_set():
                    self._give_back(claim)
                elif claim is not None:
                    self._merge(claim)
            except Unavailable as error:  # of one blob, perhaps: the rounds behind it are tried
                trouble = error
        if trouble is not None:
            raise trouble
        return bool(waiting)

    def _give_back(self, claim: Claim, reason: str | None = None) -> None:
        with self._database.write() as session:
            publishing.give_back(session, claim, self._database.clock(session), reason)

    def _merge(self, claim: Claim) -> None:
        began = time.monotonic()
        try:
            with self._database.read() as session:
                task = publishing.task(session, claim, self._blobs.url)
            with self._holding(claim):
                merged = self._carry_out(task)
                woken = self._publish(claim, task, merged, time.monotonic() - began)
        except OperationalError:
            raise
        except Unavailable as error:
            self._give_back(claim, error.detail)  # the round is not to blame; it is merged when there is room, or the store answers
            raise
        except Exception as error:
            log.exception("merge-failed", round=claim.round_id)
            with self._database.write() as session:
                publishing.fail(session, claim, _words(error), self._database.clock(session), tries=publishing.tries(error))
        else:
            self._bell.ring(woken)

    def _carry_out(self, task: RoundTask | Plan) -> Merged:
        with room():
            return first_adapter(task, self._blobs) if isinstance(task, Plan) else merge_round(task, self._executor, self._blobs)

    def _publish(self, claim: Claim, task: RoundTask | Plan, merged: Merged, seconds: float) -> list[str]:
        """Again where the database is away: a merge is not done anew for that. Twice is once, by the claim."""
        for attempt, pause in enumerate(PUBLISHING):
            with suppress(OperationalError):
                woken = self._published(claim, task, merged, seconds)
                if attempt and not woken:  # an earlier commit was carried out, perhaps, and only its answer lost
                    self._bell.wake_everybody()
                return woken
            log.warning("publishing-waits", round=claim.round_id, seconds=pause)
            time.sleep(pause)
        return self._published(claim, task, merged, seconds)

    def _published(self, claim: Claim, task: RoundTask | Plan, merged: Merged, seconds: float) -> list[str]:
        with self._database.write() as session:
            return publishing.publish(session, self._blobs, claim, task, merged, seconds, self._database.clock(session), self._pace)

    @contextmanager
    def _holding(self, claim: Claim) -> Iterator[None]:
        """Prolong the claim beside the merge, however long that takes."""
        done = threading.Event()

        def prolong() -> None:
            while not done.wait(publishing.CLAIM.total_seconds() / 3):
                # A claim that is lost meanwhile, because the database was away, is noticed when the round is published.
                with suppress(SQLAlchemyError), self._database.write() as session:
                    publishing.prolong(session, claim, self._database.clock(session))

        thread = threading.Thread(target=prolong, name="claim", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _words(error: Exception) -> str:
    """What an operator is told of a failure; the log has the rest."""
    return str(error) if isinstance(error, HLoRAError) else f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
