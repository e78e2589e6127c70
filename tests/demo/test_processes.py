"""Processes: each with its log, watched, and stopped whatever happens. The children here are modules of Python's own."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.processes import ROOT, Child, Processes, processes
from protocol import errors

SERVER = ("http.server", "0", "--bind", "127.0.0.1")  # runs until it is stopped
PATIENCE = 60.0  # seconds; an outer bound, nothing is measured by it


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Processes]:
    with processes(tmp_path, PATIENCE, {}) as found:
        yield found


def alive(child: Child) -> bool:
    return child.process.poll() is None


def test_children_end_with_the_context(tmp_path: Path) -> None:
    with processes(tmp_path, PATIENCE, {}) as children:
        one, two = (children.start(name, *SERVER, environment={}) for name in ("one", "two"))
        assert alive(one)
        assert alive(two)
    assert not alive(one)
    assert not alive(two)


def test_children_end_when_something_fails(tmp_path: Path) -> None:
    started: list[Child] = []

    def fail() -> None:
        with processes(tmp_path, PATIENCE, {}) as children:
            started.append(children.start("one", *SERVER, environment={}))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not alive(started[0])


def test_a_child_that_dies_is_named_with_its_last_words(children: Processes) -> None:
    children.start("sales", "json.tool", "/nowhere", environment={})
    with pytest.raises(errors.Unavailable, match=r"sales ended with code [12]; the last that it said, in .*sales.log:(.|\n)*/nowhere"):
        children.wait(lambda: False, "nothing")


def test_a_lasting_child_may_not_end_even_well(children: Processes) -> None:
    children.start("sales", "json.tool", "--help", environment={})
    with pytest.raises(errors.Unavailable, match="sales ended with code 0"):
        children.wait(lambda: False, "nothing")


def test_a_child_that_does_one_thing_may_end_well(children: Processes) -> None:
    child = children.start("sales", "json.tool", "--help", environment={}, lasting=False)
    children.finish([child])
    assert children.children == []
    assert "usage" in (children.logs / "sales.log").read_text()


def test_the_time_is_limited(tmp_path: Path) -> None:
    with pytest.raises(errors.Unavailable, match="the time is up while waiting for the harvest"), processes(tmp_path, 0.0, {}) as children:
        children.wait(lambda: False, "the harvest")


def test_a_command_answers_with_what_it_prints(children: Processes) -> None:
    assert b"usage" in children.answer("json.tool", "--help", environment={})


def test_a_command_that_fails_is_told_with_its_reason(children: Processes) -> None:
    with pytest.raises(errors.Unavailable, match=r"python -m json.tool /nowhere ended with code [12]: (.|\n)*/nowhere"):
        children.answer("json.tool", "/nowhere", environment={})


def test_a_command_that_never_answers_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(errors.Unavailable, match="the time is up"), processes(tmp_path, 0.0, {}) as children:
        children.answer(*SERVER, environment={})


def test_a_command_is_shown_on_the_screen(children: Processes, tmp_path: Path) -> None:
    with (tmp_path / "screen").open("w+") as screen:
        screen.write("before\n")
        children.show(screen, "json.tool", "--help", environment={})
    assert (tmp_path / "screen").read_text().startswith("before\nusage")


def test_a_shown_command_may_end_with_any_code(children: Processes, tmp_path: Path) -> None:
    with (tmp_path / "screen").open("w") as screen:
        children.show(screen, "json.tool", "/nowhere", environment={})
    assert children.children == []


DEMONSTRATION = """
import pathlib, sys, time
from demo.processes import processes
with processes(pathlib.Path(sys.argv[1]), 60, {}) as children:
    child = children.start("one", *sys.argv[2:], environment={})
    print(child.process.pid, flush=True)
    children.wait(lambda: False, "nothing")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_children_too(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", DEMONSTRATION, str(tmp_path), *SERVER]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    heard = functools.partial(signal.signal, number, signal.SIG_DFL)  # whoever runs the tests in the background may be deaf to it
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, preexec_fn=heard) as own:
        assert own.stdout is not None
        child = int(own.stdout.readline())
        own.send_signal(number)
        own.wait(PATIENCE)
    assert _gone(child)


def _gone(pid: int) -> bool:
    """Whether a process ends within our patience."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False
