"""One contract for every refusal: the media type, the members, a type that both sides know, and the same class at both ends."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import problems
from protocol import errors
from protocol.messages import Problem
from tests.federation import Federation, refusal

EVERY = list(errors.every_error())


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.slug())
def test_an_error_comes_back_as_the_class_that_was_raised(kind: type[errors.HLoRAError]) -> None:
    answer = problems.answer(kind("rank 8 was expected, 4 came", expected=8, came=4))

    body = json.loads(bytes(answer.body))
    assert answer.media_type == "application/problem+json"
    assert body["status"] == answer.status_code == problems.status(kind)
    assert errors.by_slug(body["type"].removeprefix("/problems/")) is kind
    assert (body["title"], body["detail"], body["retryable"]) == (kind.title(), "rank 8 was expected, 4 came", kind.retryable)
    assert (body["expected"], body["came"]) == (8, 4)


def test_every_kind_of_error_has_a_name_of_its_own() -> None:
    assert len({kind.slug() for kind in EVERY}) == len({kind.title() for kind in EVERY}) == len(EVERY)


def test_a_kind_from_a_newer_coordinator_is_still_an_error() -> None:
    assert errors.by_slug("invented-tomorrow") is errors.HLoRAError


@given(
    facts=st.dictionaries(
        st.sampled_from(["type", "title", "status", "retryable", "rank", "tensor"]), st.integers() | st.text("abc"), max_size=7
    )
)
def test_no_fact_takes_the_place_of_a_member(facts: dict[str, Any]) -> None:
    body = problems.problem(errors.StaleLease("again", **facts)).model_dump()

    assert (body["type"], body["status"], body["detail"], body["retryable"]) == ("/problems/stale-lease", 409, "again", False)
    assert {name: body[name] for name in facts if name not in Problem.model_fields} == {
        name: value for name, value in facts.items() if name not in Problem.model_fields
    }


def test_an_error_without_words_says_its_title() -> None:
    assert problems.problem(errors.NameTaken()).detail == "Another client has that name"


async def test_a_path_that_is_not_there_is_a_problem(small: Federation) -> None:
    for path in ("/", "/v1", "/v2/runs", "/v1/../etc/passwd", "/v1/jobs/%00/lease", "/%ff"):
        response = await small.admin.call("GET", path)
        assert response.status_code in (404, 405)
        assert isinstance(refusal(response), (errors.NotFound, errors.MethodNotAllowed))


async def test_a_method_that_is_not_taken_is_a_problem_that_names_those_that_are(small: Federation) -> None:
    for method in ("DELETE", "TRACE", "PROPFIND"):
        response = await small.admin.call(method, "/v1/runs")
        assert isinstance(refusal(response), errors.MethodNotAllowed)
        assert {name.strip() for name in response.headers["allow"].split(",")} & {"GET", "POST"}


BODIES: dict[str, tuple[bytes, dict[str, str]]] = {
    "no JSON": (b"{", {"Content-Type": "application/json"}),
    "no UTF-8": (b'{"name": "\xff"}', {"Content-Type": "application/json"}),
    "no body": (b"", {"Content-Type": "application/json"}),
    "a form": (b"name=x", {"Content-Type": "application/x-www-form-urlencoded"}),
    "another encoding": (b"{}", {"Content-Type": "application/json", "Content-Encoding": "gzip"}),
    "no type": (b'{"name": "x"}', {"Content-Type": ""}),
    "nothing that counts": (b"{}", {"Content-Type": "application/json"}),
    "more than counts": (b'{"name": "x", "role": "admin", "more": 1}', {"Content-Type": "application/json"}),
    "half a character": (b'{"name": "\\ud800"}', {"Content-Type": "application/json"}),
    "half a character as a name": (b'{"\\ud800": 1}', {"Content-Type": "application/json"}),
    "JSON without end": (b'{"name": ' + b"[" * 50_000, {"Content-Type": "application/json"}),
    "a number without end": (b'{"name": ' + b"9" * 50_000 + b"}", {"Content-Type": "application/json"}),
}


@pytest.mark.parametrize("what", BODIES)
async def test_a_body_that_is_none_is_a_problem_that_says_where(small: Federation, what: str) -> None:
    content, headers = BODIES[what]

    response = await small.admin.call("POST", "/v1/tokens", content=content, headers=headers)

    assert isinstance(refusal(response), errors.InvalidRequest)


async def test_every_fault_of_a_body_is_named_with_its_place(small: Federation) -> None:
    error = refusal(await small.admin.call("POST", "/v1/enrolments", json={"uses": 0, "seconds": -1, "more": True}))

    assert isinstance(faults := error.facts["faults"], list)
    assert {fault["where"] for fault in faults} == {"body.uses", "body.seconds", "body.more"}
    assert str(error).startswith("body.")


async def test_a_thousand_faults_are_not_all_told(small: Federation) -> None:
    response = await small.admin.call("POST", "/v1/enrolments", json={f"more {number}": number for number in range(1000)})

    assert isinstance(refusal(response), errors.InvalidRequest)
    assert len(response.content) < 10_000


@pytest.mark.parametrize("query", ["limit=0", "limit=501", "limit=x", "limit=-1", "limit=1e3", "cursor=" + "x" * 301])
async def test_a_parameter_that_is_none_is_a_problem(small: Federation, query: str) -> None:
    for path in ("/v1/runs", "/v1/clients", "/v1/enrolments", "/v1/tokens"):
        assert isinstance(refusal(await small.admin.call("GET", f"{path}?{query}")), errors.InvalidRequest)
