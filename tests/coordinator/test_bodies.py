"""What is read of a JSON body: nothing of a stranger's, no more than an honest one has, and none for ever."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from coordinator.routes.bodies import MESSAGE
from protocol import errors
from protocol.messages import LONGEST_PROFILE, MOST_COLUMNS, Dataset, GiveBack, Metric, Result
from protocol.views import TokenMade
from tests.federation import Caller, Federation, make_plan, make_profile, read, refusal

PIECE = 1 << 16
NO_ID = f"nothing-{0:016x}"
JSON = {"Content-Type": "application/json"}


@dataclass
class Endless:
    """A body that goes on for as long as somebody reads it; it knows how much was read."""

    read: int = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while self.read < 1 << 25:
            self.read += PIECE
            yield b" " * PIECE


async def with_bodies(small: Federation) -> list[tuple[str, str, str]]:
    """Method, path and audience of every route that takes JSON, as the application itself tells them; all say how it may be refused."""
    paths: dict[str, Any] = (await small.http.get("/openapi.json")).json()["paths"]
    found = {
        (method.upper(), path, operation["tags"][0]): operation["responses"].keys()
        for path, operations in paths.items()
        for method, operation in operations.items()
        if "application/json" in operation.get("requestBody", {}).get("content", {})
    }
    assert all({"401", "408", "413"} <= told for told in found.values())
    return list(found)


def filled(path: str) -> str:
    return path.replace("{job}", NO_ID).replace("{client}", NO_ID)


async def test_of_no_body_is_more_read_than_its_route_takes(small: Federation) -> None:
    device, invited = await small.enrol("device"), Caller(small.http, (await small.admin.invite()).token)
    routes = await with_bodies(small)
    assert len(routes) >= 9
    for method, path, audience in routes:
        caller = small.admin if audience != "agents" else invited if path == "/v1/clients" else device
        body = Endless()

        response = await caller.call(method, filled(path), content=body, headers=JSON)

        error = refusal(response)
        assert isinstance(error, errors.TooLarge), (method, path)
        largest = error.facts["largest"]
        assert isinstance(largest, int)
        assert body.read <= largest + PIECE
        assert largest <= (8 << 20 if path == "/v1/runs" else 1 << 18), (method, path)


async def test_of_a_strangers_body_nothing_is_read(small: Federation) -> None:
    device = await small.enrol("device")
    likes = [(method, f"/v1/{noun}/slice", "") for method in ("PUT", "PATCH") for noun in ("clients", "runs", f"jobs/{NO_ID}")]
    for method, path, audience in [*await with_bodies(small), *likes]:
        for caller in (small.nobody, Caller(small.http, "hlc_" + "A" * 43), small.viewer if audience == "agents" else device):
            body = Endless()

            refusal(await caller.call(method, filled(path), content=body, headers=JSON | {"Lease-Epoch": "1"}))

            assert body.read == 0, (method, path, caller)


async def test_what_is_announced_too_long_is_refused_before_it_comes(small: Federation) -> None:
    device, body = await small.enrol("device"), Endless()

    response = await device.call("PUT", "/v1/clients/me/profile", content=body, headers=JSON | {"Content-Length": str(2**18 + 1)})

    assert isinstance(refusal(response), errors.TooLarge)
    assert body.read == 0


@pytest.mark.parametrize("kind", ["client", "admin"])
async def test_who_is_revoked_while_its_body_comes_is_refused(small: Federation, kind: str) -> None:
    device = await small.enrol("device")
    second = read(await small.admin.call("POST", "/v1/tokens", json={"name": "second", "role": "admin"}), TokenMade)

    async def slowly() -> AsyncIterator[bytes]:
        yield b"{"
        if kind == "client":
            await small.admin.change_client(device, state="revoked")
        else:
            await small.admin.call("DELETE", f"/v1/tokens/{second.id}")
        await asyncio.sleep(1.1)
        yield b"}"

    caller, way = (
        (device, ("PUT", "/v1/clients/me/profile")) if kind == "client" else (Caller(small.http, second.token), ("POST", "/v1/enrolments"))
    )
    response = await caller.call(*way, content=slowly(), headers=JSON)

    assert isinstance(refusal(response), errors.Unauthenticated)


async def test_the_largest_honest_messages_are_taken(small: Federation) -> None:
    """Each is at its own bounds in every field, and is written with blanks and escapes, as a careless sender would."""
    _, (device, *_), (job, *_) = await small.training(make_plan())
    most = 10**12
    text = LONGEST_PROFILE // (MOST_COLUMNS + 1010)  # of each name
    datasets = {f"{n:0{text}}": Dataset(train=most, held_out=most, columns=[f"{n * 2 + k:0{text}}" for k in range(2)]) for n in range(1000)}
    profile = make_profile().model_copy(update={"datasets": datasets})
    profile.check_extent()
    result = Result(
        epoch=2**53 - 1,
        slice=f"sha256:{0:064}",
        examples=most,
        metrics={f"m{n:063}": Metric(value=-1.2345678901234567e99, weight=1.2345678901234567e14) for n in range(64)},
    )
    reason = GiveBack(epoch=job.lease.epoch, reason="\x01" * 2000)

    taken = await device.call("PUT", "/v1/clients/me/profile", content=json.dumps(profile.model_dump(mode="json")), headers=JSON)
    stale = await device.call("PUT", f"/v1/jobs/{job.id}/result", content=json.dumps(result.model_dump(mode="json")), headers=JSON)
    given = await device.call("DELETE", f"/v1/jobs/{job.id}/lease", content=json.dumps(reason.model_dump(mode="json")), headers=JSON)

    assert taken.status_code == 200, taken.text
    assert isinstance(refusal(stale), errors.StaleLease)
    assert given.status_code == 204
    assert max(len(stale.request.content), len(given.request.content)) < MESSAGE.bytes / 4


def wrong(count: int) -> str:
    """So many names that are none."""
    return "{" + ",".join(f'"{n:x}":0' for n in range(count)) + "}"


LISTS = "[" + ",".join(["[]"] * 1000) + "]"
WORST = {
    "result, unknown names": ("PUT", "/v1/jobs/{job}/result", wrong(7_500)),
    "result, metrics": ("PUT", "/v1/jobs/{job}/result", '{"epoch":1,"examples":1,"metrics":' + wrong(7_500) + "}"),
    "lease, unknown names": ("POST", "/v1/jobs/{job}/lease", wrong(7_500)),
    "profile, unknown names": ("PUT", "/v1/clients/me/profile", wrong(28_000)),
    "profile, data sets": ("PUT", "/v1/clients/me/profile", '{"memory_bytes":1,"training_flops":1,"datasets":' + wrong(28_000) + "}"),
    "profile, data sets within bounds": ("PUT", "/v1/clients/me/profile", '{"memory_bytes":1,"datasets":' + wrong(8_100) + "}"),
    "profile, columns": (
        "PUT",
        "/v1/clients/me/profile",
        '{"memory_bytes":1,"datasets":{' + ",".join(f'"{n}":{{"train":1,"columns":{LISTS}}}' for n in range(85)) + "}}",
    ),
}


@pytest.fixture
def frozen() -> Iterator[None]:
    """As in the server, nobody looks through what was imported when much is made at once."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize("case", WORST)
async def test_the_worst_message_of_a_client_takes_no_more_than_a_moment(small: Federation, case: str) -> None:
    device = await small.enrol("device")
    method, path, text = WORST[case]
    began = time.process_time()

    response = await device.call(method, filled(path), content=text, headers=JSON)

    took = time.process_time() - began
    assert isinstance(refusal(response), errors.TooLarge | errors.InvalidRequest)
    assert took < 0.2
