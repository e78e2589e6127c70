"""The agent's side of HTTP: faults of the network, and what answers mean. The server here does only what a test tells it."""

from __future__ import annotations

import base64
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from agent.client import Client
from agent.connection import Retry
from protocol import VERSION, errors
from protocol.messages import BlobRef, Enrol, GiveBack, Profile, Progress

PROFILE = Profile(memory_bytes=1, training_flops=1)
ITSELF = JSONResponse({"id": "c", "name": "device", "state": "active", "profile": PROFILE.model_dump(mode="json")})
AWAY = httpx.ConnectError("refused")
DATA = b"the bytes of a slice"
REF = BlobRef(digest=f"sha256:{hashlib.sha256(DATA).hexdigest()}", bytes=len(DATA))


def problem(kind: type[errors.HLoRAError], headers: dict[str, str] | None = None, **facts: object) -> Response:
    body = {"type": f"/problems/{kind.slug()}", "title": kind.title(), "status": 400, "detail": "why", "retryable": kind.retryable}
    return JSONResponse({**body, **facts}, 400, headers, "application/problem+json")


Answer = Response | Callable[[Request], Response] | Exception


@dataclass
class Server:
    """Gives its answers in order, the last one for ever, and remembers what it was asked."""

    answers: list[Answer]
    asked: list[Request] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        self.bodies.append(await request.body())
        self.asked.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        response = answer if isinstance(answer, Response) else answer(request)
        await response(scope, receive, send)

    async def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)

    def client(self, attempts: int = 6) -> Client:
        return Client(
            "http://localhost",
            SecretStr("the credential"),
            transport=httpx.ASGITransport(app=self),
            sleep=self.pause,
            chance=random.Random(0),
            retry=Retry(attempts=attempts),
        )


async def test_every_request_carries_the_credential_and_the_version() -> None:
    server = Server([ITSELF])
    async with server.client() as client:
        await client.me()
    assert server.asked[0].headers["authorization"] == "Bearer the credential"
    assert server.asked[0].headers["hlora-version"] == VERSION


async def test_enrolment_carries_the_token_and_is_tried_once() -> None:
    server = Server([AWAY])
    async with server.client() as client:
        with pytest.raises(errors.Unavailable, match="does not answer"):
            await client.enrol(SecretStr("the token"), Enrol(name="device", profile=PROFILE))
    assert [request.headers["authorization"] for request in server.asked] == ["Bearer the token"]


@pytest.mark.parametrize("kind", [k for k in errors.every_error() if not k.retryable], ids=lambda kind: kind.slug())
async def test_a_problem_is_raised_as_the_error_that_it_stands_for_and_not_tried_again(kind: type[errors.HLoRAError]) -> None:
    server = Server([problem(kind, epoch=7)])
    async with server.client() as client:
        with pytest.raises(kind) as raised:
            await client.me()
    assert type(raised.value) is kind
    assert raised.value.detail == "why"
    assert raised.value.facts["epoch"] == 7
    assert len(server.asked) == 1


async def test_a_problem_that_only_a_newer_coordinator_knows_is_still_a_refusal() -> None:
    newer = {"type": "/problems/solar-flare", "title": "t", "status": 400, "detail": "why", "retryable": False, "self": 1}
    async with Server([JSONResponse(newer, 400)]).client() as client:
        with pytest.raises(errors.HLoRAError, match="why"):
            await client.me()


async def test_what_may_pass_is_tried_again_after_growing_pauses() -> None:
    server = Server([AWAY, problem(errors.Unavailable), PlainTextResponse("bad gateway", 502), AWAY, ITSELF])
    async with server.client() as client:
        assert (await client.me()).name == "device"
    assert all(0 <= pause <= limit for pause, limit in zip(server.pauses, [1.0, 2.0, 4.0, 8.0], strict=True))


async def test_what_does_not_pass_is_an_error_in_the_end() -> None:
    server = Server([AWAY])
    async with server.client(attempts=3) as client:
        with pytest.raises(errors.Unavailable, match=r"ConnectError: refused\); check the address"):
            await client.me()
    assert len(server.asked) == 3


