"""What the operator's client makes of answers that are not the coordinator's."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from admin.adapter import unpack
from admin.client import Client
from protocol import errors


def answering(status: int, body: str) -> httpx.MockTransport:
    return httpx.MockTransport(lambda request: httpx.Response(status, text=body))


@pytest.mark.parametrize(
    ("status", "kind"), [(502, errors.Unavailable), (503, errors.Unavailable), (429, errors.Unavailable), (404, errors.HLoRAError)]
)
def test_a_proxys_refusal_is_judged_by_its_status(status: int, kind: type[errors.HLoRAError]) -> None:
    client = Client("http://localhost", transport=answering(status, "<h1>bad gateway</h1>"))
    with pytest.raises(errors.HLoRAError, match=f"answered {status} without a reason; is HLORA_URL") as caught:
        client.health()
    assert type(caught.value) is kind


def test_a_problem_of_a_newer_coordinator_keeps_its_words_and_facts() -> None:
    body = '{"type":"/problems/too-hot","title":"","status":418,"detail":"wait for the tea","retryable":false,"self":1,"tea":"green"}'
    with pytest.raises(errors.HLoRAError, match="wait for the tea") as caught:
        Client("http://localhost", transport=answering(418, body)).health()
    assert caught.value.facts == {"tea": "green"}


@pytest.mark.parametrize("body", ["<html>", "{}", '{"status":"ok","version":"9","colour":"red"}'])
def test_an_answer_that_is_not_understood_names_the_versions(body: str) -> None:
    with pytest.raises(errors.HLoRAError, match="does not understand the answer"):
        Client("http://localhost", transport=answering(200, body)).health()


@pytest.mark.parametrize("url", ["http://example.org", "http://10.0.0.1:8080"])
def test_a_token_does_not_travel_in_the_clear_unless_that_is_allowed(url: str) -> None:
    with pytest.raises(errors.InsecureTransport, match="use https://"):
        Client(url, SecretStr("secret"))
    Client(url, SecretStr("secret"), insecure=True)


@pytest.mark.parametrize("url", ["https://example.org", "http://localhost:8080", "http://127.0.0.7", "http://[::1]:80"])
def test_https_and_this_machine_are_safe(url: str) -> None:
    Client(url, SecretStr("secret"))


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8080",
        "ftp://example.org",
        "http://",
        "http://host:port",
        "http://two words",
        "http://[::1",
        "http://[v1.x]",
        "http://☃.net",
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="is no address"):
        Client(url)


def test_lists_are_read_page_by_page() -> None:
    pages = {None: '{"items":[],"next":"b"}', "b": '{"items":[],"next":null}'}
    asked: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.params.get("cursor"))
        return httpx.Response(200, text=pages[asked[-1]])

    assert list(Client("http://localhost", transport=httpx.MockTransport(answer)).runs()) == []
    assert asked == [None, "b"]


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "deep/evil", ".."])
def test_an_archive_cannot_write_outside_its_folder(name: str, tmp_path: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, b"")
    with pytest.raises(errors.HLoRAError, match="no plain name"):
        unpack(stream, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.HLoRAError, match="zip archive"):
        unpack(io.BytesIO(b"<html>"), tmp_path)
