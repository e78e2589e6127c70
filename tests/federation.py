"""A federation without training: the real application over HTTP, and devices that speak its protocol with random factors.

Time stands still unless a test moves it, and nothing happens unless a test ticks the conductor.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import httpx
import torch
from fastapi import FastAPI
from pydantic import BaseModel
from sqlalchemy.orm import Session

from coordinator import access, problems
from coordinator.app import build, create_app
from coordinator.context import Context
from coordinator.jobs import Holder
from coordinator.settings import Settings
from protocol import errors, slices
from protocol.compact import trained_parts
from protocol.contents import Label
from protocol.messages import (
    Dataset,
    Enrol,
    Enrolled,
    GiveBack,
    Job,
    Metric,
    Problem,
    Profile,
    Progress,
    Renewal,
    Result,
    ResultReceipt,
    SliceReceipt,
    Usage,
)
from protocol.plan import BaseFacts, Layout, Plan
from protocol.slices import Factors, Slice
from protocol.states import JobKind, Role, RunState
from protocol.views import ClientView, EnrolmentMade, JobView, RoundView, RunDetail, RunView, TokenRequest

M = TypeVar("M", bound=BaseModel)
JSON = dict[str, Any]

LAYOUT = Layout(
    modules={"attention.key": (13, 15), "attention.query": (12, 16)},
    full={"head.bias": (2,), "head.weight": (2, 4)},
    base=BaseFacts(parameters=1000, layers=1, hidden=8, vocabulary=10),
)
MINUTE = 60.0


class Clock:
    """A clock that only a test moves; every coordinator that is given it agrees."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self, _: Session) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def make_plan(**changes: Any) -> Plan:
    """A resolved plan over `LAYOUT`: two rounds of three clients, quorum two, ranks 2 and 4, everybody at rank 4."""
    plan: JSON = {
        "name": "small",
        "model": {"id": "base", "fingerprint": f"sha256:{0:064}"},
        "task": {"kind": "sequence-classification", "labels": ["no", "yes"]},
        "data": "texts",
        "adapter": {"modules": ["key", "query"]},
        "layout": LAYOUT.model_dump(mode="json"),
        "training": {"learning_rate": 0.001},
        "strategy": {"name": "delta"},
        "ranks": {"name": "fixed", "ladder": [2, 4], "options": {"rank": 4}},
        "cohort": {"target": 3, "quorum": 2},
        "times": {"lease": 60, "no_progress": 600, "job": 3600, "round": 7200},
        "rounds": 2,
    }
    return Plan.model_validate(plan | changes)


def make_profile(train: int = 10, held_out: int = 3, **changes: Any) -> Profile:
    """A machine that can do every job of `make_plan`."""
    datasets = {"texts": Dataset(train=train, held_out=held_out).model_dump(mode="json")}
    return Profile.model_validate({"memory_bytes": 10**9, "training_flops": 1e10, "datasets": datasets} | changes)


def refusal(response: httpx.Response) -> errors.HLoRAError:
    """The error that a refusal stands for; the refusal's form is held against the contract on the way."""
    assert response.headers["content-type"] == problems.MEDIA_TYPE, response.text
    kind = errors.by_slug(response.headers["link"].removeprefix("</problems/").removesuffix('>; rel="type"'))
    assert response.headers["link"] == f'</problems/{kind.slug()}>; rel="type"'
    if not response.content and response.request.method == "HEAD":
        assert response.status_code == problems.status(kind)
        return kind()
    problem = Problem.model_validate_json(response.content)
    assert problem.type == f"/problems/{kind.slug()}"
    assert problem.title == kind.title()
    assert problem.status == response.status_code == problems.status(kind)
    assert problem.retryable is kind.retryable
    assert problem.detail
    assert kind is not errors.InternalError, response.text
    return kind(problem.detail, **(problem.model_extra or {}))


def read(response: httpx.Response, model: type[M]) -> M:
    """The answer's body. Raises what the coordinator refused with."""
    if not response.is_success:
        raise refusal(response)
    return model.model_validate_json(response.content)