async def test_the_pause_that_the_server_asks_for_is_the_least() -> None:
    server = Server([problem(errors.Unavailable, {"Retry-After": "17"}), ITSELF])
    async with server.client() as client:
        await client.me()
    assert server.pauses == [17.0]


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, errors.Unauthenticated), (403, errors.Forbidden), (404, errors.NotFound), (413, errors.TooLarge), (400, errors.HLoRAError)],
)
async def test_an_answer_that_is_no_problem_is_judged_by_its_status(status: int, kind: type[errors.HLoRAError]) -> None:
    async with Server([PlainTextResponse("<html>", status)]).client() as client:
        with pytest.raises(kind, match="is the address right"):
            await client.me()


async def test_an_answer_that_is_not_understood_says_so() -> None:
    async with Server([JSONResponse({"hello": "world"})]).client() as client:
        with pytest.raises(errors.OutdatedAgent, match="update the agent, or check the address"):
            await client.me()


@pytest.mark.parametrize(("headers", "seconds"), [({"Retry-After": "2.5"}, 2.5), ({}, 0.0), ({"Retry-After": "tomorrow"}, 0.0)])
async def test_no_work_is_the_time_after_which_to_ask_again(headers: dict[str, str], seconds: float) -> None:
    server = Server([Response(status_code=204, headers=headers)])
    async with server.client() as client:
        assert await client.next_job(20.0) == seconds
    assert server.asked[0].headers["prefer"] == "wait=20"


async def test_a_job_is_given_back_with_a_body() -> None:
    server = Server([Response(status_code=204)])
    async with server.client() as client:
        await client.give_back("job-1", GiveBack(epoch=3, reason="no room", problem="memory-refusal"))
    assert server.asked[0].method == "DELETE"
    assert GiveBack.model_validate_json(server.bodies[0]) == GiveBack(epoch=3, reason="no room", problem="memory-refusal")


async def test_a_renewal_does_not_outlive_its_worth() -> None:
    server = Server([AWAY])
    async with server.client() as client:
        with pytest.raises(errors.Unavailable):
            await client.renew("job-1", Progress(epoch=1))
    assert len(server.asked) == 2


async def test_a_slice_is_fetched_whole_into_its_file(tmp_path: Path) -> None:
    async with Server([Response(DATA)]).client() as client:
        await client.blob(REF, tmp_path / "slice")
    assert (tmp_path / "slice").read_bytes() == DATA


@pytest.mark.parametrize("wrong", [DATA[:-1], DATA + b"!", b"other bytes of a len"])
async def test_bytes_that_are_not_those_asked_for_are_fetched_again(tmp_path: Path, wrong: bytes) -> None:
    server = Server([Response(wrong), AWAY, Response(DATA)])
    async with server.client() as client:
        await client.blob(REF, tmp_path / "slice")
    assert (tmp_path / "slice").read_bytes() == DATA
    assert len(server.asked) == 3


async def test_bytes_that_are_never_right_leave_no_file(tmp_path: Path) -> None:
    async with Server([Response(DATA[::-1])]).client(attempts=2) as client:
        with pytest.raises(errors.DigestMismatch):
            await client.blob(REF, tmp_path / "slice")
    assert not (tmp_path / "slice").exists()


async def test_a_slice_that_is_not_there_is_not_asked_for_again(tmp_path: Path) -> None:
    server = Server([problem(errors.NotFound)])
    async with server.client() as client:
        with pytest.raises(errors.NotFound):
            await client.blob(REF, tmp_path / "slice")
    assert len(server.asked) == 1


async def test_a_small_slice_is_sent_in_one_piece_with_epoch_length_and_digest(tmp_path: Path) -> None:
    (tmp_path / "slice").write_bytes(DATA)
    server = Server([JSONResponse({"digest": REF.digest, "bytes": REF.bytes})])
    async with server.client() as client:
        assert (await client.put_slice("job-1", 4, REF, tmp_path / "slice")).digest == REF.digest
    assert server.bodies == [DATA]
    headers = server.asked[0].headers
    assert headers["lease-epoch"] == "4"
    assert headers["content-length"] == str(len(DATA))
    assert "transfer-encoding" not in headers
    assert headers["repr-digest"] == f"sha-256=:{base64.b64encode(hashlib.sha256(DATA).digest()).decode()}:"


