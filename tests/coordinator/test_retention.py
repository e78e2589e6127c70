"""Old rounds are given up and their bytes deleted, and nothing that is still needed is."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from coordinator import events, retention, sweeping
from protocol.states import JobKind, JobState, RoundState, RunState
from tests.federation import Federation, make_plan, open_federation

PLAN = make_plan(rounds=3, evaluation={"every": 0}, strategy={"name": "delta", "options": {"momentum": 0.5}})
NOBODY_IS_SPARED = datetime.max.replace(tzinfo=UTC)  # orphans are deleted however young they are


def give_up(federation: Federation, keep: int) -> int:
    """Forget old rounds, and delete at once whatever nobody names; gives how many rounds were forgotten."""
    with federation.parts.database.write() as session:
        count = retention.forget(session, keep, federation.clock.now)
    for _ in sweeping.sweep(federation.parts.database, federation.parts.blobs, NOBODY_IS_SPARED):
        pass
    return count


async def forgotten(federation: Federation, run: str) -> list[int]:
    """The numbers of the rounds that were given up."""
    numbers = range((await federation.admin.run(run)).round + 1)
    return [number for number in numbers if (await federation.admin.round(run, number)).forgotten]


async def adapters(federation: Federation, run: str) -> list[bytes]:
    """Every round's adapter, whole and cut to a rung, as operators get it."""
    paths = [f"/v1/runs/{run}/adapter?round={number}{rank}" for number in range(PLAN.rounds + 1) for rank in ("", "&rank=2")]
    return [(await federation.admin.call("GET", path)).raise_for_status().content for path in paths]


def stored(federation: Federation) -> set[str]:
    return {blob.digest for blob in federation.parts.blobs.digests()}


async def play(federation: Federation, keep: int | None) -> str:
    """A whole run, with old rounds given up at every moment at which anything may happen."""
    await federation.enrol_many(3)
    run = (await federation.admin.create(PLAN)).id
    while (await federation.admin.run(run)).state is RunState.running:
        for device in federation.devices:
            federation.tick()
            if keep is not None:
                give_up(federation, keep)
            job = await device.next_job()
            if job is not None:
                await device.complete(job)
    return run


@pytest.fixture
async def undisturbed(_migrated_sqlite: Path, tmp_path: Path) -> list[bytes]:
    """The adapters of the same run where nothing is given up."""
    database = shutil.copy(_migrated_sqlite, tmp_path / "undisturbed.sqlite")
    async with open_federation(f"sqlite:///{database}", tmp_path / "undisturbed") as federation:
        return await adapters(federation, await play(federation, None))


async def test_a_run_whose_old_rounds_are_given_up_comes_to_the_same_adapters(federation: Federation, undisturbed: list[bytes]) -> None:
    run = await play(federation, 1)

    assert await adapters(federation, run) == undisturbed
    assert await forgotten(federation, run) == [0, 1, 2]
    views = [await federation.admin.round(run, number) for number in range(4)]
    last = views[3].manifest
    assert last is not None
    inputs = {digest for input in last.inputs for digest in (input.digest, input.base)}
    assert stored(federation) == {view.adapter.digest for view in views if view.adapter} | {b.digest for b in last.slices.values()} | inputs


async def test_a_round_that_was_given_up_still_says_what_it_was_made_of(small: Federation) -> None:
    run = await play(small, None)
    before = await small.admin.round(run, 1)
    give_up(small, 1)

    after = await small.admin.round(run, 1)

    assert after == before.model_copy(update={"forgotten": True})
    assert after.manifest is not None
    assert not stored(small) & {input.digest for input in after.manifest.inputs}
    with small.parts.database.read() as session:
        (told,) = [event for event in events.after(session, 0, run) if event.kind == "rounds-forgotten"]
    assert told.facts == {"rounds": 3}


async def test_what_was_given_up_is_not_given_up_again(small: Federation) -> None:
    run = await play(small, None)

    assert [give_up(small, keep) for keep in (3, 3, 2, 4, 1, 1)] == [1, 0, 1, 0, 1, 0]
    assert await forgotten(small, run) == [0, 1, 2]


async def test_a_contribution_that_is_still_made_keeps_its_round(federation: Federation) -> None:
    """Buffered rounds: the second client holds what it was given in round 1, until it is merged into round 4."""
    plan = make_plan(rounds=5, evaluation={"every": 0}, cohort={"target": 2, "quorum": 1}, buffer={"size": 1})
    quick, slow = await federation.enrol_many(2)
    run = await federation.open(plan)
    late = await slow.take()
    for _ in range(3):
        await quick.complete(await quick.take())
        federation.tick()
        give_up(federation, 1)
    assert await forgotten(federation, run) == [0, 2]

    await slow.complete(late)
    give_up(federation, 1)
    federation.tick()
    give_up(federation, 1)

    assert (await federation.admin.job(run, late)).state is JobState.accepted
    merged = await federation.admin.round(run, 4)
    assert merged.manifest is not None
    assert [input.staleness for input in merged.manifest.inputs] == [3]
    assert await forgotten(federation, run) == [0, 1, 2, 3]
    assert stored(federation) >= {digest for input in merged.manifest.inputs for digest in (input.digest, input.base)}


async def test_an_evaluation_that_goes_on_keeps_its_round(small: Federation) -> None:
    await small.enrol_many(3)
    run = await small.open(make_plan(rounds=3, evaluation={"every": 1}))
    measuring = await small.devices[0].take(JobKind.evaluate)
    for device in small.devices[1:]:
        while (job := await device.next_job()) is not None:
            await device.complete(job)

    give_up(small, 1)

    assert not (await small.admin.round(run, 0)).forgotten
    await small.devices[0].blob(measuring.slice.digest)


async def test_attempts_that_were_abandoned_are_given_up_with_their_round_or_when_the_run_is_over(small: Federation) -> None:
    run, (device, *_), (job, *_) = await small.training(make_plan(rounds=2))
    slice = (await device.complete(job)).slice
    small.advance(7200)
    assert (await small.admin.round(run, 1, attempt=1)).state is RoundState.abandoned
    give_up(small, 1)
    assert slice in stored(small)

    await small.admin.change_run(run, "stop")
    give_up(small, 1)

    assert (await small.admin.round(run, 1, attempt=1)).forgotten
    assert slice not in stored(small)


async def test_the_coordinator_gives_up_what_its_setting_says(sqlite_url: str, tmp_path: Path) -> None:
    async with open_federation(sqlite_url, tmp_path, keep_rounds=2) as federation:
        run = await play(federation, None)
        assert await forgotten(federation, run) == []

        assert federation.parts.housekeeping.run_once()["rounds"] == 2

        assert await forgotten(federation, run) == [0, 1]
