"""Half a character or a NUL at any place of any body is refused, and nobody is kept from being answered by it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import update

from coordinator.tables import Client, Enrolment, Job
from protocol import errors
from protocol.states import JobKind
from protocol.views import ClientView, EnrolmentView, Page
from tests.coordinator.test_roles import document
from tests.federation import Caller, Federation, make_plan, make_profile, refusal

ODD = {"half a character": "\ud800", "half a character within": "Z\udcfcrich", "NUL": "\0", "NUL within": "a\0b"}
PROFILE = make_profile(
    limits={"models": ["org/*"]}, datasets={"texts": {"train": 10, "held_out": 3, "columns": ["text"]}}, software={"torch": "2.9"}
).model_dump(mode="json")
PLAN = make_plan(adapter={"modules": ["key"], "full": ["head"]}, continues=f"sha256:{1:064}", norm={"bound": 1.0}).model_dump(mode="json")
BY_LABEL = {"name": "labels", "ladder": [2, 4], "options": {"label": "class", "table": {"phone": 2, "desk": 4}, "default": 2}}
LANGUAGE = make_plan(task={"kind": "causal-lm", "prompt": "question"}, ranks=BY_LABEL).model_dump(mode="json")


@dataclass(frozen=True)
class Asked:
    """A request that is good as it is, but for what it names."""

    caller: Caller
    method: str
    path: str  # as the OpenAPI document has it
    body: Any
    job: str = ""

    @property
    def address(self) -> str:
        return self.path.replace("{job}", self.job).replace("{client}", "client-0000000000000000")


async def every_body(federation: Federation) -> list[Asked]:
    """A request for every route that takes JSON, with every field that it may have."""
    device, *_ = await federation.enrol_many(3)
    await federation.open(make_plan())
    job = await device.take(JobKind.evaluate)
    newcomer = Caller(federation.http, (await federation.admin.invite(uses=500)).token)
    epoch = job.lease.epoch
    result = device.result(job, f"sha256:{1:064}").model_dump(mode="json")
    return [
        Asked(newcomer, "POST", "/v1/clients", {"name": "late", "profile": PROFILE, "key": f"hlc_{'k' * 43}"}),
        Asked(device, "PUT", "/v1/clients/me/profile", PROFILE),
        Asked(device, "POST", "/v1/jobs/{job}/lease", {"epoch": epoch, "phase": "train", "step": 1, "steps": 2, "loss": 0.5}, job.id),
        Asked(device, "DELETE", "/v1/jobs/{job}/lease", {"epoch": epoch, "reason": "a lid", "problem": "policy-refusal"}, job.id),
        Asked(device, "PUT", "/v1/jobs/{job}/result", result, job.id),
        Asked(federation.admin, "POST", "/v1/runs", PLAN),
        Asked(federation.admin, "POST", "/v1/runs", LANGUAGE),
        Asked(federation.admin, "PATCH", "/v1/clients/{client}", {"labels": {"site": "north"}, "state": "active", "rotate": False}),
        Asked(federation.admin, "POST", "/v1/enrolments", {"uses": 1, "seconds": 60, "labels": {"site": "north"}}),
        Asked(federation.admin, "POST", "/v1/tokens", {"name": "ops", "role": "admin"}),
    ]


def spoilt(body: Any, odd: str) -> Iterator[Any]:
    """The body once for every place at which a text may stand: for each value, each name in a table, and one more in each."""
    yield odd
    if isinstance(body, dict):
        for name, value in body.items():
            yield from (body | {name: other} for other in spoilt(value, odd))
            yield {(odd if each == name else each): part for each, part in body.items()}
        yield body | {odd: next(iter(body.values()), odd)}
    if isinstance(body, list):
        for at, value in enumerate(body):
            yield from ([*body[:at], other, *body[at + 1 :]] for other in spoilt(value, odd))
        yield [*body, odd]


async def test_every_route_that_takes_json_is_asked(small: Federation) -> None:
    taking = {
        (method.upper(), path)
        for path, operations in document()["paths"].items()
        for method, operation in operations.items()
        if "application/json" in operation.get("requestBody", {}).get("content", {})
    }

    assert {(asked.method, asked.path) for asked in await every_body(small)} == taking


@pytest.mark.parametrize("what", ODD)
async def test_a_text_that_cannot_be_told_or_kept_is_refused_wherever_it_stands(federation: Federation, what: str) -> None:
    for asked in await every_body(federation):
        for body in spoilt(asked.body, ODD[what]):
            content = json.dumps(body)
            response = await asked.caller.call(asked.method, asked.address, content=content, headers={"Content-Type": "application/json"})
            assert response.status_code < 500, (asked.path, content, response.text)
            assert isinstance(refusal(response), errors.InvalidRequest), (asked.path, content)

    for path in ("/v1/clients", "/v1/enrolments", "/v1/runs", "/v1/tokens", "/v1/quarantine"):
        assert (await federation.admin.call("GET", path)).status_code == 200


async def test_what_was_kept_before_it_was_refused_is_still_told(small: Federation) -> None:
    run, (device, *_), (job, *_) = await small.training(make_plan())
    await small.admin.invite()
    with small.parts.database.write() as session:
        session.execute(update(Client).where(Client.id == device.id).values(labels={"site": "Z\udcfcrich"}))
        session.execute(update(Enrolment).values(labels={"\ud800": "x" * 1000}))
        session.execute(
            update(Job).where(Job.id == job.id).values(progress={"epoch": 1, "phase": "\0", "step": 1, "steps": 2, "loss": None})
        )

    clients = {view.name: view for view in (await small.viewer.get("/v1/clients", Page[ClientView])).items}
    enrolments = (await small.viewer.get("/v1/enrolments", Page[EnrolmentView])).items
    assert clients[device.name].labels == {"site": "Z?rich"}
    assert all(view.labels == {"?": "x" * 1000} for view in enrolments)
    assert (await small.viewer.call("GET", f"/v1/runs/{run}/rounds/1")).status_code == 200
