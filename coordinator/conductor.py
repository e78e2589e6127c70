"""The loop that carries runs forward: `tick()` looks once at everything that is due, `run()` looks for ever.

All state is in the database and the blob store. A tick may be killed anywhere and repeated by anybody; a bug in one run
is written down with that run and does not stop the others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager

import structlog
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from coordinator import publishing, runs
from coordinator.assembly import Merged
from coordinator.bell import Bell
from coordinator.blobs import Blobs
from coordinator.database import Database
from coordinator.initial import first_adapter
from coordinator.merge import RoundTask, merge_round
from coordinator.publishing import Claim
from protocol.errors import HLoRAError
from protocol.plan import Plan

log = structlog.get_logger()


class Conductor:
    """Opens, fills, closes, merges and publishes the rounds of all running runs."""

    def __init__(self, database: Database, blobs: Blobs, executor: Executor, bell: Bell, *, pace: float) -> None:
        self._database, self._blobs, self._executor, self._bell, self._pace = database, blobs, executor, bell, pace

    def tick(self) -> bool:
        """Look once at everything that is due; says whether something was merged, so that the next look is worth its while."""
        with self._database.read() as session:
            due = runs.alive(session)
        for run in due:
            self._advance(run)
        return self._merge_all()

    def _advance(self, run: str) -> None:
        try:
            with self._database.write() as session:
                woken = runs.advance(session, run, self._database.clock(session), self._pace)
        except OperationalError:
            raise
        except Exception as error:  # a defect that one run meets must not stop the others
            log.exception("advance-failed", run=run)
            with self._database.write() as session:
                runs.fail(session, run, _words(error), self._database.clock(session))
        else:
            self._bell.ring(woken)

    def run(self, stop: threading.Event, longest_pause: float) -> None:
        """Tick until told to stop. A database that is away for a while is waited for."""
        while not stop.is_set():
            try:
                busy = self.tick()
            except SQLAlchemyError as error:
                log.warning("conductor-waits", reason=str(error.__cause__ or error))
                busy = False
            except Exception:  # whatever it is: a coordinator without conductor would answer, and never do anything again
                log.exception("tick-failed")
                busy = False
            if not busy:
                self._bell.await_conductor_call(longest_pause)

    def _merge_all(self) -> bool:
        with self._database.read() as session:
            waiting = publishing.due(session, self._database.clock(session))
        for round_id in waiting:
            with self._database.write() as session:
                claim = publishing.claim(session, round_id, self._database.clock(session))
            if claim is not None:
                self._merge(claim)
        return bool(waiting)

    def _merge(self, claim: Claim) -> None:
        began = time.monotonic()
        try:
            with self._database.read() as session:
                task = publishing.task(session, claim, self._blobs.url)
            with self._holding(claim):
                merged = self._carry_out(task)
            with self._database.write() as session:
                now = self._database.clock(session)
                woken = publishing.publish(session, self._blobs, claim, task, merged, time.monotonic() - began, now, self._pace)
        except OperationalError:
            raise
        except Exception as error:
            log.exception("merge-failed", round=claim.round_id)
            with self._database.write() as session:
                publishing.fail(session, claim, _words(error), self._database.clock(session))
        else:
            self._bell.ring(woken)

    def _carry_out(self, task: RoundTask | Plan) -> Merged:
        return first_adapter(task, self._blobs) if isinstance(task, Plan) else merge_round(task, self._executor, self._blobs)

    @contextmanager
    def _holding(self, claim: Claim) -> Iterator[None]:
        """Prolong the claim beside the merge, however long that takes."""
        done = threading.Event()

        def prolong() -> None:
            while not done.wait(publishing.CLAIM.total_seconds() / 3):
                with self._database.write() as session:
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
