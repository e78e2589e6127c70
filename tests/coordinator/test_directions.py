"""Jobs that train some of the directions that they start from: over HTTP, from the draw to the verified round."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
import torch
from sqlalchemy import delete

from coordinator import aggregation, retention, sweeping, verification
from coordinator.aggregation import Changes
from coordinator.tables import PublishedStart
from coordinator.verification import Verdict
from protocol import errors, slices
from protocol.compact import trained_parts
from protocol.contents import Label
from protocol.messages import Job
from protocol.plan import Plan, Sides
from protocol.slices import Factors, Slice
from protocol.states import JobKind, RunState
from tests.federation import Federation, make_plan, make_profile, moved

CAP = 6
TRAINED = {"folded": range(4), "fedex": range(4), "flora": range(CAP, CAP + 4)}  # by rank 4
NOBODY_IS_SPARED = datetime.max.replace(tzinfo=UTC)
RANKS = {"name": "labels", "ladder": [2, 4], "options": {"label": "class", "table": {"small": 2}, "default": 4}}
each_strategy = pytest.mark.parametrize("strategy", [name for name in aggregation.names() if name != "fedavg"])


def plan_of(strategy: str, **changes: Any) -> Plan:
    options = {"momentum": 0.5, "reweight": 0.5} if issubclass(aggregation.load(strategy), Changes) else {}
    told = {"strategy": {"name": strategy, "options": options}, "cap": CAP, "evaluation": {"every": 0}}
    return make_plan(**told | changes)


async def enrol(federation: Federation) -> None:
    for number, size in enumerate(["small", "large", "large"], 1):
        await federation.enrol(f"device {number}", make_profile(train=10 * number), labels={"class": size})


def findings(federation: Federation, run: str) -> list[Verdict]:
    """What verifying each round of a run comes to."""
    parts = federation.parts
    with parts.database.read() as session:
        found = verification.records(session, verification.find(session, run), None, parts.blobs.url)
    verifier = verification.Verifier(parts.database, parts.blobs, parts.executor, lambda _: None)
    return [finding.verdict for finding in verifier.verify(found)]


def sweep(federation: Federation) -> set[str]:
    """Delete at once whatever nobody names; gives what is left."""
    for _ in sweeping.sweep(federation.parts.database, federation.parts.blobs, NOBODY_IS_SPARED):
        pass
    return {blob.digest for blob in federation.parts.blobs.digests()}


@each_strategy
async def test_a_run_of_unequal_ranks_ends_and_every_round_can_be_made_again(strategy: str, small: Federation) -> None:
    """Whatever bytes may follow from: momentum, reweighting, clipped changes, half precision; and nothing needed is swept."""
    await enrol(small)
    run = (await small.admin.create(plan_of(strategy, rounds=3, ranks=RANKS, norm={"bound": 1.0}, wire="bfloat16"))).id
    while (await small.admin.run(run)).state is RunState.running:
        for device in small.devices:
            small.tick()
            sweep(small)
            if (job := await device.next_job()) is not None:
                await device.complete(job)

    assert (await small.admin.run(run)).state is RunState.finished
    assert findings(small, run) == [Verdict.agrees] * 4
    archive = await small.admin.call("GET", f"/v1/runs/{run}/adapter?rank=2")
    assert archive.status_code == 200


async def test_rotating_clients_are_told_their_own_directions_on_either_database(federation: Federation) -> None:
    await enrol(federation)
    run = await federation.open(plan_of("rotating", rounds=2, ranks=RANKS))
    told: dict[tuple[int, str], list[int]] = {}
    for _ in range(2):
        jobs = [(device, await device.take()) for device in federation.devices]
        for device, job in jobs:
            assert job.directions == sorted(set(job.directions or ()))
            assert len(job.directions) == job.rank
            told[job.round, device.name] = job.directions
            start = slices.unpack(await device.blob(job.slice.digest))
            assert (start.label.rank, start.label.scale) == (CAP, job.scale)
        again = await federation.devices[0].next_job()
        assert again is not None
        assert again.directions == jobs[0][1].directions, "a job that is handed out again trains what it trained"
        for device, job in [(federation.devices[0], again), *jobs[1:]]:
            await device.complete(job)
        federation.tick()

    assert len({tuple(found) for found in told.values()}) > 3
    manifest = (await federation.admin.round(run, 2)).manifest
    assert manifest is not None
    assert {(input.client, input.directions) for input in manifest.inputs} == {
        (name, tuple(found)) for (round, name), found in told.items() if round == 2
    }
    assert findings(federation, run) == [Verdict.agrees] * 3


@pytest.mark.parametrize("strategy", TRAINED)
async def test_a_job_names_the_directions_that_are_trained(strategy: str, small: Federation) -> None:
    _, _, jobs = await small.training(plan_of(strategy))
    assert {tuple(job.directions or ()) for job in jobs} == {tuple(TRAINED[strategy])}
    assert {job.sides for job in jobs} == {Sides.both}


@each_strategy
async def test_an_evaluation_is_of_what_training_would_start_from(strategy: str, small: Federation) -> None:
    await enrol(small)
    await small.open(plan_of(strategy, evaluation={"every": 1}, ranks=RANKS))
    for device in small.devices:
        measured = await device.take(JobKind.evaluate)
        await device.complete(measured)
        trained = await device.take()
        assert (measured.slice, measured.rank, measured.directions) == (trained.slice, trained.rank, trained.directions)
        assert measured.sides is Sides.both


async def test_an_evaluation_at_a_rank_is_of_its_slice(small: Federation) -> None:
    await enrol(small)
    run = await small.open(plan_of("folded", evaluation={"every": 1, "rank": 2}, ranks=RANKS))
    for device in small.devices:
        job = await device.take(JobKind.evaluate)
        assert (job.slice, job.directions) == ((await small.admin.round(run, 0)).slices[2], None)


async def test_the_norm_of_a_change_is_that_of_the_trained_directions_and_the_head(small: Federation) -> None:
    run, devices, jobs = await small.training(plan_of("rotating"))
    job = jobs[0]
    start = slices.unpack(await devices[0].blob(job.slice.digest))
    trained = moved(start, job)
    await devices[0].put_slice(job, b"".join(trained_parts(trained, start, job.layout, job.upload, directions=job.directions)))
    energy = 0.0
    for module, new in trained.factors.items():
        old = start.factors[module].of(job.directions)
        energy += float((job.scale * (new.b.double() @ new.a.double() - old.b.double() @ old.a.double())).square().sum())
    energy += sum(float((new.double() - start.full[name].double()).square().sum()) for name, new in trained.full.items())
    assert (await small.admin.job(run, job)).change_norm == pytest.approx(energy**0.5, rel=1e-5)


def packed(job: Job, rank: int, sides: Sides, base: str) -> bytes:
    """A slice of zeros that says it is the job's."""
    label = Label(rank=rank, scale=job.scale, round=job.round, base=base, examples=5)
    factors = {m: Factors(b=torch.zeros(n_out, rank), a=torch.zeros(rank, n_in)) for m, (n_out, n_in) in job.layout.modules.items()}
    full = {name: torch.zeros(shape) for name, shape in job.layout.full.items()}
    return b"".join(slices.parts(Slice(label, factors, full), job.layout, job.wire, sides))