def done(response: httpx.Response) -> None:
    """Raises what the coordinator refused with."""
    if not response.is_success:
        raise refusal(response)


def repr_digest(data: bytes) -> str:
    """RFC 9530's name of some bytes."""
    return f"sha-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:"


@dataclass(frozen=True)
class Caller:
    """Somebody with a secret; nobody, without."""

    http: httpx.AsyncClient
    secret: str | None = None

    async def call(self, method: str, path: str, *, headers: Mapping[str, str] | None = None, **content: Any) -> httpx.Response:
        """One request, as it is."""
        own = {} if self.secret is None else {"Authorization": f"Bearer {self.secret}"}
        return await self.http.request(method, path, headers=own | dict(headers or {}), **content)


@dataclass(frozen=True)
class Device(Caller):
    """An agent that does not train: one method per route, and `complete` for a whole job."""

    id: str = ""
    name: str = ""

    def holds(self, job: Job) -> Holder:
        return Holder(self.id, job.id, job.lease.epoch)

    async def whoami(self) -> httpx.Response:
        return await self.call("GET", "/v1/clients/me")

    async def put_profile(self, profile: Profile) -> None:
        done(await self.call("PUT", "/v1/clients/me/profile", json=profile.model_dump(mode="json")))

    async def next_job(self, wait: int | None = None) -> Job | None:
        response = await self.call("POST", "/v1/jobs/next", headers={} if wait is None else {"Prefer": f"wait={wait}"})
        return None if response.status_code == 204 else read(response, Job)

    async def take(self, kind: JobKind = JobKind.train) -> Job:
        """The next job, which must be there and of that kind."""
        job = await self.next_job()
        assert job is not None, f"{self.name} has no job"
        assert job.kind is kind, f"{self.name} has to {job.kind}"
        return job

    async def blob(self, digest: str) -> bytes:
        response = await self.call("GET", f"/v1/blobs/{digest}")
        done(response)
        return response.content

    async def renew(self, job: Job, *, epoch: int | None = None, phase: str = "train", step: int = 0, loss: float | None = None) -> Renewal:
        body = Progress(epoch=epoch or job.lease.epoch, phase=phase, step=step, steps=10, loss=loss)
        return read(await self.call("POST", f"/v1/jobs/{job.id}/lease", json=body.model_dump(mode="json")), Renewal)

    async def give_back(
        self, job: Job, reason: str = "the lid was closed", *, epoch: int | None = None, problem: str | None = None
    ) -> None:
        body = GiveBack(epoch=epoch or job.lease.epoch, reason=reason, problem=problem)
        done(await self.call("DELETE", f"/v1/jobs/{job.id}/lease", json=body.model_dump(mode="json")))

    async def trained(self, job: Job, *, size: float = 0.1, salt: int = 0) -> bytes:
        """A slice as if it had been trained: the one that was handed out, moved by noise that the job's seed decides."""
        start = slices.unpack(await self.blob(job.slice.digest))
        trained = moved(start, job, size=size, salt=salt)
        return b"".join(trained_parts(trained, start, job.trained, job.upload, directions=job.directions, sides=job.sides))

    async def put_slice(self, job: Job, data: bytes, *, epoch: int | None = None, headers: Mapping[str, str] | None = None) -> SliceReceipt:
        sent = {"Lease-Epoch": str(epoch or job.lease.epoch), "Repr-Digest": repr_digest(data)} | dict(headers or {})
        return read(await self.call("PUT", f"/v1/jobs/{job.id}/slice", content=data, headers=sent), SliceReceipt)

    async def head(self, job: Job, *, epoch: int | None = None) -> httpx.Headers:
        """How far the job's slice is."""
        response = await self.call("HEAD", f"/v1/jobs/{job.id}/slice", headers={"Lease-Epoch": str(epoch or job.lease.epoch)})
        done(response)
        return response.headers

    async def patch(
        self, job: Job, data: bytes, start: int, stop: int, *, epoch: int | None = None, headers: Mapping[str, str] | None = None
    ) -> int | SliceReceipt:
        """Send bytes start … stop − 1 of a slice; gives the offset behind them, or the receipt of the whole."""
        sent = {
            "Lease-Epoch": str(epoch or job.lease.epoch),
            "Upload-Offset": str(start),
            "Upload-Length": str(len(data)),
            "Repr-Digest": repr_digest(data),
        }
        response = await self.call("PATCH", f"/v1/jobs/{job.id}/slice", content=data[start:stop], headers=sent | dict(headers or {}))
        if response.status_code == 204:
            return int(response.headers["Upload-Offset"])
        receipt = read(response, SliceReceipt)
        assert response.headers["Upload-Offset"] == str(receipt.bytes)
        return receipt

    async def put_result(self, job: Job, result: Result) -> ResultReceipt:
        return read(await self.call("PUT", f"/v1/jobs/{job.id}/result", json=result.model_dump(mode="json")), ResultReceipt)

    def result(self, job: Job, slice: str | None = None, **changes: Any) -> Result:
        """A result that can be true."""
        metrics = {"accuracy": Metric(value=0.5, weight=3)}
        usage = Usage(seconds=2.0, download_bytes=job.slice.bytes)
        return Result.model_validate(
            {"epoch": job.lease.epoch, "slice": slice, "examples": 5, "metrics": metrics, "usage": usage} | changes
        )

    async def complete(self, job: Job, **changes: Any) -> Result:
        """The whole job, done and told."""
        slice = (await self.put_slice(job, await self.trained(job))).digest if job.kind is JobKind.train else None
        result = self.result(job, slice, **changes)
        await self.put_result(job, result)
        return result


