"""One small federation from its beginning to its end, in which every kind of write happens, against real coordinators.

Whatever befalls the coordinators meanwhile, the outcome has to be the same.
"""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from sqlalchemy import make_url, select

from coordinator.database import Database
from coordinator.tables import Event
from protocol import errors
from protocol.messages import Job, SliceReceipt
from protocol.states import JobKind, RunState
from protocol.views import JobView
from tests.coordinator.services import Persistent
from tests.federation import Device, Operator, enrol, make_plan, make_profile, open_federation
from tests.postgres import Server

PLAN = make_plan(rounds=2, evaluation={"every": 2})
NAMES = ("one", "two", "three")


@dataclass(frozen=True)
class Prepared:
    """A database in which an operator and three clients are known, to be copied."""

    url: str
    operator: str  # secrets
    clients: tuple[str, ...]

    @contextmanager
    def copy(self, folder: Path, postgres: Server | None) -> Iterator[str]:
        """The URL of a copy, on that server or as a file, and a folder for what lies beside it."""
        folder.mkdir()
        if postgres is None:
            yield f"sqlite:///{shutil.copy(self.url.removeprefix('sqlite:///'), folder / 'copy.sqlite')}"
        else:
            with postgres.database(str(make_url(self.url).database)) as url:
                yield url


async def prepare(url: str, folder: Path) -> Prepared:
    """Let them be known in a migrated database."""
    async with open_federation(url, folder) as federation:
        clients = [await enrol(federation.admin, name, make_profile()) for name in NAMES]
    return Prepared(url, str(federation.admin.secret), tuple(str(client.secret) for client in clients))


@dataclass(frozen=True)
class Outcome:
    """All that is told of a run: what each round published and from whom, how often each thing happened, and who was rejected."""

    published: list[object]
    happened: dict[str, int]
    rejections: list[int]


async def carried_out(prepared: Prepared, url: str, transport: Persistent) -> Outcome:
    """A run from its creation to its end."""
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as http:
        admin = Operator(http, prepared.operator)
        run = await until_finished(admin, [Device(http, secret, name=name) for secret, name in zip(prepared.clients, NAMES, strict=True)])
        views = [await admin.round(run, number) for number in range(PLAN.rounds + 1)]
        published = [(view.adapter, view.slices, view.contributions, _weights(view.jobs)) for view in views]
        rejections = [client["rejections"] for client in (await admin.call("GET", "/v1/clients")).json()["items"]]
    return Outcome(list(published), happened(url), rejections)


def _weights(jobs: list[JobView]) -> list[tuple[str, float]]:
    return sorted((job.client_name, job.weight) for job in jobs if job.weight is not None)


def happened(url: str) -> dict[str, int]:
    """How often each kind of event was recorded; that a coordinator was away, and noticed, is none of the run's."""
    database = Database(url)
    with database.read() as session:
        kinds = Counter(session.scalars(select(Event.kind).where(Event.kind != "outage")))
    database.close()
    return dict(kinds)


async def until_finished(admin: Operator, devices: list[Device]) -> str:
    """Every kind of write happens: a run is made, paused and resumed; slices come whole, in parts, and unusable; one job is given back."""
    for device in devices:
        await device.next_job()
    run = (await admin.create(PLAN, key="once")).id
    working = [asyncio.create_task(work(device)) for device in devices]
    await admin.change_run(run, "pause")
    await admin.change_run(run, "resume")
    while (await admin.run(run)).state is RunState.running:
        await asyncio.sleep(0.1)
        for task in working:
            if task.done():
                task.result()
    for task in working:
        task.cancel()
    await asyncio.gather(*working, return_exceptions=True)
    return run


async def work(device: Device) -> None:
    """Do whatever comes, for ever."""
    while True:
        job = await device.next_job(wait=2)
        if job is None:
            continue
        if job.kind is JobKind.train:
            await train(device, job)
        elif (device.name, job.round) == ("three", 0):
            await device.give_back(job)
        else:
            await device.complete(job)


async def train(device: Device, job: Job) -> None:
    await device.renew(job, step=1)
    if (device.name, job.round) == ("three", 1):
        with pytest.raises((errors.MalformedSlice, errors.JobOver)):  # over, when its rejection was not heard of
            await device.put_slice(job, b"nonsense")
        return
    data = await device.trained(job)
    receipt = await in_parts(device, job, data) if device.name == "two" else await device.put_slice(job, data)
    await device.put_result(job, device.result(job, receipt.digest))


async def in_parts(device: Device, job: Job, data: bytes) -> SliceReceipt:
    """Send a slice in two parts, going on from where the coordinator says that it is."""
    standing: int | SliceReceipt = 0
    while isinstance(standing, int):
        stop = len(data) // 2 if standing < len(data) // 2 else len(data)
        try:
            standing = await device.patch(job, data, standing, stop)
        except errors.OffsetMismatch as mismatch:
            standing = int(str(mismatch.facts["offset"]))
    return standing