@pytest.mark.parametrize(
    ("strategy", "rank", "sides", "base"),
    [
        ("folded", CAP, Sides.both, None),  # all that was handed out
        ("folded", 4, Sides.b, None),
        ("ffa", 4, Sides.both, None),  # the frozen a too
        ("ffa", 2, Sides.b, None),
        ("rotating", 4, Sides.both, f"sha256:{1:064}"),
    ],
)
async def test_what_is_not_what_the_job_trains_is_refused(
    strategy: str, rank: int, sides: Sides, base: str | None, small: Federation
) -> None:
    _, (device, *_), (job, *_) = await small.training(plan_of(strategy))
    with pytest.raises((errors.MismatchedSlice, errors.TooLarge)):
        await device.put_slice(job, packed(job, rank, sides, base or job.slice.digest))


async def test_b_alone_must_be_finite_too(small: Federation) -> None:
    _, (device, *_), (job, *_) = await small.training(plan_of("ffa"))
    start = slices.unpack(await device.blob(job.slice.digest))
    trained = moved(start, job)
    trained.factors["attention.key"].b[0, 0] = torch.nan
    with pytest.raises(errors.NonFiniteSlice):
        await device.put_slice(job, b"".join(trained_parts(trained, start, job.layout, job.upload, sides=job.sides)))