def moved(start: Slice, job: Job, *, size: float = 0.1, salt: int = 0) -> Slice:
    """What a client might have trained: `start` and noise of that size."""
    generator = torch.Generator().manual_seed(job.seed + salt)

    def noisy(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + size * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    label = Label(rank=job.rank, scale=job.scale, round=job.round, base=job.slice.digest, examples=5)
    chosen = {module: pair.of(job.directions) for module, pair in start.factors.items()}
    factors = {module: Factors(b=noisy(pair.b), a=noisy(pair.a)) for module, pair in chosen.items()}
    return Slice(label, factors, {name: noisy(tensor) for name, tensor in start.full.items()})


@dataclass(frozen=True)
class Operator(Caller):
    """Somebody with an operator's token."""

    async def get(self, path: str, model: type[M], **params: Any) -> M:
        return read(await self.call("GET", path, params=params), model)

    async def invite(self, **changes: Any) -> EnrolmentMade:
        return read(await self.call("POST", "/v1/enrolments", json=changes), EnrolmentMade)

    async def create(self, plan: Plan, key: str | None = None) -> RunDetail:
        headers = {} if key is None else {"Idempotency-Key": key}
        return read(await self.call("POST", "/v1/runs", json=plan.model_dump(mode="json"), headers=headers), RunDetail)

    async def run(self, run: str) -> RunDetail:
        return await self.get(f"/v1/runs/{run}", RunDetail)

    async def change_run(self, run: str, verb: str) -> RunView:
        return read(await self.call("POST", f"/v1/runs/{run}/{verb}"), RunView)

    async def round(self, run: str, number: int, attempt: int | None = None) -> RoundView:
        return await self.get(f"/v1/runs/{run}/rounds/{number}", RoundView, **({} if attempt is None else {"attempt": attempt}))

    async def job(self, run: str, job: Job) -> JobView:
        """What became of a job."""
        found = [view for view in (await self.round(run, job.round)).jobs if view.id == job.id]
        assert len(found) == 1
        return found[0]

    async def client(self, device: Device) -> ClientView:
        return await self.get(f"/v1/clients/{device.id}", ClientView)

    async def change_client(self, device: Device, **changes: Any) -> httpx.Response:
        response = await self.call("PATCH", f"/v1/clients/{device.id}", json=changes)
        done(response)
        return response


async def enrol(admin: Operator, name: str, profile: Profile, labels: Mapping[str, str] | None = None) -> Device:
    """A new device, invited and enrolled."""
    invitation = await admin.invite(labels=dict(labels or {}))
    body = Enrol(name=name, profile=profile)
    response = await Caller(admin.http, invitation.token).call("POST", "/v1/clients", json=body.model_dump(mode="json"))
    enrolled = read(response, Enrolled)
    return Device(admin.http, enrolled.credential, id=enrolled.id, name=name)


@dataclass(frozen=True)
class Federation:
    """One coordinator and those who call it."""

    parts: Context
    app: FastAPI
    clock: Clock
    http: httpx.AsyncClient
    admin: Operator
    viewer: Operator
    devices: list[Device] = field(default_factory=list)

    @property
    def nobody(self) -> Caller:
        return Caller(self.http)

    async def enrol(self, name: str, profile: Profile | None = None, labels: Mapping[str, str] | None = None) -> Device:
        """A new device."""
        device = await enrol(self.admin, name, profile or make_profile(), labels or {})
        self.devices.append(device)
        return device

    async def enrol_many(self, count: int) -> list[Device]:
        """Devices with 10, 20, 30, … training rows."""
        return [await self.enrol(f"device {number}", make_profile(train=10 * number)) for number in range(1, count + 1)]

    def tick(self) -> None:
        """Let the conductor do all that is due now; one look more, for a round that ends and the next that opens."""
        while self.parts.conductor.tick():
            pass
        self.parts.conductor.tick()

    def advance(self, seconds: float) -> None:
        """Let time pass, then let the conductor look."""
        self.clock.advance(seconds)
        self.tick()

    async def open(self, plan: Plan) -> str:
        """A run whose first round is open."""
        run = (await self.admin.create(plan)).id
        self.tick()
        return run

    async def training(self, plan: Plan, count: int = 3) -> tuple[str, list[Device], list[Job]]:
        """A run in its first round, with `count` devices that hold a job each. Nothing is evaluated."""
        devices = await self.enrol_many(count)
        run = await self.open(plan.model_copy(update={"evaluation": plan.evaluation.model_copy(update={"every": 0})}))
        return run, devices, [await device.take() for device in devices]

    async def play(self, runs: Iterable[str], devices: Sequence[Device] | None = None, turns: int = 50) -> list[RunView]:
        """Let the devices do, in that order, whatever they are asked until none of the runs is running."""
        views: list[RunView] = []
        for _ in range(turns):
            self.tick()
            for device in devices or self.devices:
                job = await device.next_job()
                if job is not None:
                    await device.complete(job)
            views = [await self.admin.run(run) for run in runs]
            if all(view.state is not RunState.running for view in views):
                return views
        raise AssertionError(f"still running after {turns} turns: {views}")


def make_token(parts: Context, role: Role) -> str:
    """An operator's token, as the coordinator's command makes it."""
    with parts.database.write() as session:
        return access.make_token(session, TokenRequest(name=f"the {role}", role=role), parts.database.clock(session)).token


@asynccontextmanager
async def open_federation(database_url: str, folder: Path, clock: Clock | None = None, **settings: Any) -> AsyncIterator[Federation]:
    """A coordinator over a migrated database. Two that share database, folder and clock are two processes of one service."""
    clock = clock or Clock()
    parts = build(Settings(data=folder, database_url=database_url, executor="threads://1", **settings), clock=clock)
    app = _idle.pop() if _idle and not settings else create_app(parts)
    app.state.context = parts
    # A defect shall be answered as a server answers it, not raised in the caller's face.
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://coordinator") as http:
        admin, viewer = (Operator(http, make_token(parts, role)) for role in (Role.admin, Role.viewer))
        try:
            yield Federation(parts, app, clock, http, admin, viewer)
        finally:
            parts.close()
            if not settings:
                _idle.append(app)


# An application takes a fifth of a second to make, and keeps nothing but the parts that it is given.
_idle: list[FastAPI] = []
