"""Real coordinators and agents, killed at random behind a network that fails: nothing is lost, nothing counts twice, no byte differs.

One plan is carried out again and again on machines that train quickly and repeatably. First it is simulated, undisturbed, to
know what every round must publish. Then coordinators and agents are killed, stopped and started again, and connections are
cut, reset, half closed, held up and slowed, until so many processes were killed; the last run is seen to its end.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from time import monotonic
from typing import Annotated

import structlog
import torch
import typer
from pydantic import BaseModel, SecretStr

from agent import identity
from agent.client import Client
from agent.identity import Identity
from benchmarks.havoc import Havoc, agent, coordinator, link_to
from benchmarks.ledger import Ledger, Run, acknowledgements
from benchmarks.machine import Machine, this_machine
from benchmarks.proxy import Fault, Link
from benchmarks.service import database, workplace
from benchmarks.undisturbed import Home, homes, plan, undisturbed
from benchmarks.zygote import Zygote
from coordinator import access, schema
from coordinator.database import Database
from protocol.messages import Enrol
from protocol.states import Role
from protocol.views import EnrolmentMade, EnrolmentRequest, Page, RoundSummary, RoundView, TokenRequest
from simulation.device import fleet

COORDINATORS = {"sqlite": 1, "postgresql": 2}
NAMED = 5  # of the things that should not be, in the report
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Chaos(BaseModel):
    """What was done to a federation, and what came of it. All that should not be is named, the first few."""

    database: str
    coordinators: int
    agents: int
    seed: int
    kills: dict[str, int]
    stopped: int
    fresh_starts: int
    connections: int
    faults: dict[Fault, int]
    runs: int
    rounds: int
    acknowledged: int
    lost: int
    counted_twice: int
    differing_rounds: int
    died: int
    named: list[str]
    seconds: float
    longest_recovery_seconds: float
    machine: Machine

    @property
    def good(self) -> bool:
        """Whether nothing was that should not be."""
        return (self.lost, self.counted_twice, self.differing_rounds, self.died) == (0, 0, 0, 0)


async def measure(kind: str, url: str, folder: Path, *, kills: int, agents: int, rounds: int, seed: int) -> Chaos:
    """One chaos over a database of that kind. Raises Unavailable if a run does not end."""
    wanted, machines = plan(agents, rounds), homes(folder / "agents", agents)
    with Zygote(folder) as zygote:  # imports everything meanwhile
        expected = await undisturbed(wanted, folder / "agents", folder / "undisturbed")
        schema.migrate(url)
        (folder / "site").mkdir()
        coordinators = [coordinator(number, folder / "site", url) for number in range(COORDINATORS[kind])]
        havoc = Havoc(zygote, coordinators, [agent(home) for home in machines], _token(url), random.Random(f"{seed}/havoc"))
        async with link_to(coordinators, seed) as link:
            began = monotonic()
            await _begin(havoc, machines, link)
            await havoc.wreak(wanted, kills)
            seconds = monotonic() - began
        ledger = Ledger(acknowledgements(home.folder for home in machines), [await _rounds(havoc, run) for run in havoc.runs])
    lost, twice, other = ledger.lost(), ledger.counted_twice(), ledger.differing(expected)
    return Chaos(
        database=kind,
        coordinators=len(coordinators),
        agents=agents,
        seed=seed,
        kills={name: havoc.blows[name] for name in ("coordinator", "agent")},
        stopped=havoc.blows["stopped"],
        fresh_starts=havoc.fresh,
        connections=link.connections,
        faults={fault: link.struck[fault] for fault in Fault},
        runs=len(havoc.runs),
        rounds=ledger.rounds(),
        acknowledged=len(ledger.acknowledged),
        lost=len(lost),
        counted_twice=len(twice),
        differing_rounds=len(other),
        died=len(havoc.died),
        named=[*lost[:NAMED], *twice[:NAMED], *other[:NAMED], *havoc.died[:NAMED]],
        seconds=seconds,
        longest_recovery_seconds=ledger.longest_recovery(havoc.times),
        machine=this_machine(),
    )


def _token(url: str) -> str:
    with closing(Database(url)) as opened, opened.write() as session:
        return access.make_token(session, TokenRequest(name="chaos", role=Role.admin), opened.clock(session)).token


async def _begin(havoc: Havoc, machines: Sequence[Home], link: Link) -> None:
    """Start everything, and let the machines in; their way to the coordinators is the link."""
    for victim in havoc.coordinators:
        havoc.start(victim)
    profiles = {device.name: device.profile() for device in fleet(machines[0].folder.parent)}
    for home, victim in zip(machines, havoc.agents, strict=True):
        request = EnrolmentRequest(labels=home.labels).model_dump(mode="json")
        made = EnrolmentMade.model_validate_json((await havoc.ask("POST", "/v1/enrolments", json=request)).content)
        async with Client(f"http://127.0.0.1:{havoc.coordinators[0].order.port}") as client:
            enrolled = await client.enrol(SecretStr(made.token), Enrol(name=home.name, profile=profiles[home.name]))
        identity.save(Identity(url=link.url, id=enrolled.id, name=home.name, credential=enrolled.credential), home.folder)
        havoc.start(victim)


async def _rounds(havoc: Havoc, run: str) -> Run:
    """All rounds of a run, all attempts."""
    found: list[RoundView] = []
    page = Page[RoundSummary](items=[])
    while True:
        cursor = f"&cursor={page.next}" if page.next else ""
        page = Page[RoundSummary].model_validate_json((await havoc.ask("GET", f"/v1/runs/{run}/rounds?limit=100{cursor}")).content)
        for round in page.items:
            answer = await havoc.ask("GET", f"/v1/runs/{run}/rounds/{round.number}?attempt={round.attempt}")
            found.append(RoundView.model_validate_json(answer.content))
        if page.next is None:
            return found


def report(found: Chaos) -> str:
    """One chaos for a person."""
    kills = ", ".join(f"{count} × {name}" for name, count in found.kills.items())
    faults = ", ".join(f"{count} × {fault}" for fault, count in found.faults.items())
    said = f"; {', '.join(found.named)}" if found.named else ""
    return (
        f"{found.database}, {found.coordinators} coordinators, {found.agents} agents: killed {kills}, stopped {found.stopped}; "
        f"{found.connections} connections: {faults}. {found.rounds} rounds of {found.runs} runs in {found.seconds:.0f} s, "
        f"{found.acknowledged} results acknowledged: {found.lost} lost, {found.counted_twice} counted twice, {found.differing_rounds} "
        f"rounds differ, {found.died} processes ended by themselves; longest recovery {found.longest_recovery_seconds:.1f} s{said}"
    )


@app.command()
def main(
    kills: Annotated[int, typer.Option(min=0, help="processes to kill, on each database")] = 200,
    databases: Annotated[str, typer.Option(help="kinds of databases, with commas")] = "sqlite,postgresql",
    database_url: Annotated[str | None, typer.Option(help="an empty database to use instead, of the one kind that is named")] = None,
    agents: Annotated[int, typer.Option(min=1, help="agents, all of which take part in every round")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="rounds of each run")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="of who is struck and when, and of how connections fail")] = 0,
    folder: Annotated[Path | None, typer.Option(help="where the data lie meanwhile")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON line for each database")] = False,
) -> None:
    """Kill processes and cut connections at random; nothing may be lost or counted twice. Exit code 1 if anything was."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    torch.set_num_threads(1)
    good = True
    for kind in databases.split(","):
        given = nullcontext((database_url, None)) if database_url else None
        with workplace(folder) as place, given or database(kind, place) as (url, _):
            found = asyncio.run(measure(kind, url, place, kills=kills, agents=agents, rounds=rounds, seed=seed))
        typer.echo(found.model_dump_json() if as_json else report(found))
        good = good and found.good
    raise typer.Exit(0 if good else 1)


if __name__ == "__main__":
    app()
