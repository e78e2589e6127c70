"""Buffered rounds: contributions are merged as they come, whichever version they started from, and nobody waits for the slowest."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
import torch
from torch import Tensor

from coordinator import publishing, retention, runs, sweeping, verification
from coordinator.executors import open_executor
from protocol import errors, slices
from protocol.messages import Job
from protocol.plan import Plan
from protocol.slices import Slice
from protocol.states import JobKind, JobState, RoundState, RunState
from protocol.views import JobView, RoundView
from tests.federation import LAYOUT, Device, Federation, make_plan, make_profile

LABELS = {"name": "labels", "ladder": [2, 4], "options": {"label": "size", "table": {"small": 2, "large": 4}}}
UNMEASURED = {"every": 0}


def buffered(size: int = 2, target: int = 4, quorum: int = 1, *, exponent: float = 0.5, staleness: int = 20, **changes: Any) -> Plan:
    """A plan that merges every `size` contributions of `target` clients at work; nothing is evaluated."""
    told: dict[str, Any] = {
        "buffer": {"size": size, "exponent": exponent, "largest_staleness": staleness},
        "cohort": {"target": target, "quorum": quorum},
        "evaluation": UNMEASURED,
        "rounds": 10,
    }
    return make_plan(**(told | changes))


async def work(federation: Federation, *pairs: tuple[Device, Job]) -> None:
    """Let the devices answer in that order, and the conductor look when all have."""
    for device, job in pairs:
        await device.complete(job)
    federation.tick()


def merged(view: RoundView) -> dict[str, JobView]:
    """Whose contributions a round merged."""
    return {job.client_name: job for job in view.jobs if job.counted_in == view.number}


def read(federation: Federation, digest: str) -> Slice:
    return slices.unpack(federation.parts.blobs.read(digest))


def product(slice: Slice, module: str) -> Tensor:
    """s · b @ a in float64."""
    factors = slice.factors[module]
    return slice.label.scale * (factors.b.double() @ factors.a.double())


def best(w: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    leading: Tensor = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return leading


async def test_of_every_two_contributions_counts_the_share_of_their_rows_and_the_part_of_their_staleness(federation: Federation) -> None:
    """Four clients of two ranks; weights and adapter are what the manifest's numbers come to in float64."""
    devices = [
        await federation.enrol(f"device {n}", make_profile(train=100 * n), {"size": "small" if n % 2 else "large"}) for n in range(1, 5)
    ]
    run = await federation.open(buffered(ranks=LABELS, exponent=0.7))
    one, two, three, four = devices
    first = {device.name: await device.take() for device in devices}
    for device, examples in ((one, 50), (two, 60)):
        await device.complete(first[device.name], examples=examples)
    federation.tick()
    again = {device.name: await device.take() for device in (one, two)}
    assert {job.round for job in again.values()} == {2}
    for device, job, examples in ((three, first[three.name], 200), (one, again[one.name], 80)):
        await device.complete(job, examples=examples)
    federation.tick()
    for device, job, examples in ((four, first[four.name], 300), (two, again[two.name], 90)):
        await device.complete(job, examples=examples)
    federation.tick()

    views = [await federation.admin.round(run, number) for number in range(4)]
    assert [view.reason for view in views[1:]] == ["the buffer of 2 is full"] * 3
    told = [{name: (job.staleness, job.examples) for name, job in merged(view).items()} for view in views[1:]]
    assert told == [
        {"device 1": (0, 50), "device 2": (0, 60)},
        {"device 3": (1, 200), "device 1": (0, 80)},
        {"device 4": (2, 300), "device 2": (1, 90)},
    ]
    for before, view in itertools.pairwise(views):
        rows = {name: job.examples for name, job in merged(view).items()}
        wanted = {name: count / sum(rows.values()) for name, count in rows.items()}  # type: ignore[operator, arg-type]
        assert {name: job.weight for name, job in merged(view).items()} == pytest.approx(wanted, rel=1e-12)
        assert view.manifest is not None
        assert [input.shrink for input in view.manifest.inputs] == [(1 + input.staleness) ** -0.7 for input in view.manifest.inputs]
        assert before.adapter is not None
        check_merge(federation, before.adapter.digest, view)


