"""How many may be connected at once, and what is said when no more may."""

from __future__ import annotations

import os
import re
import resource
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from coordinator.stores import room
from protocol import errors

ROOT = Path(__file__).parents[2]
FEW = 64  # files that the coordinator's process may have open, unless it asks for more


@contextmanager
def serving_from(folder: Path) -> Iterator[int]:
    """The port of a coordinator whose process was allowed few files."""
    command = shlex.join([sys.executable, "-m", "coordinator", "serve", "--port", "0"])
    own = {"HLORA_COORDINATOR_DATA": str(folder), "HLORA_COORDINATOR_EXECUTOR": "threads://1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(["sh", "-c", f"ulimit -Sn {FEW} && exec {command}"], cwd=ROOT, env=os.environ | own, stderr=log)
    try:
        end = time.monotonic() + 60
        while (found := re.search(r"http://127\.0\.0\.1:(\d+)", (folder / "log").read_text())) is None:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end
            time.sleep(0.05)
        yield int(found[1])
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
def test_more_may_be_connected_than_a_process_is_allowed_unasked(tmp_path: Path) -> None:
    with serving_from(tmp_path) as port, ExitStack() as open:
        for _ in range(2 * FEW):
            connection = open.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
    assert "files-allowed" in (tmp_path / "log").read_text()


@contextmanager
def no_more_files() -> Iterator[None]:
    """This process may open none."""
    with open(os.devnull) as last:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (last.fileno(), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_where_no_more_files_may_be_open_it_is_said_that_this_passes() -> None:
    with (
        pytest.raises(errors.Unavailable, match="as many files and connections open as it may; try again") as caught,
        room(),
        no_more_files(),
    ):
        open(os.devnull).close()

    assert caught.value.retryable
    assert not isinstance(caught.value, errors.InsufficientStorage)
