"""Requests made from the OpenAPI document, valid and invalid, as every kind of caller: none is a defect, every refusal a problem."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.core.result import Ok

from protocol.states import JobKind
from tests.coordinator.test_roles import document
from tests.federation import Caller, Federation, make_plan, open_federation, refusal

SCHEMA = schemathesis.openapi.from_dict(document())
OPERATIONS = {found.ok().label: found.ok() for found in SCHEMA.get_all_operations() if isinstance(found, Ok)}
EXAMPLES = 10  # of each kind for each operation, each asked by everybody


@dataclass(frozen=True)
class Stage:
    """A federation in the middle of a round, and the loop that it lives in."""

    runner: asyncio.Runner
    federation: Federation
    callers: list[Caller]  # admin, viewer, client, nobody
    known: dict[str, str]  # identifiers that exist, by the name of their path parameter


@pytest.fixture(scope="module")
def stage(_migrated_sqlite: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("any-request")
    file = shutil.copy(_migrated_sqlite, folder / "test.sqlite")
    with asyncio.Runner() as runner:
        opened = AsyncExitStack()
        federation = runner.run(opened.enter_async_context(open_federation(f"sqlite:///{file}", folder)))
        federation.parts.bell.close()  # polls and streams would wait for something to happen
        yield runner.run(prepared(runner, federation))
        runner.run(opened.aclose())


async def prepared(runner: asyncio.Runner, federation: Federation) -> Stage:
    device, *_ = await federation.enrol_many(3)
    run = await federation.open(make_plan())
    await device.complete(await device.take(JobKind.evaluate))
    job = await device.take()
    callers = [federation.admin, federation.viewer, device, federation.nobody]
    return Stage(runner, federation, callers, {"run": run, "job": job.id, "digest": job.slice.digest})


def sent(case: Any, known: dict[str, str]) -> dict[str, Any] | None:
    """The request, half of the time about what is there; none where HTTP itself could not carry it."""
    for name in set(known) & set(case.path_parameters or {}):
        if len(str(case.path_parameters[name])) % 2:
            case.path_parameters[name] = known[name]
    request = case.as_transport_kwargs(base_url="http://coordinator")
    headers = {name: value for name, value in request["headers"].items() if name.lower() not in ("authorization", "content-length")}
    body = {"json": request["json"]} if "json" in request else {"content": request.get("data") or b""}
    try:
        built = httpx.Request(request["method"], request["url"], params=request["params"], headers=headers, **body)
    except (UnicodeEncodeError, httpx.InvalidURL, TypeError):
        return None
    content = {"headers": built.headers, "content": built.content}
    return {"method": built.method, "path": str(built.url)} | content


def modes(label: str) -> list[GenerationMode]:
    """Valid and invalid requests; only valid ones where nothing is taken that could be wrong."""
    takes = {"parameters", "requestBody", "security"} & OPERATIONS[label].definition.raw.keys()
    return list(GenerationMode) if takes else [GenerationMode.POSITIVE]


@pytest.mark.parametrize(("label", "mode"), [(label, mode) for label in OPERATIONS for mode in modes(label)])
@given(data=st.data())
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_is_a_defect_and_every_refusal_a_problem(stage: Stage, label: str, mode: GenerationMode, data: st.DataObject) -> None:
    operation = OPERATIONS[label]
    documented = {*operation.definition.raw["responses"], "307", "404", "405"}
    request = sent(data.draw(operation.as_strategy(generation_mode=mode)), stage.known)
    assume(request is not None)
    for caller in stage.callers:
        response = stage.runner.run(caller.call(**request or {}))
        assert response.status_code < 500, response.text
        assert str(response.status_code) in documented
        if response.status_code >= 400:
            refusal(response)