def check_merge(federation: Federation, previous: str, view: RoundView) -> None:
    """W is the best approximation of W + Σ p γ (s b a − s₀ b₀ a₀), a head is h + Σ p γ (t − t₀)."""
    assert view.manifest is not None
    before, after = read(federation, previous), read(federation, view.manifest.adapter.digest)
    pairs = [(input.weight * input.shrink, read(federation, input.digest), read(federation, input.base)) for input in view.manifest.inputs]
    assert {input.client: input.staleness for input in view.manifest.inputs} == {n: job.staleness for n, job in merged(view).items()}
    for module in LAYOUT.modules:
        changed = torch.stack([p * (product(t, module) - product(g, module)) for p, t, g in pairs]).sum(dim=0)
        wanted = product(before, module) + changed
        assert torch.allclose(product(after, module), best(wanted, 4), rtol=0, atol=1e-6 * float(wanted.norm()))
    for name in LAYOUT.full:
        head = before.full[name].double()
        changed = torch.stack([p * (t.full[name].double() - g.full[name].double()) for p, t, g in pairs]).sum(dim=0)
        assert torch.allclose(after.full[name].double(), head + changed, rtol=1e-6, atol=1e-7)


async def test_fresh_contributions_without_discount_give_the_bytes_of_rounds_that_wait(federation: Federation) -> None:
    await federation.enrol_many(3)
    waiting = make_plan(rounds=3, cohort={"target": 3, "quorum": 3}, evaluation=UNMEASURED, norm={"bound": 0.5})
    collecting = buffered(3, 3, 3, exponent=0.0, rounds=3, norm={"bound": 0.5})
    published = []
    for plan in (waiting, collecting):
        run = await federation.open(plan)
        await federation.play([run])
        views = [await federation.admin.round(run, number) for number in range(4)]
        published.append([(view.adapter, view.slices, view.energy) for view in views])

    assert published[0] == published[1]


async def follow(federation: Federation, run: str, orders: Sequence[Sequence[int]]) -> list[object]:
    """What a run publishes whose contributions come in these orders, a version for each; then it is stopped."""
    devices, held = federation.devices, {device.name: await device.take() for device in federation.devices}
    for order in orders:
        for device in (devices[number] for number in order):
            await device.complete(held.pop(device.name))
            federation.clock.advance(1)
        federation.tick()
        held |= {device.name: await device.take() for device in devices if device.name not in held}
    views = [await federation.admin.round(run, number) for number in range(len(orders) + 1)]
    await federation.admin.change_run(run, "stop")
    return [(view.adapter, view.slices) for view in views]


async def test_what_is_published_does_not_depend_on_the_order_of_arrival(federation: Federation) -> None:
    """The same three sets of contributions, in another order within each."""
    await federation.enrol_many(4)
    plan = buffered(exponent=1.0, largest_share=0.6)
    found = [
        await follow(federation, await federation.open(plan), orders)
        for orders in ([(0, 1), (2, 0), (3, 1)], [(1, 0), (0, 2), (1, 3)], [(0, 2), (1, 0), (3, 2)])
    ]

    assert found[0] == found[1]
    assert found[0][1] != found[2][1]


async def test_a_version_that_a_dead_coordinator_left_half_made_is_made_by_the_next_without_what_came_meanwhile(
    federation: Federation,
) -> None:
    await federation.enrol_many(4)
    plan = buffered()
    undisturbed = await follow(federation, await federation.open(plan), [(0, 1), (2, 0)])
    run = await federation.open(plan)
    one, two, three, _ = devices = federation.devices
    held = {device.name: await device.take() for device in devices}
    for device in (one, two):
        await device.complete(held[device.name])
    with federation.parts.database.write() as session:
        runs.advance(session, run, federation.clock.now, 20)
        (round_id,) = publishing.due(session, federation.clock.now)
        assert publishing.claim(session, round_id, federation.clock.now) is not None

    await work(federation, (three, held[three.name]))
    assert (await federation.admin.run(run)).round == 0
    federation.advance(publishing.CLAIM.total_seconds())
    await work(federation, (one, await one.take()))

    views = [await federation.admin.round(run, number) for number in range(3)]
    assert [(view.adapter, view.slices) for view in views] == undisturbed


