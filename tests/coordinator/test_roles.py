"""Who may do what: every route with every kind of credential, and nothing of others for a client."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from coordinator.app import build, create_app
from coordinator.settings import Settings
from protocol import errors
from protocol.messages import Enrolled
from protocol.states import JobKind, Role
from protocol.views import EnrolmentMade, Page, TokenMade, TokenView
from tests.federation import Caller, Federation, make_plan, make_profile, open_federation, read, refusal, repr_digest

NO_ID = f"nothing-{0:016x}"
NO_DIGEST = f"sha256:{0:064}"


@dataclass(frozen=True)
class Route:
    """One operation of the application."""

    method: str
    path: str
    audience: str

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


def audience(method: str, path: str, tag: str) -> str:
    """Whom an operation is for, after the protocol; a route that is added falls under one of these rules."""
    if path in ("/healthz", "/readyz"):
        return "anybody"
    if tag == "agents":
        return "enrolment" if (method, path) == ("POST", "/v1/clients") else "client"
    if path.startswith("/v1/tokens") or (tag == "quarantine" and path.endswith("/slice")):
        return "admin"
    return "reader" if method == "GET" else "admin"


def document() -> dict[str, Any]:
    """What the application itself says that it serves."""
    never_opened = f"sqlite:///{tempfile.gettempdir()}/no.sqlite"
    parts = build(Settings(database_url=never_opened, blobs_url="memory://routes", executor="threads://1"))
    described = create_app(parts).openapi()
    parts.close()
    return described


def every_route() -> list[Route]:
    """Every operation, with its audience."""
    return [
        Route(method.upper(), path, audience(method.upper(), path, operation["tags"][0]))
        for path, operations in document()["paths"].items()
        for method, operation in operations.items()
    ]


ROUTES = every_route()
ALLOWED = {"anybody": None, "enrolment": {"enrolment"}, "client": {"client"}, "admin": {"admin"}, "reader": {"admin", "viewer"}}
WITHOUT_IDENTITY = ("nobody", "garbage", "unknown", "basic", "revoked admin", "revoked viewer", "revoked client", "rotated client")


@dataclass(frozen=True)
class Stage:
    """One caller with each kind of credential, and those whose credential is none any more; and the loop they live in."""

    runner: asyncio.Runner
    callers: dict[str, Caller]


@pytest.fixture(scope="module")
def stage(_migrated_sqlite: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("roles")
    database = shutil.copy(_migrated_sqlite, folder / "test.sqlite")
    with asyncio.Runner() as runner:
        opened = AsyncExitStack()
        federation = runner.run(opened.enter_async_context(open_federation(f"sqlite:///{database}", folder)))
        yield Stage(runner, runner.run(every_caller(federation)))
        runner.run(opened.aclose())


async def every_caller(small: Federation) -> dict[str, Caller]:
    http, admin = small.http, small.admin
    device, gone, turned = [await small.enrol(name) for name in ("device", "gone", "turned")]
    enrolment, void = await admin.invite(uses=100), await admin.invite(uses=100)
    await admin.call("DELETE", f"/v1/enrolments/{void.id}")
    await admin.change_client(gone, state="revoked")
    await admin.change_client(turned, rotate=True)
    revoked = {}
    for role in Role:
        made = read(await admin.call("POST", "/v1/tokens", json={"name": "short", "role": role}), TokenMade)
        await admin.call("DELETE", f"/v1/tokens/{made.id}")
        revoked[f"revoked {role}"] = Caller(http, made.token)
    return {
        "nobody": small.nobody,
        "garbage": Caller(http, "garbage"),
        "unknown": Caller(http, "hla_" + "A" * 43),
        "basic": small.nobody,
        "admin": admin,
        "viewer": small.viewer,
        "enrolment": Caller(http, enrolment.token),
        "revoked enrolment": Caller(http, void.token),
        "client": device,
        "revoked client": gone,
        "rotated client": turned,
        **revoked,
    }


def test_the_rules_cover_what_is_served() -> None:
    assert len(ROUTES) > 25
    assert {route.audience for route in ROUTES} == set(ALLOWED)


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_a_route_answers_only_those_it_is_for(stage: Stage, route: Route) -> None:
    path = route.path.replace("{digest}", NO_DIGEST).replace("{number}", "0").replace("{file}", "x")
    for noun in ("run", "job", "client", "enrolment", "token", "contribution"):
        path = path.replace(f"{{{noun}}}", NO_ID)
    for kind, caller in stage.callers.items():
        headers = {"Authorization": "Basic YTpi"} if kind == "basic" else {}
        if route.path == "/v1/events" and kind in ("admin", "viewer"):
            headers["Last-Event-ID"] = "-1"  # refused as a request, not as a caller: the stream would have no end
        response = stage.runner.run(caller.call(route.method, path, headers=headers))

        allowed = ALLOWED[route.audience]
        if allowed is None:
            assert response.status_code == 200, kind
        elif kind in WITHOUT_IDENTITY:
            assert isinstance(refusal(response), errors.Unauthenticated), kind
            assert response.headers["www-authenticate"].startswith("Bearer")
        elif kind.removeprefix("revoked ") not in allowed:
            assert isinstance(refusal(response), errors.Forbidden), kind
        else:
            assert response.is_success or response.status_code in (404, 422, 410), (kind, response.text)


async def test_a_forbidden_caller_is_told_its_role_and_whose_route_it_is(small: Federation) -> None:
    error = refusal(await small.viewer.call("POST", "/v1/enrolments", json={}))

    assert str(error) == "this is for admin credentials; yours is a viewer credential"
    assert error.facts["role"] == "viewer"
    error = refusal(await small.admin.call("POST", "/v1/jobs/next"))
    assert str(error) == "this is for client credentials; yours is an admin credential"


async def test_the_scheme_of_a_credential_may_be_written_in_any_case(small: Federation) -> None:
    response = await small.nobody.call("GET", "/v1/runs", headers={"Authorization": f"bearer {small.viewer.secret}"})

    assert response.status_code == 200


@pytest.mark.parametrize("secret", ["é", "hla_é", "hla_\x7f", "_", "hlc", "hlx_unknown kind", "a" * 10_000])
async def test_a_strange_secret_is_refused_like_any_other(small: Federation, secret: str) -> None:
    response = await small.http.get("/v1/runs", headers={b"Authorization": f"Bearer {secret}".encode("latin-1")})

    assert isinstance(refusal(response), errors.Unauthenticated)


async def test_a_secret_of_one_kind_does_not_pass_for_another(small: Federation) -> None:
    assert small.viewer.secret is not None
    disguised = Caller(small.http, "hla" + small.viewer.secret.removeprefix("hlv"))

    assert isinstance(refusal(await disguised.call("POST", "/v1/enrolments", json={})), errors.Unauthenticated)


async def test_tokens_are_listed_without_their_secrets_and_voided(small: Federation) -> None:
    made = read(await small.admin.call("POST", "/v1/tokens", json={"name": "for the wall", "role": "viewer"}), TokenMade)
    wall = Caller(small.http, made.token)
    assert (await wall.call("GET", "/v1/runs")).status_code == 200

    assert (await small.admin.call("DELETE", f"/v1/tokens/{made.id}")).status_code == 204

    assert isinstance(refusal(await wall.call("GET", "/v1/runs")), errors.Unauthenticated)
    listed = await small.admin.call("GET", "/v1/tokens")
    tokens = {token.id: token for token in read(listed, Page[TokenView]).items}
    assert (tokens[made.id].name, tokens[made.id].role, tokens[made.id].revoked) == ("for the wall", Role.viewer, True)
    assert made.token not in listed.text
    assert isinstance(refusal(await small.admin.call("DELETE", f"/v1/tokens/{NO_ID}")), errors.NotFound)


async def test_a_rotated_credential_voids_the_old_one(small: Federation) -> None:
    device = await small.enrol("device")

    answer = (await small.admin.change_client(device, rotate=True)).json()

    assert isinstance(refusal(await device.whoami()), errors.Unauthenticated)
    assert (await Caller(small.http, answer["credential"]).call("GET", "/v1/clients/me")).json()["name"] == "device"


async def test_a_revoked_client_is_gone_for_good(small: Federation) -> None:
    device = await small.enrol("device")
    await small.admin.change_client(device, state="revoked")

    changes: list[dict[str, Any]] = [{"state": "active"}, {"rotate": True}, {"labels": {}}]
    for change in changes:
        with pytest.raises(errors.Conflict, match="revoked for good"):
            await small.admin.change_client(device, **change)


async def test_a_client_sees_nothing_of_another(federation: Federation) -> None:
    _, (one, two, _), (job, other, _) = await federation.training(make_plan())
    receipt = await one.put_slice(job, await one.trained(job))
    part = {"Upload-Offset": "0", "Upload-Length": "9", "Repr-Digest": repr_digest(b"x")}

    requests: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", f"/v1/jobs/{job.id}/lease", {"json": {"epoch": 1}}),
        ("DELETE", f"/v1/jobs/{job.id}/lease", {"json": {"epoch": 1, "reason": "not mine"}}),
        ("PUT", f"/v1/jobs/{job.id}/slice", {"content": b"x", "headers": {"Lease-Epoch": "1"}}),
        ("HEAD", f"/v1/jobs/{job.id}/slice", {"headers": {"Lease-Epoch": "1"}}),
        ("PATCH", f"/v1/jobs/{job.id}/slice", {"content": b"x", "headers": {"Lease-Epoch": "1", **part}}),
        ("POST", f"/v1/jobs/{job.id}/slice/address", {"headers": {"Lease-Epoch": "1", **part}}),
        ("POST", f"/v1/jobs/{job.id}/slice", {"headers": {"Lease-Epoch": "1", **part}}),
        ("PUT", f"/v1/jobs/{job.id}/result", {"json": {"epoch": 1, "slice": receipt.digest, "examples": 5}}),
        ("GET", f"/v1/blobs/{receipt.digest}", {}),
    ]
    for method, path, content in requests:
        here = refusal(await two.call(method, path, **content))
        there = refusal(await two.call(method, path.replace(job.id, NO_ID).replace(receipt.digest, NO_DIGEST), **content))
        assert isinstance(here, errors.NotFound)
        # Not even whether it exists can be told from the answer.
        assert str(here).replace(job.id, NO_ID).replace(receipt.digest, NO_DIGEST) == str(there)
        assert {**here.facts, "digest": None} == {**there.facts, "digest": None}

    await one.put_result(job, one.result(job, receipt.digest))
    assert other.id != job.id


async def test_a_client_reads_the_slice_of_its_job_while_it_holds_it_and_no_longer(small: Federation) -> None:
    _, (device, *_), (job, *_) = await small.training(make_plan())
    assert len(await device.blob(job.slice.digest)) == job.slice.bytes

    await device.complete(job)

    with pytest.raises(errors.NotFound):
        await device.blob(job.slice.digest)


async def test_identity_comes_from_the_credential_never_from_the_body(small: Federation) -> None:
    """Three uploads of one machine are one contribution: it cannot reach the quorum by itself."""
    run, (device, *_), (job, *_) = await small.training(make_plan())
    slice = (await device.put_slice(job, await device.trained(job))).digest
    for _ in range(3):
        await device.put_result(job, device.result(job, slice))
    for body in ({"client": "client-1"}, {"client_id": "x"}):
        response = await device.call("PUT", f"/v1/jobs/{job.id}/result", json=device.result(job, slice).model_dump(mode="json") | body)
        assert isinstance(refusal(response), errors.InvalidRequest)

    assert (await small.admin.round(run, 1)).contributions == 1


async def test_every_secret_is_told_once_and_differs(small: Federation) -> None:
    invitations = [await small.admin.invite() for _ in range(3)]
    listed = (await small.viewer.call("GET", "/v1/enrolments")).text

    assert len({invitation.token for invitation in invitations}) == 3
    assert all(len(invitation.token) >= 46 and invitation.token not in listed for invitation in invitations)


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


async def test_the_database_holds_no_secret(sqlite_url: str, tmp_path: Path) -> None:
    async with open_federation(sqlite_url, tmp_path) as small:
        invitation: EnrolmentMade = await small.admin.invite()
        body = {"name": "device", "profile": make_profile().model_dump(mode="json")}
        enrolled = read(await Caller(small.http, invitation.token).call("POST", "/v1/clients", json=body), Enrolled)
        secrets = [small.admin.secret, small.viewer.secret, invitation.token, enrolled.credential]

    stored = everything_in(tmp_path)
    assert b"device" in stored
    for secret in secrets:
        assert secret is not None
        assert secret.encode() not in stored


async def test_a_client_that_measures_reads_the_slice_too(small: Federation) -> None:
    device, *_ = await small.enrol_many(3)
    await small.open(make_plan())
    job = await device.take(JobKind.evaluate)

    assert len(await device.blob(job.slice.digest)) == job.slice.bytes
