"""How a machine becomes a client, what it may say of itself, and what operators change of it."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol import errors
from protocol.messages import Enrolled, Profile
from protocol.states import ClientState, RunState
from protocol.views import ClientView, EnrolmentView, Page
from tests.federation import Caller, Federation, make_plan, make_profile, read, refusal

PROFILE = make_profile().model_dump(mode="json")


KEY = f"hlc_{'k' * 43}"


def enrol(federation: Federation, token: str, name: str = "device", profile: Any = PROFILE, **more: Any) -> Any:
    return Caller(federation.http, token).call("POST", "/v1/clients", json={"name": name, "profile": profile, **more})


async def test_a_machine_enrols_and_knows_itself(federation: Federation) -> None:
    invitation = await federation.admin.invite(labels={"site": "north"})

    response = await enrol(federation, invitation.token)

    assert response.status_code == 201
    enrolled = read(response, Enrolled)
    me = (await Caller(federation.http, enrolled.credential).call("GET", "/v1/clients/me")).json()
    assert me == {"id": enrolled.id, "name": "device", "state": "active", "profile": PROFILE}
    view = await federation.viewer.get(f"/v1/clients/{enrolled.id}", ClientView)
    assert (view.labels, view.available, view.rejections, view.rank) == ({"site": "north"}, True, 0, None)


async def test_an_invitation_is_good_for_its_uses_however_many_come_at_once(federation: Federation) -> None:
    invitation = await federation.admin.invite(uses=3)

    responses = await asyncio.gather(*(enrol(federation, invitation.token, f"device {n}") for n in range(8)))

    assert sorted(response.status_code for response in responses) == [201] * 3 + [410] * 5
    assert all(isinstance(refusal(r), errors.EnrolmentOver) for r in responses if r.status_code == 410)
    assert len((await federation.admin.get("/v1/clients", Page[ClientView])).items) == 3


async def test_a_lost_answer_is_asked_for_again_with_the_callers_own_key(federation: Federation) -> None:
    invitation = await federation.admin.invite(uses=2)

    answers = await asyncio.gather(*(enrol(federation, invitation.token, key=KEY) for _ in range(3)))

    first, *others = [read(answer, Enrolled) for answer in answers]
    assert others == [first, first]
    assert first.credential == KEY
    assert (await Caller(federation.http, KEY).call("GET", "/v1/clients/me")).json()["id"] == first.id
    (view,) = (await federation.admin.get("/v1/enrolments", Page[EnrolmentView])).items
    assert view.uses_left == 1
    assert isinstance(refusal(await enrol(federation, invitation.token, key=KEY[:-1] + "-")), errors.NameTaken)
    (view,) = (await federation.admin.get("/v1/enrolments", Page[EnrolmentView])).items
    assert view.uses_left == 1


async def test_a_key_that_is_none_is_refused_and_not_repeated(small: Federation) -> None:
    invitation = await small.admin.invite()

    response = await enrol(small, invitation.token, key="hlc_too-short-for-a-secret")

    assert isinstance(refusal(response), errors.InvalidRequest)
    assert "too-short" not in response.text


async def test_an_invitation_ends_with_its_time(small: Federation) -> None:
    invitation = await small.admin.invite(seconds=60)
    small.clock.advance(60)

    assert isinstance(refusal(await enrol(small, invitation.token)), errors.EnrolmentOver)


async def test_a_revoked_invitation_admits_nobody_and_expels_nobody(small: Federation) -> None:
    invitation = await small.admin.invite(uses=2)
    credential = read(await enrol(small, invitation.token), Enrolled).credential

    await small.admin.call("DELETE", f"/v1/enrolments/{invitation.id}")

    assert isinstance(refusal(await enrol(small, invitation.token, "late")), errors.EnrolmentOver)
    assert (await Caller(small.http, credential).call("GET", "/v1/clients/me")).status_code == 200
    (view,) = (await small.viewer.get("/v1/enrolments", Page[EnrolmentView])).items
    assert (view.uses_left, view.revoked) == (1, True)
    response = await small.admin.call("DELETE", "/v1/enrolments/enrolment-0000000000000000")
    assert isinstance(refusal(response), errors.NotFound)


async def test_a_name_that_is_taken_costs_no_use(federation: Federation) -> None:
    invitation = await federation.admin.invite(uses=2)
    await enrol(federation, invitation.token)

    error = refusal(await enrol(federation, invitation.token))

    assert isinstance(error, errors.NameTaken)
    assert error.facts["name"] == "device"
    (view,) = (await federation.admin.get("/v1/enrolments", Page[EnrolmentView])).items
    assert view.uses_left == 1


async def test_one_name_at_once_is_one_client(federation: Federation) -> None:
    invitation = await federation.admin.invite(uses=5)

    responses = await asyncio.gather(*(enrol(federation, invitation.token) for _ in range(5)))

    assert sorted(response.status_code for response in responses) == [201, 409, 409, 409, 409]
    (view,) = (await federation.admin.get("/v1/enrolments", Page[EnrolmentView])).items
    assert view.uses_left == 4


@pytest.mark.parametrize("name", ["", " device", "-x", "a" * 65, "../x", "dev\0ice", "devíce", "a\nb", "\ud800", 7, None])
async def test_a_name_is_short_and_plain(small: Federation, name: object) -> None:
    invitation = await small.admin.invite()
    body = json.dumps({"name": name, "profile": PROFILE})

    response = await Caller(small.http, invitation.token).call(
        "POST", "/v1/clients", content=body, headers={"Content-Type": "application/json"}
    )

    assert isinstance(refusal(response), errors.InvalidRequest)
    assert (await small.admin.get("/v1/enrolments", Page[EnrolmentView])).items[0].uses_left == 1


WRONG: dict[str, Any] = {
    "no memory": {"memory_bytes": 0},
    "negative memory": {"memory_bytes": -1},
    "memory beyond counting": {"memory_bytes": 2**53},
    "a number of five thousand digits": {"memory_bytes": "@@digits@@"},
    "memory in words": {"memory_bytes": "much"},
    "half a byte": {"memory_bytes": 0.5},
    "speed that is no number": {"training_flops": "@@NaN@@"},
    "infinite speed": {"training_flops": "@@Infinity@@"},
    "speed that overflows": {"training_flops": "@@1e999@@"},
    "absurd speed": {"training_flops": 1e19},
    "no speed": {"training_flops": 0},
    "a link that runs backwards": {"up_bytes_per_second": -1.0},
    "no precision": {"precisions": []},
    "unknown precision": {"precisions": ["int3"]},
    "no core": {"cores": 0},
    "negative rows": {"datasets": {"texts": {"train": -1}}},
    "absurd rows": {"datasets": {"texts": {"train": 10**13}}},
    "too many data sets": {"datasets": {str(n): {"train": 1} for n in range(1001)}},
    "a data set's name without end": {"datasets": {"x" * 129: {"train": 1}}},
    "too many columns": {"datasets": {"texts": {"train": 1, "columns": ["c"] * 1001}}},
    "rows themselves": {"datasets": {"texts": {"train": 1, "rows": ["secret"]}}},
    "half a character": {"device": "\ud800"},
    "half a character as a key": {"datasets": {"\ud800": {"train": 1}}},
    "an unknown member": {"gpu": True},
    "an unknown member of half a character": {"\ud800": True},
    "a largest rank of zero": {"limits": {"largest_rank": 0}},
    "not a profile": None,
    "a list": [],
}


def body(profile: Any) -> str:
    """JSON with what `json` would not write."""
    text = json.dumps(profile)
    return text.replace('"@@digits@@"', "9" * 5000).replace('"@@', "").replace('@@"', "")


@pytest.mark.parametrize("what", WRONG)
async def test_a_profile_that_cannot_be_true_is_refused_and_the_old_one_stays(small: Federation, what: str) -> None:
    device = await small.enrol("device")
    changes = WRONG[what]
    profile = PROFILE | changes if isinstance(changes, dict) else changes

    response = await device.call("PUT", "/v1/clients/me/profile", content=body(profile), headers={"Content-Type": "application/json"})

    assert isinstance(refusal(response), errors.InvalidRequest)
    assert (await device.whoami()).json()["profile"] == PROFILE


WIDE = {str(n): {"train": 1, "columns": [f"{m}" for m in range(1000)]} for n in range(3)}
EXCESSIVE: dict[str, tuple[str, dict[str, Any]]] = {
    "columns": ("names 3,000 columns of 3 data sets; at most 2,000", {"datasets": WIDE}),
    "names of data sets": ("have [0-9,]+ bytes together; at most 65,536", {"datasets": {f"{n:0128}": {"train": 1} for n in range(600)}}),
    "names of columns": ("have [0-9,]+ bytes", {"datasets": {"texts": {"train": 1, "columns": ["я" * 200] * 200}}}),
    "patterns": ("have [0-9,]+ bytes", {"limits": {"models": ["я" * 512] * 100}}),
}


@pytest.mark.parametrize("what", EXCESSIVE)
async def test_a_profile_that_says_more_than_is_read_at_every_look_is_refused_with_what_to_do(small: Federation, what: str) -> None:
    """Each of its parts is as long as it may be by itself; all of it was read for every client whenever a round drew clients."""
    why, changes = EXCESSIVE[what]
    device, invitation = await small.enrol("device"), await small.admin.invite()
    profile = PROFILE | changes

    told = [
        refusal(await device.call("PUT", "/v1/clients/me/profile", json=profile)),
        refusal(await Caller(small.http, invitation.token).call("POST", "/v1/clients", json={"name": "new", "profile": profile})),
    ]

    for error in told:
        assert type(error) is errors.InvalidProfile
        assert re.search(why, error.detail), error.detail
        assert "offer fewer data sets" in error.detail
        assert error.detail.isprintable()
    assert (await device.whoami()).json()["profile"] == PROFILE
    left = {found.id: found.uses_left for found in (await small.admin.get("/v1/enrolments", Page[EnrolmentView])).items}
    assert left[invitation.id] == 1


async def test_a_profile_of_as_many_columns_as_may_be_is_taken(small: Federation) -> None:
    device = await small.enrol("device")
    profile = make_profile(datasets={name: WIDE[name] for name in ("0", "1")})

    await device.put_profile(profile)

    assert (await device.whoami()).json()["profile"] == profile.model_dump(mode="json")


async def test_text_with_nul_is_kept_or_refused_but_never_a_defect(federation: Federation) -> None:
    device = await federation.enrol("device")
    profile = make_profile(device="c\0pu", software={"a\0": "b\0"}, datasets={"te\0xts": {"train": 1, "columns": ["\0"]}})

    response = await device.call("PUT", "/v1/clients/me/profile", json=profile.model_dump(mode="json"))

    assert response.status_code == 200 or isinstance(refusal(response), errors.InvalidRequest)
    assert (await federation.admin.call("GET", "/v1/clients")).status_code == 200


EDGES = st.sampled_from([5e-324, 1e-300, 1e-9, 1.0, 1e9, 1e12])
PROFILES: st.SearchStrategy[dict[str, Any]] = st.builds(
    dict,
    memory_bytes=st.sampled_from([1, 1000, 10**9, 2**53 - 1]),
    training_flops=st.one_of(EDGES, st.just(1e18)),
    up_bytes_per_second=st.none() | EDGES,
    down_bytes_per_second=st.none() | EDGES,
    cores=st.sampled_from([1, 100_000]),
    device=st.text(max_size=5),
    datasets=st.fixed_dictionaries({"texts": st.fixed_dictionaries({"train": st.sampled_from([1, 10**12])})}),
    limits=st.fixed_dictionaries(
        {},
        optional={
            "largest_rank": st.sampled_from([1, 4, 10**30]),
            "max_steps": st.sampled_from([1, 10**12]),
            "max_bytes": st.sampled_from([0, 1, 2**53 - 1]),
            "models": st.lists(st.text("[]*?!-abse^\\", max_size=12), max_size=3),
        },
    ),
)


@given(odd=PROFILES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_profile_of_one_machine_keeps_a_run_of_others_from_opening(small: Federation, odd: dict[str, Any]) -> None:
    if not small.devices:
        await small.enrol_many(3)
        await small.enrol("odd")
    await small.devices[3].put_profile(make_profile(**odd))
    run = await small.open(make_plan(evaluation={"every": 0}, ranks={"name": "capacity", "ladder": [2, 4]}))

    assert len((await small.admin.round(run, 1)).jobs) >= 3
    await small.admin.change_run(run, "stop")


async def test_an_operator_labels_pauses_and_reinstates_a_client(federation: Federation) -> None:
    device = await federation.enrol("device")

    await federation.admin.change_client(device, labels={"site": "south"}, state="paused")
    paused = await federation.viewer.get(f"/v1/clients/{device.id}", ClientView)
    assert (paused.labels, paused.state, paused.reason, paused.available) == (
        {"site": "south"},
        ClientState.paused,
        "by an operator",
        False,
    )

    await federation.admin.change_client(device, state="active")
    active = await federation.viewer.get(f"/v1/clients/{device.id}", ClientView)
    assert (active.labels, active.state, active.reason, active.available) == ({"site": "south"}, ClientState.active, None, True)


async def test_an_unknown_client_is_not_found(small: Federation) -> None:
    for method, content in (("GET", {}), ("PATCH", {"json": {"state": "paused"}})):
        response: httpx.Response = await small.admin.call(method, "/v1/clients/client-0000000000000000", **content)
        assert isinstance(refusal(response), errors.NotFound)


@pytest.mark.parametrize(
    "change", [{"state": "gone"}, {"labels": {str(n): "" for n in range(65)}}, {"name": "other"}, {"labels": {"a": 1}}]
)
async def test_a_change_that_is_none_is_refused(small: Federation, change: dict[str, Any]) -> None:
    device = await small.enrol("device")

    with pytest.raises(errors.InvalidRequest):
        await small.admin.change_client(device, **change)


@pytest.mark.parametrize(
    "request_", [{"uses": 0}, {"uses": -1}, {"uses": 10**6}, {"seconds": 0}, {"seconds": -1}, {"seconds": 1e12}, {"use": 1}]
)
async def test_an_invitation_that_could_admit_nobody_or_everybody_is_refused(small: Federation, request_: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidRequest):
        await small.admin.invite(**request_)


async def test_a_machine_that_has_not_been_seen_is_not_available(small: Federation) -> None:
    device = await small.enrol("device")
    small.clock.advance(51)  # twice the pace of 20 s, and 10 s for the way
    assert not (await small.admin.client(device)).available

    await device.next_job()

    view = await small.admin.client(device)
    assert (view.available, view.last_seen) == (True, small.clock.now)


async def test_machines_seen_long_ago_are_waited_for(small: Federation) -> None:
    await small.enrol_many(3)
    small.clock.advance(3600)
    run = await small.open(make_plan())

    view = await small.admin.run(run)

    assert view.state is RunState.running
    assert "device 1: not seen lately" in str(view.reason)


async def test_a_profile_says_what_it_said(small: Federation) -> None:
    full = make_profile(
        device="Orin",
        cores=6,
        up_bytes_per_second=1e6,
        down_bytes_per_second=2e6,
        precisions=["bfloat16", "float32"],
        limits={"max_steps": 9},
    )
    device = await small.enrol("device")

    await device.put_profile(full)

    assert Profile.model_validate((await device.whoami()).json()["profile"]) == full