async def test_a_slow_client_holds_nobody_up_and_counts_when_it_comes(federation: Federation) -> None:
    """While one trains, the others publish six versions; the version that it started from is served all the time."""
    *quick, slow = await federation.enrol_many(3)
    run = await federation.open(buffered(target=3))
    held = await slow.take()
    for number in range(1, 7):
        await work(federation, *[(device, await device.take()) for device in quick])
        assert (await federation.admin.run(run)).round == number
        federation.clock.advance(10)
        await slow.renew(held, step=number)
    assert held.round == 1

    await work(federation, (slow, held), (quick[0], await quick[0].take()))

    manifest = (await federation.admin.round(run, 7)).manifest
    assert manifest is not None
    assert {input.client: (input.staleness, input.weight) for input in manifest.inputs} == {"device 3": (6, 0.5), "device 1": (0, 0.5)}
    assert {input.client: input.shrink for input in manifest.inputs} == {"device 3": pytest.approx(7**-0.5), "device 1": 1.0}
    assert (await federation.admin.job(run, held)).state is JobState.accepted


async def test_housekeeping_keeps_what_a_slow_client_needs_and_its_round_can_be_made_again(federation: Federation) -> None:
    *quick, slow = await federation.enrol_many(3)
    run = await federation.open(buffered(target=3))
    held = await slow.take()
    for _ in range(3):
        await work(federation, *[(device, await device.take()) for device in quick])
    parts = federation.parts
    with parts.database.write() as session:
        assert retention.forget(session, 1, federation.clock.now) == 2  # all but the first, on which slow works, and the newest
    assert list(sweeping.sweep(parts.database, parts.blobs, datetime.max.replace(tzinfo=UTC)))

    await work(federation, (slow, held), (quick[0], await quick[0].take()))

    assert {job.staleness for job in merged(await federation.admin.round(run, 4)).values()} == {0, 3}
    with parts.database.read() as session:
        records = verification.records(session, verification.find(session, run), 4, parts.blobs.url)
    with open_executor("threads://1") as executor:
        (found,) = verification.Verifier(parts.database, parts.blobs, executor, lambda _: None).verify(records)
    assert (found.verdict, found.detail) == (verification.Verdict.agrees, "adapter and 2 slices, from 2 contributions")


async def test_as_many_clients_are_at_work_as_the_plan_says_and_each_has_one_job(federation: Federation) -> None:
    """Of five, three work; who is done, or lost, makes room for another, and takes part once in a version."""
    devices = await federation.enrol_many(5)
    run = await federation.open(buffered(2, 3))
    held = {device: job for device in devices if (job := await device.next_job()) is not None}
    assert len(held) == 3
    done, lost, busy = held
    await done.complete(held[done])
    await lost.give_back(held[lost])
    federation.tick()

    rest = [device for device in devices if device not in held]
    jobs = [await device.take() for device in rest]
    assert await done.next_job() is None
    await work(federation, (rest[0], jobs[0]))
    assert (await federation.admin.run(run)).round == 1
    again = {device for device in (done, lost, rest[0]) if await device.next_job() is not None}
    assert len(again) == 1  # two are still at work
    assert [(await device.take()).id for device in (busy, rest[1])] == [held[busy].id, jobs[1].id]


async def measure(devices: Sequence[Device]) -> None:
    for device in devices:
        await device.complete(await device.take(JobKind.evaluate))


