"""Whole rounds when training takes no time: one coordinator, agents as real processes over loopback.

The work is that of a plain federated average: every agent fetches some arrays, changes one number of each, and sends them back;
the coordinator takes their weighted mean. There is one small adapted module besides, because a plan has one. A round lasts from
the opening of one round to the opening of the next, as the coordinator's own clock has it: nothing is left out.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic, sleep
from typing import Annotated

import psutil
import structlog
import typer
from pydantic import BaseModel, SecretStr

from agent.client import Client
from agent.loop import Loop
from agent.policy import Policy
from agent.training import Outcome, Standing, Tell
from benchmarks import plain
from benchmarks.machine import Machine, this_machine
from benchmarks.service import Service, database, file_system, processor_seconds, serving, workplace
from protocol import errors
from protocol.contents import Label
from protocol.messages import Dataset, Enrol, Job, Profile, Usage
from protocol.plan import Plan
from protocol.slices import Slice

ARRAYS = 100  # that together have the size
PROFILE = Profile(memory_bytes=10**9, training_flops=1e10, datasets={"rows": Dataset(train=10, held_out=0)})
PATIENCE = 1800.0  # seconds for one run
LOOK = 0.05  # seconds between two looks at the memory
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Rounds(BaseModel):
    """One size. Seconds are per round after the first; the first begins when the run is made, with the agents waiting."""

    agents: int
    megabytes: float
    rounds: int
    median: float
    shortest: float
    longest: float
    first: float
    merging: float  # seconds of a round, median, in which it was merged
    coordinator_seconds: float  # processor seconds per round
    agents_seconds: float  # of all of them together
    coordinator_megabytes: float  # peak
    coordinator_growth: float  # megabytes, above what it had before the run
    agent_megabytes: float  # the largest agent's peak; much of it is shared among them
    others: float  # cores that the rest of the machine used meanwhile
    database: str
    file_system: str
    machine: Machine


def plan(agents: int, megabytes: float, rounds: int) -> Plan:
    """A plain mean of `ARRAYS` float32 arrays that together have that size."""
    side = max(1, round(megabytes * 1e6 / 4 / ARRAYS))
    full = {f"array {number:03}": [side] for number in range(ARRAYS)}
    return plain.plan("rounds", full, cohort={"target": agents, "quorum": agents}, rounds=rounds)


def change_one_number(job: Job, start: Slice, tell: Tell) -> Outcome:
    """What stands for training here: the first number of every array is another one afterwards."""
    tell(Standing("train"))
    for tensor in start.full.values():  # the agent's own copy in memory, and not a byte more of it than is changed
        tensor.view(-1)[0] += job.seed % 997
    label = Label(rank=job.rank, scale=job.scale, round=job.round, base=job.slice.digest, examples=5)
    return Outcome(examples=5, metrics={}, usage=Usage(seconds=0.001), slice=Slice(label, start.factors, start.full))


def measure(service: Service, agents: int, megabytes: float, rounds: int, folder: Path) -> dict[str, float]:
    """One run of so many rounds with so many agents."""
    with _working(service, agents, folder) as children:
        before, began = _spent(service, children), service.resident_bytes()
        made = service.operator.post("/v1/runs", json=plan(agents, megabytes, rounds).model_dump(mode="json")).raise_for_status().json()
        own, of_agents = _watch(service, children, made["id"])
        after = _spent(service, children)
    lines = [service.operator.get(f"/v1/runs/{made['id']}/rounds/{n}").raise_for_status().json() for n in range(1, rounds + 1)]
    ends = [datetime.fromisoformat(line["ended_at"]).timestamp() for line in lines]
    seconds = [end - last for last, end in itertools.pairwise(ends)]
    spent = [b - a for a, b in zip(before, after, strict=True)]
    return {
        "median": statistics.median(seconds),
        "shortest": min(seconds),
        "longest": max(seconds),
        "first": ends[0] - datetime.fromisoformat(made["created_at"]).timestamp(),
        "merging": statistics.median(line["merge_seconds"] for line in lines),
        "coordinator_seconds": spent[1] / rounds,
        "agents_seconds": spent[2] / rounds,
        "coordinator_megabytes": own / 1e6,
        "coordinator_growth": (own - began) / 1e6,
        "agent_megabytes": of_agents / 1e6,
        "others": max(0.0, spent[3] - spent[1] - spent[2]) / spent[0],
    }


def _spent(service: Service, children: list[psutil.Process]) -> tuple[float, float, float, float]:
    machine = psutil.cpu_times()
    busy = sum(machine) - machine.idle - getattr(machine, "iowait", 0.0) - getattr(machine, "guest", 0.0)
    return monotonic(), service.seconds() + service.database_seconds(), processor_seconds(children), busy


def _watch(service: Service, children: list[psutil.Process], run: str) -> tuple[int, int]:
    """Wait for the run's end; gives the most memory that the coordinator had, and that any agent had. Raises Unavailable."""
    own = of_agents = 0
    until, look = monotonic() + PATIENCE, 0.0
    while True:
        own = max(own, service.resident_bytes())
        of_agents = max(of_agents, max(child.memory_info().rss for child in children))
        if monotonic() >= look:
            view = service.operator.get(f"/v1/runs/{run}").raise_for_status().json()
            if view["state"] == "finished":
                return own, of_agents
            if view["state"] != "running" or monotonic() > until:
                raise errors.Unavailable(f"the run is {view['state']}: {view['reason']}")
            look = monotonic() + 0.5
        sleep(LOOK)


