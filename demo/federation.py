"""One federation from beginning to end, by the commands and routes that every user has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr
from rich.console import Console

from admin import words
from admin.client import Client
from demo.departments import Department
from demo.link import slow_link
from demo.machines import MACHINES, Machine, link_speed, write_policy
from demo.processes import Child, Processes
from protocol import errors
from protocol.plan import Plan
from protocol.states import RoundState, RunState
from protocol.views import EnrolmentRequest, RoundView, RunDetail

ENROLMENT_SECONDS = 600.0
LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Coordinator:
    """A running coordinator and the token of its operator."""

    url: str
    token: str

    @property
    def environment(self) -> dict[str, str]:
        """What the operator's command is told."""
        return {"HLORA_URL": self.url, "HLORA_TOKEN": self.token}

    @contextmanager
    def client(self) -> Iterator[Client]:
        """A connection with the operator's token."""
        with Client(self.url, SecretStr(self.token)) as client:
            yield client


@dataclass(frozen=True)
class Outcome:
    """What a finished run left."""

    run: RunDetail
    rounds: Sequence[RoundView]  # the published ones, from 0


def start_coordinator(children: Processes, data: Path) -> Coordinator:
    """A coordinator on SQLite and local files, on a free port, with a token for us."""
    environment = {"HLORA_COORDINATOR_DATA": str(data), "HLORA_COORDINATOR_LOG_JSON": "true"}
    serving = children.start("coordinator", "coordinator", "serve", "--port", "0", environment=environment)
    urls: list[str] = []

    def listening() -> bool:
        urls[:] = [found for line in _lines(serving) if (found := _listening(line))]
        return bool(urls)

    children.wait(listening, "the coordinator")
    made = json.loads(children.answer("coordinator", "token", "demo", "--json", environment=environment))
    return Coordinator(urls[0], str(made["token"]))


def _lines(child: Child) -> list[str]:
    return child.log.read_text(encoding="utf-8", errors="replace").splitlines() if child.log else []


def _listening(line: str) -> str | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return str(event["url"]) if isinstance(event, dict) and event.get("event") == "listening" else None


def start_agents(
    children: Processes, links: ExitStack, coordinator: Coordinator, departments: Sequence[Department], plan: Plan, homes: Path
) -> None:
    """Give each department a machine, enrol its agent, start it, and wait until the coordinator has heard of all.

    Departments are in the order of their data, machines in the order of their strength. Slow links stay open as long as
    `links` does.
    """
    assert plan.layout is not None, "a resolved plan has a layout"
    with coordinator.client() as client:
        token = client.make_enrolment(EnrolmentRequest(uses=len(departments), seconds=ENROLMENT_SECONDS)).token
    enrolling = []
    for n, department in enumerate(departments):
        machine, home = MACHINES[n % len(MACHINES)], homes / folder_name(department.name)
        department.write(home)
        write_policy(machine, plan.layout, home)
        url = _address(links, coordinator, machine, plan)
        secret = {**_at(home), "HLORA_AGENT_TOKEN": token}
        enrolling.append(children.start(home.name, "agent", "enrol", url, "--name", department.name, environment=secret, lasting=False))
    children.finish(enrolling)
    for department in departments:
        home = homes / folder_name(department.name)
        children.start(home.name, "agent", "run", environment=_at(home))
    with coordinator.client() as client:
        children.wait(lambda: all(found.last_seen and found.last_seen > found.enrolled_at for found in client.clients()), "the agents")


def folder_name(name: str) -> str:
    """A department's name as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name)


def _at(home: Path) -> dict[str, str]:
    return {"HLORA_AGENT_HOME": str(home), "HLORA_AGENT_THREADS": "1"}


def _address(links: ExitStack, coordinator: Coordinator, machine: Machine, plan: Plan) -> str:
    assert plan.layout is not None
    speed = link_speed(machine, plan.layout)
    if speed is None:
        return coordinator.url
    host, _, port = coordinator.url.removeprefix("http://").rpartition(":")
    return links.enter_context(slow_link(host, int(port), speed))


def carry_out(children: Processes, coordinator: Coordinator, plan: Plan, console: Console) -> Outcome:
    """Start the run, show it until it ends, and fetch what it left. Raises Unavailable unless it finished."""
    with coordinator.client() as client:
        run = client.create_run(plan).id
        if console.is_terminal:
            children.show(console.file, "admin", "runs", "watch", run, environment=coordinator.environment)
        else:
            _follow(children, client, run, console)
        found = client.run(run)
        if found.state is not RunState.finished:
            raise errors.Unavailable(f"the run is {found.state}: {found.reason or 'no reason given'}; the logs are in {children.logs}")
        numbers = sorted({summary.number for summary in client.rounds(run) if summary.state is RoundState.published})
        return Outcome(found, [client.round(run, number) for number in numbers])


def _follow(children: Processes, client: Client, run: str, console: Console) -> None:
    """One line for each round, once its adapter has been measured: for logs, where no screen can be drawn anew."""
    said: set[int] = set()

    def ended() -> bool:
        now = client.run(run)
        over = now.state is not RunState.running
        for found in client.rounds(run):
            # The devices measure an adapter before they train on it, so the next round's end is the measuring's end too.
            if found.state is RoundState.published and found.number not in said and (over or found.number < now.round):
                said.add(found.number)
                console.print(f"        round {found.number} of {now.rounds}: {words.metrics(found.metrics)}")
        return over

    children.wait(ended, "the run", LOOK_SECONDS)


def pull(children: Processes, coordinator: Coordinator, run: str, rank: int, folder: Path) -> Path:
    """Fetch the last adapter at a rank as a PEFT folder."""
    children.answer(
        "admin", "adapter", "pull", run, "--rank", str(rank), "--out", str(folder), "--json", environment=coordinator.environment
    )
    return folder