async def test_a_version_is_measured_by_those_who_are_not_at_work_and_the_last_one_by_all(federation: Federation) -> None:
    *quick, slow = await federation.enrol_many(3)
    run = await federation.open(buffered(target=3, rounds=2, evaluation={"every": 1}))
    await measure(federation.devices)
    held = await slow.take()
    await work(federation, *[(device, await device.take()) for device in quick])
    await measure(quick)
    assert (await slow.take()).id == held.id

    await work(federation, *[(device, await device.take()) for device in quick])

    await measure(federation.devices)
    federation.tick()
    counts = [sum(job.kind is JobKind.evaluate for job in (await federation.admin.round(run, number)).jobs) for number in range(3)]
    assert counts == [3, 2, 3]
    assert (await federation.admin.run(run)).state is RunState.finished


async def test_work_that_became_too_old_is_ended_and_is_no_offence(federation: Federation) -> None:
    *quick, slow = await federation.enrol_many(3)
    run = await federation.open(buffered(target=3, staleness=1))
    held = await slow.take()
    await work(federation, *[(device, await device.take()) for device in quick])
    await slow.renew(held)
    await work(federation, *[(device, await device.take()) for device in quick])

    with pytest.raises(errors.JobOver, match="the plan allows 1 versions between start and merge"):
        await slow.renew(held)
    assert (await federation.admin.job(run, held)).state is JobState.cancelled
    assert (await federation.admin.client(slow)).rejections == 0
    assert (await slow.take()).round == 3


async def test_a_contribution_that_became_too_old_while_it_waited_is_rejected_and_is_no_offence(federation: Federation) -> None:
    run, devices, jobs = await federation.training(buffered(1, 2, staleness=0), count=2)
    await work(federation, *zip(devices, jobs, strict=True))

    assert list(merged(await federation.admin.round(run, 1))) == ["device 1"]
    late = await federation.admin.job(run, jobs[1])
    assert late.state is JobState.rejected
    assert "the plan allows 0 versions between start and merge" in str(late.reason)
    assert (await federation.admin.client(devices[1])).rejections == 0


async def test_more_than_the_buffer_holds_waits_for_the_next_version(federation: Federation) -> None:
    run, devices, jobs = await federation.training(buffered(2, 3), count=3)
    for device, job in zip(reversed(devices), reversed(jobs), strict=True):
        await device.complete(job)
        federation.clock.advance(1)
    federation.tick()
    assert set(merged(await federation.admin.round(run, 1))) == {"device 3", "device 2"}

    await work(federation, (devices[1], await devices[1].take()))

    view = merged(await federation.admin.round(run, 2))
    assert {name: job.staleness for name, job in view.items()} == {"device 1": 1, "device 2": 0}


async def test_what_the_last_version_was_made_without_ends_with_the_reason(federation: Federation) -> None:
    run, devices, jobs = await federation.training(buffered(1, 3, rounds=1), count=3)
    await work(federation, *list(zip(devices, jobs, strict=True))[:2])

    states = {job.client_name: (job.state, job.reason) for job in (await federation.admin.round(run, 1)).jobs}
    assert states["device 1"] == (JobState.accepted, None)
    reason = "it comes after the last round; the round closed at 2026-01-01 00:00:00 UTC: the buffer of 1 is full"
    assert states["device 2"] == states["device 3"] == (JobState.cancelled, reason)
    assert (await federation.admin.run(run)).state is RunState.finished


# --- deadlines, pauses, ends --------------------------------------------------------------------------------------------

TIMES = dict.fromkeys(("lease", "no_progress", "job", "round"), 1000)


async def be_seen(devices: Sequence[Device]) -> None:
    """Let the coordinator know that they are there, without asking for work."""
    for number, device in enumerate(devices, 1):
        await device.put_profile(make_profile(train=10 * number))


async def test_at_the_deadline_a_quorum_makes_the_version_and_work_goes_on(federation: Federation) -> None:
    one, two = await federation.enrol_many(2)
    run = await federation.open(buffered(2, 2, 1, times=TIMES))
    await one.complete(await one.take())
    federation.clock.advance(500)
    held = await two.take()
    federation.clock.advance(490)
    await be_seen(federation.devices)

    federation.advance(10)

    view = await federation.admin.round(run, 1)
    assert (view.state, view.reason, view.contributions) == (RoundState.published, "1 contributions at the deadline, quorum 1", 1)
    await work(federation, (two, held), (one, await one.take()))
    view = await federation.admin.round(run, 2)
    assert {name: job.staleness for name, job in merged(view).items()} == {"device 2": 1, "device 1": 0}


