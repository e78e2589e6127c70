"""The processes that are killed: a coordinator as its command runs it, and an agent whose training is quick and repeatable.

An agent writes down every result that the coordinator acknowledged, and when: what was acknowledged may not be lost.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import SecretStr

from agent import app as agent_app
from agent import data, identity, policy
from agent import settings as agent_settings
from agent.client import Client
from agent.connection import Retry
from agent.loop import Loop
from agent.training import Outcome, Standing, Tell
from coordinator import app as coordinator_app
from coordinator import database, schema, server
from coordinator import settings as coordinator_settings
from protocol.contents import Label
from protocol.messages import Job, Metric, Result, ResultReceipt, Usage
from protocol.slices import Factors, Slice
from protocol.states import JobKind
from protocol.strict import Strict
from simulation.device import Device, Machine

ACKNOWLEDGED = "acknowledged.jsonl"  # in an agent's home
LOG = "log"
STEPS, STEP_SECONDS = 5, 0.02
NOISE = 0.05
IMPATIENT = Retry(attempts=6, base_seconds=0.05, longest_seconds=0.5)


class Order(Strict):
    """Who a process shall be, and where."""

    kind: Literal["coordinator", "agent"]
    name: str
    home: Path
    database: str = ""
    port: int = 0

    @property
    def log(self) -> Path:
        """What the process says."""
        return self.home / f"{self.name}.{LOG}"


class Acknowledgement(Strict):
    """A result that the coordinator has taken."""

    job: str
    slice: str | None
    at: float  # of time.time()


def become(order: Order) -> None:  # pragma: no cover: in processes that are killed
    """Be that process, until the end."""
    torch.set_num_threads(1)
    if order.kind == "coordinator":
        _coordinate(order)
    else:
        asyncio.run(_work(order))


def _coordinate(order: Order) -> None:  # pragma: no cover: in processes that are killed
    # Housekeeping without rest and without grace: a sweep goes on beside everything that is put and named.
    settings = coordinator_settings.Settings(
        data=order.home,
        database_url=order.database,
        port=order.port,
        executor="threads://1",
        tick_seconds=0.5,
        poll_seconds=5.0,
        stall_seconds=5.0,
        housekeeping_seconds=4.0,
        sweep_grace_seconds=0.0,
        keep_rounds=2,
        log_json=True,
    )
    with database.claimed(settings.database):
        schema.migrate(settings.database)
        parts = coordinator_app.build(settings)
        server.serve(coordinator_app.create_app(parts), settings, before_exit=parts.bell.close)


async def _work(order: Order) -> None:  # pragma: no cover: in processes that are killed
    agent_app.configure(agent_settings.Settings(home=order.home, log="json"))
    who, allowed = identity.load(order.home), policy.load(order.home)
    async with Noted(who.url, SecretStr(who.credential), retry=IMPATIENT) as client:
        client.book = order.home / ACKNOWLEDGED
        loop = Loop(client, quick, allowed, order.home, wait_seconds=5.0)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, loop.stopping.set)
        await loop.run(Device(who.name, Machine(), allowed, data.load(order.home)).profile())


class Noted(Client):
    """The agent's client, with a book of what was acknowledged."""

    book: Path

    async def put_result(self, job: str, result: Result) -> ResultReceipt:
        """Answer the job, and write down that it was taken."""
        receipt = await super().put_result(job, result)
        line = Acknowledgement(job=job, slice=result.slice, at=time.time()).model_dump_json()
        with self.book.open("a") as book:
            book.write(line + "\n")
        return receipt


def quick(job: Job, start: Slice, tell: Tell) -> Outcome:
    """What a client might have trained: the slice that was handed out, moved by noise that the job's seed decides."""
    for step in range(1, STEPS + 1):
        time.sleep(STEP_SECONDS)
        tell(Standing("train", step, STEPS))
    examples, usage = 1 + job.seed % 10, Usage(seconds=STEPS * STEP_SECONDS, steps=STEPS, step_seconds=STEP_SECONDS)
    if job.kind is JobKind.evaluate:
        return Outcome(examples=examples, metrics={"accuracy": Metric(value=job.seed % 100 / 100, weight=examples)}, usage=usage)
    generator = torch.Generator().manual_seed(job.seed)

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + NOISE * torch.randn(tensor.shape, generator=generator)

    factors = {module: Factors(b=moved(pair.b), a=moved(pair.a)) for module, pair in start.factors.items()}
    label = Label(rank=job.rank, scale=job.scale, round=job.round, base=job.slice.digest, examples=examples)
    return Outcome(examples=examples, metrics={}, usage=usage, slice=replace(start, label=label, factors=factors))


if __name__ == "__main__":
    become(Order.model_validate(json.loads(sys.argv[1])))
