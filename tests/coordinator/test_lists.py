"""Lists by cursor: every row once, newest first, whatever is added meanwhile."""

from __future__ import annotations

import base64
import itertools
import json

import pytest

from protocol import errors
from protocol.views import EnrolmentView, Page, RoundSummary
from tests.federation import Federation, make_plan, refusal


def cursor(at: object, id: object) -> str:
    return base64.urlsafe_b64encode(json.dumps([at, id]).encode()).decode()


async def test_pages_hold_every_row_once_though_rows_are_added_between_them(federation: Federation) -> None:
    for number in range(7):
        federation.clock.advance(number % 2)  # some came at the same moment
        await federation.admin.invite(uses=number + 1)

    seen: list[int] = []
    page = await federation.admin.get("/v1/enrolments", Page[EnrolmentView], limit=2)
    while True:
        seen += [view.uses_left for view in page.items]
        if page.next is None:
            break
        federation.clock.advance(1)
        await federation.admin.invite(uses=100)
        page = await federation.admin.get("/v1/enrolments", Page[EnrolmentView], limit=2, cursor=page.next)

    assert sorted(seen) == list(range(1, 8))
    pairs = [(7, 6), (5, 4), (3, 2)]  # those that came at one moment stand together, newest first
    assert {frozenset(pair) for pair in pairs} <= {frozenset(pair) for pair in itertools.pairwise(seen)}
    assert seen[-1] == 1


@pytest.mark.parametrize("path", ["clients", "runs", "tokens"])
async def test_every_list_is_paged(federation: Federation, path: str) -> None:
    await federation.enrol_many(3)
    for _ in range(3):
        federation.clock.advance(1)
        await federation.admin.create(make_plan())

    whole = (await federation.admin.call("GET", f"/v1/{path}")).json()["items"]
    one_by_one: list[object] = []
    query = {"limit": "1"}
    for _ in whole:
        page = (await federation.admin.call("GET", f"/v1/{path}", params=query)).json()
        one_by_one += page["items"]
        query["cursor"] = page["next"]

    assert query["cursor"] is None
    assert one_by_one == whole
    assert len(whole) >= 2


async def test_rounds_are_paged_oldest_first(small: Federation) -> None:
    await small.enrol_many(3)
    run = await small.open(make_plan(rounds=3, evaluation={"every": 0}))
    await small.play([run])

    first = await small.viewer.get(f"/v1/runs/{run}/rounds", Page[RoundSummary], limit=3)
    rest = await small.viewer.get(f"/v1/runs/{run}/rounds", Page[RoundSummary], limit=3, cursor=first.next)

    assert [view.number for view in first.items + rest.items] == [0, 1, 2, 3]
    assert rest.next is None
    for wrong in ("x", "-1", "²", "9" * 10, ""):
        response = await small.viewer.call("GET", f"/v1/runs/{run}/rounds", params={"cursor": wrong})
        assert isinstance(refusal(response), errors.InvalidRequest)


ID = f"run-{0:016x}"
WRONG = {
    "nothing": "",
    "no base64": "!",
    "not ours": "hello",
    "no JSON": base64.urlsafe_b64encode(b"\xff\xfe").decode(),
    "a number": base64.urlsafe_b64encode(b"7").decode(),
    "an object": base64.urlsafe_b64encode(b'{"a": 1, "b": 2}').decode(),
    "too few": base64.urlsafe_b64encode(b'["2026-01-01T00:00:00+00:00"]').decode(),
    "no time": cursor("yesterday", ID),
    "a time nowhere": cursor("2026-01-01T00:00:00", ID),
    "a time before time": cursor("0001-01-01T00:00:00+14:00", ID),
    "a time after time": cursor("9999-12-31T23:59:59-14:00", ID),
    "no id": cursor("2026-01-01T00:00:00+00:00", None),
    "an id with NUL": cursor("2026-01-01T00:00:00+00:00", "a\0b"),
    "an id of half a character": cursor("2026-01-01T00:00:00+00:00", "\ud800"),
    "letters beyond ASCII": "é",
    "JSON without end": base64.urlsafe_b64encode(b"[" * 200).decode(),
}


@pytest.mark.parametrize("what", WRONG)
async def test_a_cursor_that_was_never_given_out_is_refused(federation: Federation, what: str) -> None:
    for path in ("runs", "clients", "enrolments", "tokens"):
        response = await federation.admin.call("GET", f"/v1/{path}", params={"cursor": WRONG[what]})
        assert isinstance(refusal(response), errors.InvalidRequest)


async def test_a_cursor_in_another_zone_means_the_same_moment(federation: Federation) -> None:
    await federation.admin.invite(uses=1)
    federation.clock.advance(3600)
    await federation.admin.invite(uses=2)

    found = {}
    for zone in ("2026-01-01T00:30:00+00:00", "2026-01-01T02:30:00+02:00", "2025-12-31T19:30:00-05:00"):
        found[zone] = (await federation.admin.get("/v1/enrolments", Page[EnrolmentView], cursor=cursor(zone, f"enrolment-{0:016x}"))).items

    assert [[view.uses_left for view in items] for items in found.values()] == [[1]] * 3
