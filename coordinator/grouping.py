"""Many small writes in one transaction: whoever has the turn also does what waits.

Making a transaction durable takes longer than the few statements in it. A write is put on a list, then waits for the turn;
by the time it has it, somebody else may have done it together with their own. Who is told that it is done is told after the
commit, as if it had been alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from sqlalchemy.orm import Session, sessionmaker

from protocol import crash, errors

T = TypeVar("T")
LARGEST = 50  # writes in one transaction


@dataclass
class Task(Generic[T]):
    """A write that waits, and what came of it."""

    work: Callable[[Session], T]
    point: crash.Point | None
    value: T | None = None
    error: BaseException | None = None
    done: bool = False

    def result(self) -> T:
        """What the work gave. Raises what it raised."""
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]  # a value of T once it is done; T may be None


class Group:
    """The writes that wait for one database, and the turn."""

    def __init__(self, writers: sessionmaker[Session], turn: threading.Lock) -> None:
        self._writers, self._turn = writers, turn
        self._list = threading.Lock()
        self._waiting: list[Task[object]] = []

    def do(self, work: Callable[[Session], T], point: crash.Point | None) -> T:
        """The work in a transaction with whatever else waits; it may be done twice, and only the second time is committed then."""
        task = Task(work, point)
        with self._list:
            self._waiting.append(task)  # type: ignore[arg-type]  # a task of T is a task of something
        with self._turn:
            while not task.done:
                self._carry_out(self._take())
        return task.result()

    def _take(self) -> list[Task[object]]:
        with self._list:
            taken, self._waiting = self._waiting[:LARGEST], self._waiting[LARGEST:]
        return taken

    def _carry_out(self, tasks: list[Task[object]]) -> None:
        try:
            self._commit(tasks)
        except BaseException as error:  # noqa: BLE001  # each hears of its own, from its own thread
            if len(tasks) > 1:  # what fails for one shall not fail for the others
                for task in tasks:
                    self._carry_out([task])
                return
            tasks[0].error = error
        for task in tasks:
            task.done = True

    def _commit(self, tasks: list[Task[object]]) -> None:
        with self._writers.begin() as session:
            for task in tasks:
                _attempt(session, task)
        for reached in (*session.info.get("events", ()), *(task.point for task in tasks if task.point and task.error is None)):
            crash.reached(reached)


def _attempt(session: Session, task: Task[object]) -> None:
    """The work as if it were alone: a refusal undoes what it wrote, and is told to nobody else. Raises any other failure."""
    recorded = len(session.info.get("events", ()))
    task.error = None
    try:
        with session.begin_nested():
            task.value = task.work(session)
    except errors.HLoRAError as refusal:
        task.error = refusal
        del session.info.get("events", [])[recorded:]
        session.expire_all()
