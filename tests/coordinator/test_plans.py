"""Plans that could never be carried out are refused when the run is made, not when a round fails."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from sqlalchemy import update

from coordinator.tables import Run
from protocol import errors, feasible
from protocol.plan import Plan
from protocol.states import RunState
from protocol.views import Description, Page, RunView
from tests.federation import LAYOUT, Federation, make_plan, refusal

PLAN: dict[str, Any] = make_plan().model_dump(mode="json")
RANKS, COHORT, TIMES, TRAINING, ADAPTER = (PLAN[member] for member in ("ranks", "cohort", "times", "training", "adapter"))

IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "an empty ladder": {"ranks": RANKS | {"ladder": []}},
    "a falling ladder": {"ranks": RANKS | {"ladder": [4, 2]}},
    "a ladder with a rung twice": {"ranks": RANKS | {"ladder": [4, 4]}},
    "rank zero": {"ranks": RANKS | {"ladder": [0, 4]}},
    "a negative rank": {"ranks": RANKS | {"ladder": [-2, 4]}},
    "an endless ladder": {"ranks": RANKS | {"ladder": list(range(1, 66))}},
    "a rank off the ladder": {"ranks": RANKS | {"options": {"rank": 3}}},
    "an unknown rank policy": {"ranks": RANKS | {"name": "guess"}},
    "a rank policy that is a path": {"ranks": RANKS | {"name": "../os"}},
    "a rank policy that is a module": {"ranks": RANKS | {"name": "__init__"}},
    "an unknown option of the rank policy": {"ranks": RANKS | {"options": {"rank": 4, "luck": 1}}},
    "an option of the wrong kind": {"ranks": RANKS | {"options": {"rank": "four"}}},
    "an unknown strategy": {"strategy": {"name": "magic"}},
    "a strategy that is a module": {"strategy": {"name": "subprocess"}},
    "an unknown option of the strategy": {"strategy": {"name": "hlora", "options": {"luck": 1}}},
    "a quorum above the target": {"cohort": COHORT | {"quorum": 4}},
    "no quorum": {"cohort": COHORT | {"quorum": 0}},
    "a negative target": {"cohort": COHORT | {"target": -1}},
    "under-selection": {"cohort": COHORT | {"over_selection": 0.5}},
    "no attempt": {"cohort": COHORT | {"attempts": 0}},
    "a negative lease": {"times": TIMES | {"lease": -1}},
    "no time for a job": {"times": TIMES | {"job": 0}},
    "a job longer than its round": {"times": TIMES | {"job": 7201}},
    "a lease longer than its job": {"times": TIMES | {"lease": 3601}},
    "a round without end": {"times": TIMES | {"round": 1e300}},
    "no rounds": {"rounds": 0},
    "a negative number of rounds": {"rounds": -1},
    "half a round": {"rounds": 1.5},
    "a rank above the smallest side": {"ranks": RANKS | {"ladder": [2, 13]}},
    "a cap above the smallest side": {"cap": 13},
    "a cap below the ladder": {"cap": 3},
    "an evaluation rank off the ladder": {"evaluation": {"rank": 3}},
    "no layout": {"layout": None},
    "no fingerprint": {"model": {"id": "base"}},
    "a layout without modules": {"layout": LAYOUT.model_dump(mode="json") | {"modules": {}}},
    "a module without sides": {"layout": LAYOUT.model_dump(mode="json") | {"modules": {"m": [0, 4]}}},
    "a module that is a path": {"layout": LAYOUT.model_dump(mode="json") | {"modules": {"a/b": [9, 9]}}},
    "one label": {"task": PLAN["task"] | {"labels": ["only"]}},
    "a label twice": {"task": PLAN["task"] | {"labels": ["a", "a"]}},
    "an unknown task": {"task": {"kind": "image-generation"}},
    "code": {"task": PLAN["task"] | {"code": "import os"}},
    "no data set": {"data": ""},
    "no learning rate": {"training": TRAINING | {"learning_rate": 0}},
    "a batch of nothing": {"training": TRAINING | {"batch_size": 0}},
    "certain dropout": {"adapter": ADAPTER | {"dropout": 1}},
    "a share above one": {"largest_share": 1.5},
    "a norm below zero": {"norm": {"bound": -1}},
    "an unknown dtype": {"wire": "int3"},
    "a negative seed": {"seed": -1},
    "a seed beyond counting": {"seed": 2**63},
    "a name with a slash": {"name": "../etc"},
    "half a character": {"data": "\ud800"},
    "half a character as a column": {"task": PLAN["task"] | {"text": "\ud800"}},
    "a module that nobody can print": {"layout": LAYOUT.model_dump(mode="json") | {"modules": {"a\x1bb": [9, 9]}}},
    "a whole tensor that nobody can print": {"layout": LAYOUT.model_dump(mode="json") | {"full": {"a\x85b": [9]}}},
    "a scale that leaves no numbers": {"adapter": ADAPTER | {"alpha": 1e-300}},
    "a bound that leaves nothing": {"norm": {"bound": 5e-324}},
    "a label without end": {"task": PLAN["task"] | {"labels": ["a", 4097 * "b"]}},
    "a whole tensor beyond any": {"layout": LAYOUT.model_dump(mode="json") | {"full": {"x": [2**31, 2**31]}}},
    "a module beyond any": {"layout": LAYOUT.model_dump(mode="json") | {"modules": {"q": [2**31, 2**31]}}},
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
async def test_an_impossible_plan_makes_no_run(small: Federation, what: str) -> None:
    content = json.dumps(PLAN | IMPOSSIBLE[what])

    response = await small.admin.call("POST", "/v1/runs", content=content, headers={"Content-Type": "application/json"})

    error = refusal(response)
    assert isinstance(error, errors.InvalidPlan)
    assert len(str(error)) < 1000
    assert (await small.admin.get("/v1/runs", Page[RunView])).items == []


async def test_an_adapter_that_is_too_large_is_refused_with_what_it_holds_and_what_it_may(small: Federation) -> None:
    layout = LAYOUT.model_dump(mode="json") | {"modules": {"q": [2**31, 4]}, "full": {"x": [1]}}

    with pytest.raises(errors.InvalidPlan, match=r"8,589,934,592 may be.*smaller cap") as caught:
        await small.admin.create(make_plan(layout=layout))
    assert "8,589,934,609 numbers at rank 4" in str(caught.value)


def test_an_adapter_of_all_that_is_linear_in_a_model_of_70_billion_parameters_is_none_too_large() -> None:
    sides = [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672)]
    modules = {f"layers.{layer}.{n}": side for layer in range(80) for n, side in enumerate(sides)}
    layout = LAYOUT.model_dump(mode="json") | {"modules": modules}

    feasible.check(make_plan(layout=layout, cap=512, ranks={"name": "capacity", "ladder": [8, 512]}))


@pytest.mark.parametrize(
    "changes", [{"adapter": ADAPTER | {"alpha": 1e-300}}, {"data": "te\0xts"}, {"task": PLAN["task"] | {"labels": ["a", 4097 * "b"]}}]
)
async def test_a_run_from_before_there_was_a_bound_is_still_told(small: Federation, changes: dict[str, Any]) -> None:
    run = (await small.admin.create(make_plan())).id
    with small.parts.database.write() as session:
        session.execute(update(Run).values(plan=PLAN | changes))

    assert [view.id for view in (await small.admin.get("/v1/runs", Page[RunView])).items] == [run]
    assert (await small.admin.call("GET", f"/v1/runs/{run}")).status_code == 200


async def test_an_unresolved_plan_is_sent_to_where_it_is_resolved(small: Federation) -> None:
    with pytest.raises(errors.InvalidPlan, match="admin plans resolve"):
        await small.admin.create(make_plan(layout=None))


async def test_what_a_plan_may_name_is_said_with_the_refusal(small: Federation) -> None:
    with pytest.raises(errors.InvalidPlan, match=r"delta.*hlora"):
        await small.admin.create(make_plan(strategy={"name": "magic"}))
    with pytest.raises(errors.InvalidPlan, match="capacity, fixed, labels"):
        await small.admin.create(make_plan(ranks={"name": "guess", "ladder": [2]}))


async def test_names_in_any_script_are_carried_unchanged(federation: Federation) -> None:
    task = {"kind": "sequence-classification", "labels": ["нет", "да", "🦊", "e\u0301"], "text": "текст"}
    created = await federation.admin.create(make_plan(data="наша почта", task=task))

    found = await federation.admin.run(created.id)

    assert found.plan == created.plan == make_plan(data="наша почта", task=task)
    assert found.plan_digest == created.plan_digest == found.plan.digest()


async def test_a_plan_beyond_the_limit_is_too_large(small: Federation) -> None:
    text = json.dumps(PLAN | {"data": "x" * small.parts.settings.json_limit_bytes})

    response = await small.admin.call("POST", "/v1/runs", content=text, headers={"Content-Type": "application/json"})

    error = refusal(response)
    assert isinstance(error, errors.TooLarge)
    assert error.facts["largest"] == small.parts.settings.json_limit_bytes


@pytest.mark.parametrize("depth", [100, 900, 100_000])
async def test_options_nested_without_end_are_refused(small: Federation, depth: int) -> None:
    nested = "[" * depth + "]" * depth
    text = json.dumps(PLAN | {"strategy": {"name": "hlora", "options": {"luck": "@"}}}).replace('"@"', nested)

    response = await small.admin.call("POST", "/v1/runs", content=text, headers={"Content-Type": "application/json"})

    assert isinstance(refusal(response), errors.InvalidRequest)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"name": NaN}', b"1" * 5000])
async def test_what_is_no_plan_is_refused(small: Federation, content: bytes) -> None:
    response = await small.admin.call("POST", "/v1/runs", content=content, headers={"Content-Type": "application/json"})

    assert isinstance(refusal(response), errors.InvalidRequest)


async def test_a_body_that_does_not_say_it_is_json_is_refused(small: Federation) -> None:
    response = await small.admin.call("POST", "/v1/runs", content=json.dumps(PLAN), headers={"Content-Type": "text/plain"})

    assert isinstance(refusal(response), errors.InvalidRequest)


async def test_the_same_key_and_plan_give_the_same_run(federation: Federation) -> None:
    first = await federation.admin.call("POST", "/v1/runs", json=PLAN, headers={"Idempotency-Key": "monday"})
    again = await federation.admin.call("POST", "/v1/runs", json=PLAN, headers={"Idempotency-Key": "monday"})

    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["id"] == again.json()["id"]
    assert (await federation.admin.create(make_plan())).id != (await federation.admin.create(make_plan())).id


async def test_one_key_sent_many_times_at_once_makes_one_run(federation: Federation) -> None:
    calls = (federation.admin.call("POST", "/v1/runs", json=PLAN, headers={"Idempotency-Key": "monday"}) for _ in range(6))

    responses = await asyncio.gather(*calls)

    assert sorted(response.status_code for response in responses) == [200] * 5 + [201]
    assert len({response.json()["id"] for response in responses}) == 1
    assert len((await federation.admin.get("/v1/runs", Page[RunView])).items) == 1


async def test_a_key_with_another_plan_is_refused(small: Federation) -> None:
    run = await small.admin.create(make_plan(), key="monday")

    with pytest.raises(errors.KeyReused) as caught:
        await small.admin.create(make_plan(seed=1), key="monday")

    assert caught.value.facts["run"] == run.id


@pytest.mark.parametrize("key", ["", "x" * 256])
async def test_a_key_has_a_bounded_length(small: Federation, key: str) -> None:
    response = await small.admin.call("POST", "/v1/runs", json=PLAN, headers={"Idempotency-Key": key})

    assert isinstance(refusal(response), errors.InvalidRequest)


async def test_an_unknown_run_is_not_found(small: Federation) -> None:
    run = "run-0000000000000000"
    requests = [("GET", ""), ("GET", "/rounds"), ("GET", "/rounds/0"), ("GET", "/adapter"), ("GET", "/adapter/x")]
    requests += [("POST", f"/{verb}") for verb in ("pause", "resume", "stop")]
    for method, path in requests:
        assert isinstance(refusal(await small.admin.call(method, f"/v1/runs/{run}{path}")), errors.NotFound)


@pytest.mark.parametrize("id", ["x", "run-", "..", "run-0000000000000000%00", "RUN-0000000000000000", "run-000000000000000g"])
async def test_an_id_that_was_never_given_out_is_refused(small: Federation, id: str) -> None:
    assert isinstance(refusal(await small.admin.call("GET", f"/v1/runs/{id}/rounds")), (errors.InvalidRequest, errors.NotFound))


async def test_rounds_and_adapters_that_are_not_there_are_not_found(small: Federation) -> None:
    run = (await small.admin.create(make_plan())).id
    assert "not published an adapter yet" in str(refusal(await small.viewer.call("GET", f"/v1/runs/{run}/adapter")))
    small.tick()

    refused = {
        "/rounds/1": "has no round 1",
        "/rounds/0?attempt=2": "has no round 0, attempt 2",
        "/adapter?round=1": "not published round 1",
        "/adapter?rank=5": "the adapter has rank 4",
        "/adapter/weights.bin": "adapter_model.safetensors",
    }
    for path, said in refused.items():
        error = refusal(await small.viewer.call("GET", f"/v1/runs/{run}{path}"))
        assert isinstance(error, errors.NotFound)
        assert said in str(error)
    for path in ("/rounds/-1", "/rounds/9999999999", "/rounds/0?attempt=0", "/adapter?rank=0", "/adapter?round=-1", "/rounds/one"):
        assert isinstance(refusal(await small.viewer.call("GET", f"/v1/runs/{run}{path}")), errors.InvalidRequest)


async def test_strategies_and_rank_policies_describe_themselves(small: Federation) -> None:
    for path, known in (("strategies", {"delta", "hlora"}), ("rank-policies", {"capacity", "fixed", "labels"})):
        found = [Description.model_validate(item) for item in (await small.viewer.call("GET", f"/v1/{path}")).json()]
        assert {description.name for description in found} >= known
        assert all(description.summary and description.options["type"] == "object" for description in found)


async def test_the_largest_plan_that_is_allowed_is_carried_out_as_far_as_it_can(small: Federation) -> None:
    """Numbers at their limits make a run that waits for clients with its reason, not a defect."""
    plan: Plan = make_plan(
        rounds=100_000,
        seed=2**63 - 1,
        cohort={"target": 1_000_000, "quorum": 1_000_000, "over_selection": 10, "attempts": 100},
        times=dict.fromkeys(("lease", "no_progress", "job", "round"), 30 * 86_400),
        adapter=ADAPTER | {"alpha": 1e4},
        norm={"bound": 1e308},
    )
    await small.enrol_many(1)

    run = await small.open(plan)

    view = await small.admin.run(run)
    assert (view.state, view.round) == (RunState.running, 0)
    assert str(view.reason).startswith("waits for clients: 1 able of a target of 1000000")


@pytest.mark.parametrize("member", ["parameters", "layers", "hidden"])
async def test_a_base_model_of_absurd_size_ends_in_a_reason(small: Federation, member: str) -> None:
    base = LAYOUT.base.model_dump() | {member: 10**400}
    await small.enrol_many(3)

    run = await small.open(make_plan(layout=LAYOUT.model_dump(mode="json") | {"base": base}, ranks={"name": "capacity", "ladder": [2, 4]}))

    view = await small.admin.run(run)
    assert view.state is RunState.failed or str(view.reason).startswith("waits for clients: 0 able")
    assert view.reason