def stands(offset: object) -> Response:
    return Response(status_code=204, headers={"Upload-Offset": str(offset)})


RECEIPT = JSONResponse({"digest": REF.digest, "bytes": REF.bytes})


async def sent(server: Server, folder: Path, attempts: int = 6) -> list[tuple[str, str | None, bytes]]:
    """Continue an upload; gives what was asked: method, offset, body."""
    (folder / "slice").write_bytes(DATA)
    async with server.client(attempts) as client:
        await client.put_slice("job-1", 4, REF, folder / "slice", again=True)
    return [(request.method, request.headers.get("upload-offset"), body) for request, body in zip(server.asked, server.bodies, strict=True)]


async def test_an_upload_goes_on_where_the_coordinator_says_that_it_stands(tmp_path: Path) -> None:
    asked = await sent(Server([stands(5), problem(errors.OffsetMismatch, offset=12), stands(15), RECEIPT]), tmp_path)
    assert asked == [("HEAD", None, b""), *(("PATCH", str(n), DATA[n:]) for n in (5, 12, 15))]


@pytest.mark.parametrize("offset", [5, 3, 10**6, "many", None])
async def test_an_offset_that_cannot_be_is_asked_for_again(tmp_path: Path, offset: object) -> None:
    asked = await sent(Server([stands(5), problem(errors.OffsetMismatch, offset=offset), stands(5), RECEIPT]), tmp_path)
    assert [method for method, *_ in asked] == ["HEAD", "PATCH", "HEAD", "PATCH"]


@pytest.mark.parametrize("offset", [len(DATA), "", "-1", "all"])
async def test_a_coordinator_that_does_not_say_how_much_it_has_is_asked_again(tmp_path: Path, offset: object) -> None:
    asked = await sent(Server([stands(offset), stands(5), RECEIPT]), tmp_path)
    assert [method for method, *_ in asked] == ["HEAD", "HEAD", "PATCH"]


async def test_the_reason_of_an_answer_without_a_body_is_in_its_link() -> None:
    link = {"Link": f'</problems/{errors.JobOver.slug()}>; rel="type"'}
    async with Server([Response(status_code=410, headers=link)]).client() as client:
        with pytest.raises(errors.JobOver):
            await client.me()


async def test_a_server_that_knows_no_ranges_sends_everything_again(tmp_path: Path) -> None:
    (tmp_path / "slice.part").write_bytes(DATA[:7])
    server = Server([Response(DATA)])
    async with server.client() as client:
        assert await client.blob(REF, tmp_path / "slice") == len(DATA)
    assert server.asked[0].headers["range"] == "bytes=7-"
    assert server.asked[0].headers["if-range"] == f'"{REF.digest}"'
    assert (tmp_path / "slice").read_bytes() == DATA


async def test_a_home_folder_that_is_none_is_no_lack_of_room(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    async with Server([Response(DATA)]).client() as client:
        with pytest.raises(OSError, match=r"(?i)not a directory|file exists"):
            await client.blob(REF, tmp_path / "home" / "slice")


@pytest.mark.parametrize("url", ["http://example.org", "http://10.1.2.3:8080", "http://localhost.example.org"])
def test_a_credential_does_not_travel_in_the_clear_unless_that_is_allowed(url: str) -> None:
    with pytest.raises(errors.InsecureTransport, match="use https"):
        Client(url)
    Client(url, insecure=True)


@pytest.mark.parametrize("url", ["example.org", "127.0.0.1:8080", "ftp://example.org", "https://", "http://example.org:port", ""])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="no address of a coordinator"):
        Client(url, insecure=True)


@pytest.mark.parametrize("url", ["https://example.org", "http://localhost:8080", "http://127.0.0.1", "http://[::1]:8080"])
def test_https_and_loopback_need_no_permission(url: str) -> None:
    Client(url)


def test_the_credential_is_not_in_what_is_printed() -> None:
    client = Client("http://localhost", SecretStr("the credential"))
    assert "the credential" not in repr(vars(client))
