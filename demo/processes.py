"""The processes of the demonstration: each with a log of its own, watched, and stopped whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from protocol import errors

ROOT = Path(__file__).resolve().parents[1]
GRACE_SECONDS = 20.0  # between asking a process to stop and killing it
LAST_LINES = 15
PAUSE_SECONDS = 0.1
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Child:
    """A running command of the project. One that lasts ends only because it is stopped, or because something is wrong."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path | None
    lasting: bool

    def check(self) -> None:
        """Raise Unavailable, with the end of its log, if the process ended and should not have, or ended badly."""
        code = self.process.poll()
        if self.log is None or code is None or (code == 0 and not self.lasting):
            return
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = "\n  ".join(lines[-LAST_LINES:]) or "nothing"
        raise errors.Unavailable(f"{self.name} ended with code {code}; the last that it said, in {self.log}:\n  {said}")


@dataclass
class Processes:
    """All children, and the time by which they must be done."""

    logs: Path
    deadline: float  # of time.monotonic()
    environment: Mapping[str, str]
    children: list[Child] = field(default_factory=list)

    def start(self, name: str, module: str, *arguments: str, environment: Mapping[str, str], lasting: bool = True) -> Child:
        """Start `python -m MODULE ARGUMENTS`; what it says goes to its log."""
        log = self.logs / f"{name}.log"
        with log.open("ab") as sink:
            child = Child(name, self._popen(module, arguments, environment, sink.fileno(), subprocess.STDOUT), log, lasting)
        self.children.append(child)
        return child

    def finish(self, children: Sequence[Child]) -> None:
        """Wait until all of these have ended. Raises Unavailable if one fails."""
        self.wait(lambda: all(child.process.poll() is not None for child in children), ", ".join(child.name for child in children))
        for child in children:
            child.check()
            self.children.remove(child)

    def show(self, screen: IO[str], module: str, *arguments: str, environment: Mapping[str, str]) -> None:
        """Run a command on the screen, to its end, while watching the children."""
        screen.flush()
        shown = Child(module, self._popen(module, arguments, environment, screen.fileno(), None), None, lasting=False)
        self.children.append(shown)
        self.finish([shown])

    def answer(self, module: str, *arguments: str, environment: Mapping[str, str]) -> bytes:
        """What `python -m MODULE ARGUMENTS` prints. Raises Unavailable if it fails."""
        command = f"python -m {module} {' '.join(arguments)}"
        try:
            return subprocess.run(
                self._command(module, arguments),
                env=self._whole(environment),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=True,
                timeout=max(1.0, self._left()),
            ).stdout
        except subprocess.CalledProcessError as error:
            raise errors.Unavailable(
                f"{command} ended with code {error.returncode}: {error.stderr.decode(errors='replace').strip()}"
            ) from None
        except subprocess.TimeoutExpired:
            raise errors.Unavailable(f"the time is up while waiting for {command}; --minutes gives more") from None

    def wait(self, done: Callable[[], bool], what: str, pause: float = PAUSE_SECONDS) -> None:
        """Ask again and again, until something is done. Raises Unavailable if a child fails before, or when the time is up."""
        while not done():
            for child in self.children:
                child.check()
            if self._left() <= 0:
                raise errors.Unavailable(f"the time is up while waiting for {what}; --minutes gives more")
            time.sleep(pause)

    def stop(self) -> None:
        """Ask every child to stop, the coordinator last; kill what does not."""
        for child in reversed(self.children):
            if child.process.poll() is None:
                child.process.terminate()
        until = time.monotonic() + GRACE_SECONDS
        for child in self.children:
            try:
                child.process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()

    def _left(self) -> float:
        return self.deadline - time.monotonic()

    def _popen(
        self, module: str, arguments: Sequence[str], environment: Mapping[str, str], out: int | None, err: int | None
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._command(module, arguments), env=self._whole(environment), stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )

    def _command(self, module: str, arguments: Sequence[str]) -> list[str]:
        return [sys.executable, "-m", module, *arguments]

    def _whole(self, environment: Mapping[str, str]) -> dict[str, str]:
        # What the user has set for a federation of their own is not for this one.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HLORA_")}
        path = os.pathsep.join(part for part in (str(ROOT), inherited.get("PYTHONPATH", "")) if part)
        return {**inherited, "PYTHONPATH": path, **ENVIRONMENT, **self.environment, **environment}


@contextmanager
def processes(logs: Path, seconds: float, environment: Mapping[str, str]) -> Iterator[Processes]:
    """Children that are stopped when the context ends, by whatever: its end, an error, Ctrl-C, SIGTERM, a closed terminal."""
    children = Processes(logs, time.monotonic() + seconds, environment)
    before = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield children
    finally:
        children.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)