async def test_a_new_attempt_takes_over_what_is_in_and_what_is_in_work(federation: Federation) -> None:
    """Nothing that was acknowledged is lost, and nobody does the same work twice."""
    one, two, three = await federation.enrol_many(3)
    run = await federation.open(buffered(3, 3, 2, times=TIMES))
    await one.complete(await one.take())
    federation.clock.advance(500)
    held = await two.take()
    federation.clock.advance(490)
    await be_seen(federation.devices)

    federation.advance(10)

    first, second = await federation.admin.round(run, 1, attempt=1), await federation.admin.round(run, 1)
    assert (first.state, first.reason) == (RoundState.abandoned, "1 contributions at the deadline, quorum 2")
    assert (second.state, second.attempt, second.contributions, second.cohort) == (RoundState.open, 2, 1, 3)
    assert await one.next_job() is None
    await work(federation, (two, held), (three, await three.take()))
    view = await federation.admin.round(run, 1)
    assert (view.state, view.contributions) == (RoundState.published, 3)
    assert sum(job.weight or 0 for job in view.jobs) == pytest.approx(1)


async def test_with_nobody_left_to_wait_for_the_quorum_makes_the_version(federation: Federation) -> None:
    run, (one, two), (first, second) = await federation.training(buffered(2, 2, 1), count=2)
    await one.complete(first)

    await two.give_back(second, "no such model", problem="model-refusal")
    federation.tick()

    view = await federation.admin.round(run, 1)
    assert (view.state, view.reason) == (RoundState.published, "1 contributions, quorum 1, and nobody left to wait for")


async def test_a_paused_run_takes_what_comes_and_merges_it_when_resumed(federation: Federation) -> None:
    run, devices, jobs = await federation.training(buffered(2, 3), count=3)
    await federation.admin.change_run(run, "pause")
    await work(federation, *list(zip(devices, jobs, strict=True))[:2])
    assert (await federation.admin.run(run)).round == 0

    await federation.admin.change_run(run, "resume")
    federation.tick()

    assert (await federation.admin.run(run)).round == 1
    assert (await devices[2].take()).id == jobs[2].id


async def test_a_stopped_run_ends_work_of_every_version(federation: Federation) -> None:
    run, (one, two, slow), (first, second, held) = await federation.training(buffered(2, 3), count=3)
    await work(federation, (one, first), (two, second))
    newer = await one.take()

    await federation.admin.change_run(run, "stop")

    for device, job in ((slow, held), (one, newer)):
        with pytest.raises(errors.JobOver, match="the run was stopped"):
            await device.renew(job)
    assert [await device.next_job() for device in federation.devices] == [None] * 3


async def test_momentum_and_other_strategies_of_changes_work_with_a_buffer(small: Federation) -> None:
    await small.enrol_many(3)
    for strategy in ({"name": "delta", "options": {"momentum": 0.5, "step": 0.8}}, {"name": "reweighted"}):
        run = await small.open(buffered(2, 3, rounds=4, strategy=strategy))
        (view,) = await small.play([run])
        assert (view.state, view.round) == (RunState.finished, 4)


@pytest.mark.parametrize("strategy", ["fedavg", "hetlora", "hlora", "raflora", "zero_pad"])
async def test_a_strategy_that_merges_what_clients_have_is_refused_with_those_that_can(small: Federation, strategy: str) -> None:
    with pytest.raises(errors.InvalidPlan, match=r"pull the new one back; .*: delta, ffa, flora, folded, reweighted, rotating"):
        await small.admin.create(buffered(strategy={"name": strategy}))


async def test_over_selection_has_no_meaning_with_a_buffer(small: Federation) -> None:
    with pytest.raises(errors.InvalidPlan, match=r"cohort.over_selection is 1.5, and with a buffer nobody's work is in vain; leave it out"):
        await small.admin.create(buffered(cohort={"target": 4, "quorum": 1, "over_selection": 1.5}))
