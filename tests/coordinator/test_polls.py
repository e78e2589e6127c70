"""Long polls: woken by work, ended by time or by the shutdown, and in nobody's way while they wait."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from coordinator.tables import Client
from protocol import VERSION, errors
from protocol.states import JobKind
from tests.federation import Federation, make_plan, open_federation, refusal

WAIT = 20  # seconds that these polls would wait; a test that waits for them to the end has failed
SOON = 10  # seconds; what comes later was not woken


async def test_a_poll_is_woken_when_a_round_opens(federation: Federation) -> None:
    devices = await federation.enrol_many(3)
    polls = [asyncio.ensure_future(device.next_job(wait=WAIT)) for device in devices]
    await asyncio.sleep(0.1)

    await federation.open(make_plan(evaluation={"every": 0}))

    jobs = await asyncio.wait_for(asyncio.gather(*polls), SOON)
    assert [job and job.kind for job in jobs] == [JobKind.train] * 3


async def test_a_poll_is_woken_by_a_job_that_another_gave_back(small: Federation) -> None:
    devices = await small.enrol_many(4)
    await small.open(make_plan(evaluation={"every": 0}))
    held = {device.name: job for device in devices if (job := await device.next_job()) is not None}
    (spare,) = [device for device in devices if device.name not in held]
    giver = next(device for device in devices if device.name in held)
    poll = asyncio.ensure_future(spare.next_job(wait=WAIT))
    await asyncio.sleep(0.1)

    await giver.give_back(held[giver.name])
    small.tick()

    assert await asyncio.wait_for(poll, SOON) is not None


async def test_a_poll_is_woken_by_the_next_round_and_by_the_evaluation(small: Federation) -> None:
    (device,) = await small.enrol_many(1)
    await small.open(make_plan(cohort={"target": 1, "quorum": 1}, rounds=2))
    await device.complete(await device.take(JobKind.evaluate))
    await device.complete(await device.take())
    poll = asyncio.ensure_future(device.next_job(wait=WAIT))
    await asyncio.sleep(0.1)

    small.tick()

    job = await asyncio.wait_for(poll, SOON)
    assert job is not None
    assert (job.kind, job.round) == (JobKind.evaluate, 1)


@pytest.mark.parametrize("prefer", [None, "", "wait=0", "respond-async", "wait=x", "wait=-5", "handling=lenient"])
async def test_without_a_wish_to_wait_the_answer_comes_at_once(small: Federation, prefer: str | None) -> None:
    device = await small.enrol("device")

    response = await asyncio.wait_for(device.call("POST", "/v1/jobs/next", headers={} if prefer is None else {"Prefer": prefer}), SOON)

    assert (response.status_code, response.content) == (204, b"")
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("prefer", ["wait=1", "respond-async, wait=1", "wait = 1; x"])
async def test_a_poll_ends_with_its_time(small: Federation, prefer: str) -> None:
    device = await small.enrol("device")

    response = await asyncio.wait_for(device.call("POST", "/v1/jobs/next", headers={"Prefer": prefer}), SOON)

    assert response.status_code == 204


async def test_polls_end_at_once_when_the_coordinator_stops(small: Federation) -> None:
    devices = await small.enrol_many(3)
    polls = [asyncio.ensure_future(device.next_job(wait=WAIT)) for device in devices]
    await asyncio.sleep(0.1)

    small.parts.bell.close()

    assert await asyncio.wait_for(asyncio.gather(*polls), SOON) == [None] * 3
    assert await asyncio.wait_for(devices[0].next_job(wait=WAIT), SOON) is None


async def test_many_waiting_polls_are_in_nobodys_way(federation: Federation) -> None:
    """Far more polls than there are threads or connections; every other route answers, and so does the round that opens."""
    devices = await federation.enrol_many(3)
    polls = [asyncio.ensure_future(device.next_job(wait=WAIT)) for device in devices for _ in range(70)]
    await asyncio.sleep(0.5)

    async def others() -> None:
        for _ in range(20):
            assert (await devices[0].whoami()).status_code == 200
            assert (await federation.admin.call("GET", "/v1/clients")).status_code == 200

    await asyncio.wait_for(others(), SOON)
    await federation.open(make_plan(evaluation={"every": 0}))

    found, _ = await asyncio.wait(polls, timeout=SOON, return_when=asyncio.FIRST_COMPLETED)
    assert found
    federation.parts.bell.close()
    jobs = [job for job in await asyncio.wait_for(asyncio.gather(*polls), WAIT + SOON) if job is not None]
    assert len({job.id for job in jobs}) == 3
    assert len({(job.id, job.lease.epoch) for job in jobs}) == len(jobs)


async def test_who_asks_together_gets_each_its_own_job(federation: Federation) -> None:
    devices = await federation.enrol_many(12)
    polls = [asyncio.ensure_future(device.next_job(wait=WAIT)) for device in devices]
    await asyncio.sleep(0.1)

    await federation.open(make_plan(evaluation={"every": 0}, cohort={"target": 12, "quorum": 1}))

    jobs = [job for job in await asyncio.wait_for(asyncio.gather(*polls), SOON) if job is not None]
    assert len({job.id for job in jobs}) == 12
    assert {job.lease.epoch for job in jobs} == {1}
    await asyncio.gather(*(device.renew(job) for device, job in zip(devices, jobs, strict=True)))


async def test_what_fails_for_one_does_not_fail_for_those_who_ask_with_it(small: Federation) -> None:
    devices = await small.enrol_many(5)
    await small.open(make_plan(evaluation={"every": 0}, cohort={"target": 5, "quorum": 1}))
    with small.parts.database.write() as session:
        session.get_one(Client, devices[2].id).profile = {"memory_bytes": "damaged"}

    answers = await asyncio.gather(*(device.call("POST", "/v1/jobs/next") for device in devices))

    assert [answer.status_code for answer in answers] == [200, 200, 500, 200, 200]


async def test_a_client_that_is_revoked_while_it_waits_gets_no_job(federation: Federation) -> None:
    devices = await federation.enrol_many(3)
    polls = [asyncio.ensure_future(device.next_job(wait=3)) for device in devices]
    await asyncio.sleep(0.1)
    await federation.open(make_plan(evaluation={"every": 0}, cohort={"target": 2, "quorum": 1}))
    held = await asyncio.wait_for(asyncio.wait(polls, return_when=asyncio.FIRST_COMPLETED), SOON)
    waiting = next(device for device, poll in zip(devices, polls, strict=True) if poll in held[1])
    giver, job = next((device, poll.result()) for device, poll in zip(devices, polls, strict=True) if poll in held[0])
    await federation.admin.change_client(waiting, state="revoked")
    assert job is not None

    await giver.give_back(job)
    federation.tick()

    assert await polls[devices.index(waiting)] is None
    assert isinstance(refusal(await waiting.call("POST", "/v1/jobs/next")), errors.Unauthenticated)


async def test_a_larger_fleet_may_be_silent_for_longer(sqlite_url: str, tmp_path: Path) -> None:
    """Polls of 20 clients wait 0.4 s, those of 50 a second; who is silent for twice that and ten seconds more is away."""
    async with open_federation(sqlite_url, tmp_path, poll_seconds=0.1) as federation:
        first, *_ = await federation.enrol_many(20)
        federation.clock.advance(11.5)
        assert not (await federation.admin.client(first)).available
        for number in range(21, 51):
            await federation.enrol(f"device {number}")
        assert (await federation.admin.client(first)).available
        federation.clock.advance(1)
        assert not (await federation.admin.client(first)).available


async def test_a_poll_of_a_client_that_may_not_work_finds_nothing(small: Federation) -> None:
    devices = await small.enrol_many(3)
    await small.open(make_plan(evaluation={"every": 0}))
    await small.admin.change_client(devices[0], state="paused")

    assert await devices[0].next_job() is None
    await small.admin.change_client(devices[0], state="active")
    assert await devices[0].next_job() is not None


MAJOR, MINOR, _ = VERSION.split(".")


@pytest.mark.parametrize("version", ["0.0.9", "garbage", "", "1", "0.1", "-1.0.0", f"{MAJOR}.x.0", "9" * 30])
async def test_an_agent_that_is_too_old_is_told_which_it_needs(small: Federation, version: str) -> None:
    device = await small.enrol("device")

    error = refusal(await device.call("POST", "/v1/jobs/next", headers={"Hlora-Version": version}))

    assert isinstance(error, errors.OutdatedAgent)
    assert f"{MAJOR}.{MINOR}" in str(error)


@pytest.mark.parametrize(
    "version", [VERSION, f"{MAJOR}.{MINOR}.99", f"{MAJOR}.{int(MINOR) + 1}.0", f"{int(MAJOR) + 1}.0.0", f"{VERSION}+local"]
)
async def test_an_agent_that_is_as_new_or_newer_is_served(small: Federation, version: str) -> None:
    device = await small.enrol("device")

    assert (await device.call("POST", "/v1/jobs/next", headers={"Hlora-Version": version})).status_code == 204
