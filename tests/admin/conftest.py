"""The operator's command against the real coordinator: real HTTP over a socket, time and conductor in the test's hands."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog
import uvicorn
from fastapi import FastAPI
from pydantic import SecretStr
from typer.testing import CliRunner, Result

from admin.__main__ import app as command
from admin.client import Client
from tests.federation import Federation, make_plan, open_federation


@dataclass(frozen=True)
class Desk:
    """An operator's desk: a coordinator's address and a token."""

    federation: Federation
    url: str

    def run(self, *words: object, token: str | None = None, **environment: str) -> Result:
        """The command's exit code, standard output and standard error."""
        said = {"HLORA_URL": self.url, "HLORA_TOKEN": token or self.token} | environment
        return CliRunner().invoke(command, [str(word) for word in words], env=said)

    def say(self, *words: object, **environment: str) -> str:
        """The standard output of a command that must succeed."""
        result = self.run(*words, **environment)
        assert result.exit_code == 0, result.output
        return result.stdout

    def tell(self, *words: object) -> Any:
        """The JSON of a command that must succeed."""
        return json.loads(self.say(*words, "--json"))

    def refusal(self, *words: object, token: str | None = None, **environment: str) -> str:
        """The one line of a command that must fail."""
        result = self.run(*words, token=token, **environment)
        assert (result.exit_code, result.stdout) == (1, ""), result.output
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        return result.stderr.removeprefix("error: ").strip()

    @property
    def token(self) -> str:
        assert self.federation.admin.secret is not None
        return self.federation.admin.secret

    def client(self) -> Client:
        return Client(self.url, SecretStr(self.token))


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The application's address while it is served over a socket; its lifespan does not run, so nothing ticks by itself."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, lifespan="off", log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
            assert thread.is_alive(), "the server ended before it began"
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The coordinator logs to the standard output of this process, which is here the command's."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    yield
    structlog.reset_defaults()


@pytest.fixture
async def desk(sqlite_url: str, tmp_path: Path) -> AsyncIterator[Desk]:
    """A coordinator without clients and runs."""
    async with open_federation(sqlite_url, tmp_path / "coordinator") as federation:
        with served(federation.app) as url:
            yield Desk(federation, url)


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    """A resolved plan of two rounds, in a file."""
    file = tmp_path / "plan.json"
    file.write_text(make_plan().model_dump_json())
    return file