async def test_factors_that_began_from_different_versions_are_not_averaged(small: Federation) -> None:
    with pytest.raises(errors.InvalidPlan, match="pull the new one back"):
        await small.admin.create(plan_of("fedex", buffer={"size": 1}))


@pytest.mark.parametrize("strategy", [name for name in aggregation.names() if aggregation.load(name).stale])
async def test_strategies_that_merge_changes_take_old_versions_from_a_buffer(strategy: str, small: Federation) -> None:
    await enrol(small)
    run = (await small.admin.create(plan_of(strategy, rounds=4, ranks=RANKS, buffer={"size": 1, "exponent": 0.5}))).id
    await small.play([run])

    stale = [input.staleness for n in range(1, 5) if (m := (await small.admin.round(run, n)).manifest) for input in m.inputs]
    assert len(stale) == 4
    assert max(stale) > 0
    assert findings(small, run) == [Verdict.agrees] * 5


async def test_what_training_starts_from_is_kept_and_given_up_with_its_round(federation: Federation) -> None:
    await enrol(federation)
    run = (await federation.admin.create(plan_of("rotating", ranks=RANKS))).id
    await federation.play([run])
    manifests = [(await federation.admin.round(run, number)).manifest for number in range(3)]
    starts = [{ref.digest for ref in manifest.starts.values()} for manifest in manifests if manifest is not None]
    assert set.union(*starts) <= sweep(federation)
    assert [len(found) for found in starts] == [1, 1, 1], "ranks of one scale share a file"

    with federation.parts.database.write() as session:
        retention.forget(session, 1, federation.clock.now)
    left = sweep(federation)
    assert not starts[0] & left
    assert starts[1] | starts[2] <= left, "that of the newest round, and what its contributions started from"


async def test_a_run_whose_rounds_published_no_starts_goes_on_from_its_slices(small: Federation) -> None:
    """As one of an earlier release may, whose `zero_pad` kept what it merged in singular form."""
    await enrol(small)
    run = (await small.admin.create(plan_of("zero_pad", ranks=RANKS))).id
    small.parts.conductor.tick()
    small.parts.conductor.tick()
    with small.parts.database.write() as session:
        session.execute(delete(PublishedStart))
    small.tick()
    slices_of_round_0 = (await small.admin.round(run, 0)).slices
    for device in small.devices:
        job = await device.take()
        assert (job.slice, job.directions) == (slices_of_round_0[job.rank], None)
        await device.complete(job)
    (view,) = await small.play([run])
    assert view.state is RunState.finished


async def test_a_lost_start_is_missed_by_verification(small: Federation) -> None:
    await enrol(small)
    run = (await small.admin.create(plan_of("folded"))).id
    await small.play([run])
    manifest = (await small.admin.round(run, 2)).manifest
    assert manifest is not None
    small.parts.blobs.delete(manifest.starts[4].digest)
    assert findings(small, run) == [Verdict.agrees, Verdict.agrees, Verdict.differs]


async def test_a_plan_with_which_the_strategy_cannot_do_what_it_says_is_refused(small: Federation) -> None:
    with pytest.raises(errors.InvalidPlan, match="the cap is 4: set one above 4"):
        await small.admin.create(plan_of("fedex", cap=None))
    with pytest.raises(errors.InvalidPlan, match="strategy rotating, option reweight"):
        await small.admin.create(make_plan(strategy={"name": "rotating", "options": {"reweight": 2}}))
