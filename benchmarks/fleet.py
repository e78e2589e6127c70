"""Many agents at one real coordinator: what waiting costs, how soon all have work once a round opens, how fast contributions come in.

The agents are one process of plain connections, so that the machine is the coordinator's. They ask as real agents do, wait as
long, and rest as they are told. "Opened" is the time that the round itself names, of the transaction that opens it: the draw and
the writing of all jobs are part of what is measured. Every contribution is another slice, and is acknowledged when it is durable.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import httpx
import torch
import typer
from pydantic import BaseModel

from agent.settings import Settings
from benchmarks import plain
from benchmarks.line import Answer, Line
from benchmarks.load import Load, Meter
from benchmarks.machine import Machine, this_machine
from benchmarks.service import Service, database, file_system, serving, workplace
from protocol import errors
from protocol.contents import Label, head
from protocol.messages import Dataset, Profile, Result, Usage
from protocol.plan import Dtype, Layout, Plan

WAIT: int = int(Settings.model_fields["wait_seconds"].default)
ENROLLING = 20  # at once
PATIENCE = 600.0  # seconds for a whole fleet to do one thing
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Waiting(BaseModel):
    """A fleet without work."""

    load: Load
    polls_per_second: float
    kilobytes_per_agent: float


class PickingUp(BaseModel):
    """From the opening of a round of all agents to the job in hand, in seconds."""

    p50: float
    p99: float
    longest: float
    load: Load


class Contributing(BaseModel):
    """A round of all agents, from its opening to the last acknowledged result."""

    megabytes_each: float
    seconds: float
    per_second: float
    repeated: int  # requests that were answered with "later"
    load: Load


class Fleet(BaseModel):
    """All of it, for one kind of database."""

    agents: int
    database: str
    waiting: Waiting
    picking_up: PickingUp
    contributing: Contributing
    file_system: str
    machine: Machine


@dataclass
class Device:
    """One agent."""

    line: Line
    wait: int  # seconds that a question may stay open
    polls: int = 0
    repeated: int = 0

    async def hold(self, delay: float) -> tuple[dict[str, Any], float]:
        """Ask until there is a job; gives it, and when it was here."""
        await asyncio.sleep(delay)
        while True:
            answer = await self.sure("POST", "/v1/jobs/next", Prefer=f"wait={self.wait}")
            self.polls += 1
            if answer.status == 200:
                return json.loads(answer.body), answer.at
            await asyncio.sleep(float(answer.headers.get("retry-after", "1")))

    async def sure(self, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
        """Ask again where the answer is "later", as agents do. Raises Unavailable for any other refusal."""
        while True:
            answer = await self.line.ask(method, path, body, **headers)
            if answer.status < 300:
                return answer
            if answer.status != 503:
                raise errors.Unavailable(f"{method} {path} was answered {answer.status}: {answer.body[:500].decode(errors='replace')}")
            self.repeated += 1
            await asyncio.sleep(float(answer.headers.get("retry-after", "1")))

    async def contribute(self, job: dict[str, Any], numbers: bytes) -> float:
        """Send a slice that nobody else sends, and the result; gives when that was acknowledged."""
        data = _trained(job, numbers)
        told = {"Lease_Epoch": str(job["lease"]["epoch"]), "Repr_Digest": f"sha-256=:{_base64(hashlib.sha256(data).digest())}:"}
        receipt = await self.sure("PUT", f"/v1/jobs/{job['id']}/slice", data, Content_Type="application/octet-stream", **told)
        slice = json.loads(receipt.body)["digest"]
        result = Result(epoch=job["lease"]["epoch"], slice=slice, examples=5, usage=Usage(seconds=1))
        body = result.model_dump_json().encode()
        return (await self.sure("PUT", f"/v1/jobs/{job['id']}/result", body, Content_Type="application/json")).at


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _trained(job: dict[str, Any], numbers: bytes) -> bytes:
    label = Label(rank=job["rank"], scale=job["scale"], round=job["round"], base=job["slice"]["digest"], examples=5)
    own: bytes = (job["seed"] % 2**23).to_bytes(4, "little")  # a small float of its own
    return head(Layout.model_validate(job["layout"]), label, Dtype.float32) + numbers[:-4] + own


def plan(agents: int, megabytes: float) -> Plan:
    """One round of all agents, a tiny module, and one tensor that makes the slice as large as wanted."""
    return plain.plan(
        "fleet",
        {"tensor": [round(megabytes * 1e6 / 4)]},
        cohort={"target": agents, "quorum": 1},
        times={"lease": 3600, "no_progress": 3600, "job": 3600},
        rounds=1,
    )


async def measure(
    service: Service, agents: int, seconds: float, megabytes: float, wait: int = WAIT
) -> tuple[Waiting, PickingUp, Contributing]:
    """The three, one after the other, with the same agents, whose questions may stay open so many seconds."""
    devices = await _enrol(service, agents, wait)
    meter, resident = Meter(service), service.resident_bytes()
    chance = random.Random(0)
    held = [asyncio.ensure_future(device.hold(chance.uniform(0, wait))) for device in devices]
    await asyncio.sleep(1.2 * wait)
    polls = sum(device.polls for device in devices)
    with meter.running():
        await asyncio.sleep(seconds)
    rate = (sum(device.polls for device in devices) - polls) / seconds
    waiting = Waiting(
        load=meter.found[-1], polls_per_second=rate, kilobytes_per_agent=(service.resident_bytes() - resident) / agents / 1000
    )
    run = await _create(service, plan(agents, megabytes))
    with meter.running():
        jobs = await asyncio.wait_for(asyncio.gather(*held), PATIENCE)
    opened = await _opened(service, run)
    delays = sorted(at - opened for _, at in jobs)
    quantiles = statistics.quantiles([*delays, delays[-1]], n=100, method="inclusive")
    picking_up = PickingUp(p50=quantiles[49], p99=quantiles[98], longest=delays[-1], load=meter.found[-1])
    await asyncio.to_thread(service.operator.post, f"/v1/runs/{run}/stop")
    contributing = await _contribute(service, devices, meter, plan(agents, megabytes))
    for device in devices:
        device.line.close()
    return waiting, picking_up, contributing


async def _contribute(service: Service, devices: Sequence[Device], meter: Meter, wanted: Plan) -> Contributing:
    assert wanted.layout is not None, "this plan is made with its layout"
    numbers = torch.randn(wanted.layout.numbers(1)).numpy().tobytes()

    async def whole(device: Device) -> float:
        job, _ = await device.hold(0.0)
        return await device.contribute(job, numbers)

    done = [asyncio.ensure_future(whole(device)) for device in devices]
    await asyncio.sleep(devices[0].wait / 10)
    run = await _create(service, wanted)
    with meter.running():
        ends = await asyncio.wait_for(asyncio.gather(*done), PATIENCE)
    seconds = max(ends) - await _opened(service, run)
    await asyncio.to_thread(service.operator.post, f"/v1/runs/{run}/stop")
    repeated = sum(device.repeated for device in devices)
    return Contributing(
        megabytes_each=len(numbers) / 1e6, seconds=seconds, per_second=len(devices) / seconds, repeated=repeated, load=meter.found[-1]
    )


async def _enrol(service: Service, agents: int, wait: int) -> list[Device]:
    made = await asyncio.to_thread(service.operator.post, "/v1/enrolments", json={"uses": agents, "seconds": 3600})
    address = httpx.URL(service.url)
    profile = Profile(memory_bytes=10**9, training_flops=1e10, datasets={"rows": Dataset(train=10, held_out=0)})
    several = asyncio.Semaphore(ENROLLING)

    async def one(number: int) -> Device:
        body = json.dumps({"name": f"agent {number}", "profile": profile.model_dump(mode="json")}).encode()
        async with several, Line(address.host, address.port or 80, made.json()["token"]) as line:
            answer = await Device(line, wait).sure("POST", "/v1/clients", body, Content_Type="application/json")
        return Device(Line(address.host, address.port or 80, json.loads(answer.body)["credential"]), wait)

    return list(await asyncio.gather(*(one(number) for number in range(agents))))


async def _create(service: Service, wanted: Plan) -> str:
    made = await asyncio.to_thread(service.operator.post, "/v1/runs", json=wanted.model_dump(mode="json"))
    return str(made.raise_for_status().json()["id"])


async def _opened(service: Service, run: str) -> float:
    found = await asyncio.to_thread(service.operator.get, f"/v1/runs/{run}/rounds/1")
    return datetime.fromisoformat(found.raise_for_status().json()["opened_at"]).timestamp()


def report(found: Fleet) -> str:
    """One fleet for a person."""
    idle, work, sent = found.waiting, found.picking_up, found.contributing
    return (
        f"{found.agents} agents, {found.database}: waiting they cost {idle.load.coordinator:.3f} cores of the coordinator"
        f" ({idle.load.database:.3f} of its database) at {idle.polls_per_second:.0f} polls/s, {idle.kilobytes_per_agent:.0f} kB each; "
        f"work in hand after {work.p50:.2f} s (median), {work.p99:.2f} s (p99); {sent.per_second:.0f} contributions of "
        f"{sent.megabytes_each:.1f} MB a second on {found.file_system}; others used {idle.load.others:.2f}, {work.load.others:.2f} and "
        f"{sent.load.others:.2f} cores meanwhile"
    )


@app.command()
def main(
    agents: Annotated[int, typer.Option(min=1, help="agents of the fleet")] = 2000,
    databases: Annotated[str, typer.Option(help="kinds of databases, with commas")] = "sqlite,postgresql",
    seconds: Annotated[float, typer.Option(help="how long the waiting fleet is watched")] = 30.0,
    megabytes: Annotated[float, typer.Option(help="size of a slice, in 10⁶ bytes")] = 1.0,
    folder: Annotated[Path | None, typer.Option(help="where the data lie meanwhile: on the disk that shall be measured")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON line for each database")] = False,
) -> None:
    """Many agents at one coordinator: waiting, picking up work, contributing."""
    for kind in databases.split(","):
        with workplace(folder) as place, database(kind, place) as (url, server), serving(place, url, server) as service:
            waiting, picking_up, contributing = asyncio.run(measure(service, agents, seconds, megabytes))
            parts = {"waiting": waiting, "picking_up": picking_up, "contributing": contributing}
            found = Fleet(agents=agents, database=kind, **parts, file_system=file_system(place), machine=this_machine())
        typer.echo(found.model_dump_json() if as_json else report(found))


if __name__ == "__main__":
    app()
