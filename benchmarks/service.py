"""A real coordinator for benchmarks: its own process over a database and a folder, and what it costs the machine."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from benchmarks import postgres
from protocol import errors

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 60.0  # to import everything on a machine with much to do
GRACE_SECONDS = 60.0


@dataclass(frozen=True)
class Service:
    """A running coordinator, and its database's first process where it has any."""

    process: psutil.Process
    url: str
    operator: httpx.Client  # with an administrator's token
    database: psutil.Process | None = None

    def resident_bytes(self) -> int:
        """What the coordinator has in memory."""
        return int(self.process.memory_info().rss)

    def seconds(self) -> float:
        """Processor seconds of the coordinator so far."""
        return processor_seconds([self.process])

    def database_seconds(self) -> float:
        """Processor seconds of the database's server so far, those of its processes that have ended, too."""
        if self.database is None:
            return 0.0
        ended = self.database.cpu_times()
        return float(ended.children_user + ended.children_system) + processor_seconds(
            [self.database, *self.database.children(recursive=True)]
        )


def processor_seconds(processes: Sequence[psutil.Process]) -> float:
    """Processor seconds of these processes so far."""
    times = [process.cpu_times() for process in processes if process.is_running()]
    return sum(float(spent.user + spent.system) for spent in times)


@contextmanager
def database(kind: str, folder: Path) -> Iterator[tuple[str, Path | None]]:
    """The URL of a new, durable database of a kind, and the folder of its server where it has one. Raises InvalidRequest, Unavailable."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'hlora.sqlite'}", None
        return
    programs = postgres.binaries()
    if kind != "postgresql" or programs is None:
        raise errors.InvalidRequest(f"{kind} cannot be started here; sqlite, and postgresql where its server is installed, can")
    with postgres.running(programs, folder=folder) as server, server.database() as url:
        yield url, server.folder


@contextmanager
def serving(folder: Path, url: str, server: Path | None = None, **settings: str) -> Iterator[Service]:
    """A coordinator over that database, its data in that folder, until the block ends. Raises Unavailable if it does not start."""
    told = {f"HLORA_COORDINATOR_{name.upper()}": value for name, value in settings.items()}
    # Nothing of this process's own settings goes in: the numbers shall not depend on them.
    environment = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder),
        "HLORA_COORDINATOR_DATA": str(folder / "data"),
        "HLORA_COORDINATOR_DATABASE_URL": url,
        "HLORA_COORDINATOR_LOG_JSON": "true",
        **told,
    }
    command = [sys.executable, "-m", "coordinator"]
    subprocess.run([*command, "migrate"], env=environment, capture_output=True, check=True, timeout=START_SECONDS)
    made = subprocess.run(
        [*command, "token", "benchmark", "--json"], env=environment, capture_output=True, check=True, timeout=START_SECONDS
    )
    log = folder / "coordinator.log"
    with log.open("wb") as sink:
        child = subprocess.Popen([*command, "serve", "--port", "0"], env=environment, stdin=subprocess.DEVNULL, stderr=sink)
    try:
        at = _listening(child, log)
        with httpx.Client(base_url=at, headers={"Authorization": f"Bearer {json.loads(made.stdout)['token']}"}, timeout=120) as operator:
            yield Service(psutil.Process(child.pid), at, operator, _of_server(server))
    finally:
        child.terminate()
        try:
            child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _listening(child: subprocess.Popen[bytes], log: Path) -> str:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and child.poll() is None:
        for line in log.read_text("utf-8").splitlines():
            if line.startswith("{") and '"listening"' in line:
                return str(json.loads(line)["url"])
        time.sleep(0.1)
    raise errors.Unavailable(f"the coordinator did not start: {log.read_text('utf-8')[-2000:]}")


def _of_server(folder: Path | None) -> psutil.Process | None:
    return None if folder is None else psutil.Process(int((folder / "data" / "postmaster.pid").read_text().split()[0]))


@contextmanager
def workplace(folder: Path | None) -> Iterator[Path]:
    """A fresh folder that is gone when the block ends: in that one, or where temporary files are."""
    with tempfile.TemporaryDirectory(prefix="hlora-bench-", dir=folder) as name:
        Path(name).chmod(0o755)  # a database server may run as somebody else
        yield Path(name)


def file_system(folder: Path) -> str:
    """The kind of file system that a folder lies on."""
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    return next((mounts[parent] for parent in (folder.resolve(), *folder.resolve().parents) if parent in mounts), "unknown")