@contextmanager
def _working(service: Service, agents: int, folder: Path) -> Iterator[list[psutil.Process]]:
    """So many agents at work, forked from this process: it has imported everything, and computed nothing yet."""
    token = service.operator.post("/v1/enrolments", json={"uses": agents}).raise_for_status().json()["token"]
    context = multiprocessing.get_context("fork")
    children: list[BaseProcess] = []
    try:
        for number in range(agents):
            name = f"{folder.name}-{number}"[-60:]
            children.append(context.Process(target=_work, args=(service.url, token, name, folder / name), daemon=True))
            children[-1].start()
        _await_all(service, agents, folder.name)
        yield [psutil.Process(child.pid) for child in children]
    finally:
        for child in children:
            child.terminate()
        for child in children:
            child.join()


def _await_all(service: Service, agents: int, prefix: str) -> None:
    until = monotonic() + 120
    while monotonic() < until:
        clients = service.operator.get("/v1/clients", params={"limit": 500}).raise_for_status().json()["items"]
        if sum(client["name"].startswith(prefix) for client in clients) == agents:
            sleep(2)  # they ask for work now
            return
        sleep(0.2)
    raise errors.Unavailable(f"{agents} agents were started; fewer enrolled within two minutes")


def _work(url: str, token: str, name: str, folder: Path) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    asyncio.run(_agent(url, token, name, folder))


async def _agent(url: str, token: str, name: str, folder: Path) -> None:
    async with Client(url) as newcomer:
        enrolled = await newcomer.enrol(SecretStr(token), Enrol(name=name, profile=PROFILE))
    async with Client(url, SecretStr(enrolled.credential)) as client:
        await Loop(client, change_one_number, Policy(), folder).run(PROFILE)


def report(found: Rounds) -> str:
    """One size for a person."""
    return (
        f"{found.agents} agents × {found.megabytes:g} MB: {found.median:.2f} s a round ({found.shortest:.2f}-{found.longest:.2f}, "
        f"{found.rounds} rounds), first {found.first:.2f} s, merging {found.merging:.2f} s; processor {found.coordinator_seconds:.2f} "
        f"s of the coordinator and {found.agents_seconds:.2f} s of all agents; coordinator {found.coordinator_megabytes:.0f} MB at most "
        f"(+{found.coordinator_growth:.0f}), an agent {found.agent_megabytes:.0f} MB; others used {found.others:.2f} cores meanwhile"
    )


@app.command()
def main(
    agents: Annotated[str, typer.Option(help="numbers of agents, with commas")] = "2,10,50",
    mb: Annotated[str, typer.Option(help="sizes of what is averaged, in 10⁶ bytes, with commas")] = "1,10,100",
    rounds: Annotated[int, typer.Option(min=2, help="rounds of each size")] = 6,
    kind: Annotated[str, typer.Option("--database", help="sqlite or postgresql")] = "sqlite",
    folder: Annotated[Path | None, typer.Option(help="where the data lie meanwhile: on the disk that shall be measured")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON line for each size")] = False,
) -> None:
    """Whole rounds when training takes no time, agents as real processes."""
    for number in map(int, agents.split(",")):
        for megabytes in map(float, mb.split(",")):
            # A coordinator of its own for each size: what it has in memory is then that size's.
            with workplace(folder) as place, database(kind, place) as (url, server), serving(place, url, server) as service:
                figures = measure(service, number, megabytes, rounds, place)
                where = {"database": kind, "file_system": file_system(place), "machine": this_machine()}
                found = Rounds(agents=number, megabytes=megabytes, rounds=rounds, **figures, **where)
            typer.echo(found.model_dump_json() if as_json else report(found))


if __name__ == "__main__":
    app()
