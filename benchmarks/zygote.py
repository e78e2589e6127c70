"""Processes that start at once: one that has imported everything forks, and each child is a coordinator or an agent.

It has no thread and has multiplied nothing before it forks: a child of such a process may hang. It answers one JSON line with
another: an order is answered with the child's id, `{"kill": id}` with its exit code when it is gone for good, and
`{"ended": 0}` with those that ended by themselves. It is the parent of all, so no id stands for somebody else before it has
said so; and all end with it, whoever started it.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.victims import Order, become
from protocol import errors

ROOT = Path(__file__).resolve().parents[1]


class Zygote:
    """The forking process, seen from whoever gives the orders; a context."""

    def __init__(self, folder: Path) -> None:
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(folder), "HOME": str(folder)}
        with (folder / "zygote.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.zygote"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._log = folder / "zygote.log"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None, "it was started with a pipe"
        self._process.stdin.close()
        self._process.wait()

    def start(self, order: Order, *, fresh: bool = False) -> int:
        """Start a process; `fresh` in an interpreter of its own, which has to import everything. Gives its id."""
        return int(self._ask({"order": order.model_dump(mode="json"), "fresh": fresh}))

    def kill(self, process: int) -> bool:
        """`kill -9`; it is gone when this returns. False if it had ended by itself."""
        return int(self._ask({"kill": process})) == -signal.SIGKILL

    def ended(self) -> list[int]:
        """The processes that have ended by themselves since this was asked last."""
        return [int(process) for process in self._ask({"ended": 0}).split()]

    def _ask(self, request: object) -> str:
        assert self._process.stdin is not None, "it was started with pipes"
        assert self._process.stdout is not None, "it was started with pipes"
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self._process.stdout.readline()
        if not answer.endswith("\n"):
            raise errors.Unavailable(f"the process that starts the others has ended: {self._log.read_text('utf-8')[-2000:]}")
        return answer


def _fork(order: Order, fresh: bool) -> int:  # pragma: no cover: in the process that forks
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with order.log.open("ab") as log, Path(os.devnull).open("rb") as nothing:
            os.dup2(nothing.fileno(), 0)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        if fresh:
            os.execv(sys.executable, [sys.executable, "-m", "benchmarks.victims", order.model_dump_json()])
        random.seed()
        become(order)
        code = 0
    except Exception:
        logging.exception("%s failed", order.name)
    finally:
        os._exit(code)  # never on as if it were its parent


def _kill(child: int) -> int:  # pragma: no cover: in the process that forks
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _ended(children: set[int]) -> set[int]:  # pragma: no cover: in the process that forks
    return {child for child in children if os.waitpid(child, os.WNOHANG)[0]}


def main() -> None:  # pragma: no cover: in the process that forks
    """Take orders until nobody gives any more."""
    gc.freeze()
    children: set[int] = set()
    for line in sys.stdin:
        match json.loads(line):
            case {"order": order, "fresh": fresh}:
                child = _fork(Order.model_validate(order), fresh)
                children.add(child)
                answer = str(child)
            case {"kill": child}:
                children.remove(child)
                answer = str(_kill(child))
            case _:
                gone = _ended(children)
                children -= gone
                answer = " ".join(map(str, gone))
        print(answer, flush=True)
    for child in children:
        _kill(child)


if __name__ == "__main__":
    main()
