"""Published rounds made again from their blobs, by the command, beside a coordinator that has them open."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import delete, select, update
from typer.testing import CliRunner, Result

from coordinator import retention, verification
from coordinator.__main__ import app
from coordinator.tables import Job, PublishedSlice, Round, Run
from protocol.plan import Dtype
from protocol.slices import Factors, pack, unpack
from protocol.states import JobState
from protocol.views import Manifest
from tests.federation import Federation, make_plan, make_profile, open_federation

# Whatever a round's bytes may follow from: clipped changes, the adapter two rounds ago, two ranks, half precision, what int8 was added to.
PLAN = make_plan(
    rounds=3,
    evaluation={"every": 0},
    strategy={"name": "delta", "options": {"step": 0.5, "momentum": 0.5}},
    ranks={"name": "labels", "ladder": [2, 4], "options": {"label": "class", "table": {"small": 2}, "default": 4}},
    norm={"bound": 1.0},
    wire="bfloat16",
    uploads="int8",
)


@dataclass(frozen=True)
class Desk:
    """Whoever has the coordinator's machine and its command."""

    federation: Federation
    database_url: str
    folder: Path

    def verify(self, *words: str) -> Result:
        env = {"DATA": str(self.folder), "DATABASE_URL": self.database_url, "EXECUTOR": "threads://1"}
        return CliRunner().invoke(app, ["verify", *words], env={f"HLORA_COORDINATOR_{name}": value for name, value in env.items()})

    def blob(self, digest: str) -> Path:
        return self.folder / "blobs" / digest.replace(":", "/")

    def amend(self, run: str, number: int, **values: Any) -> None:
        """Change a round's row, as only somebody with the database can."""
        with self.federation.parts.database.write() as session:
            session.execute(update(Round).where(Round.run_id == run, Round.number == number).values(**values))


both = pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])


@pytest.fixture
def kind() -> str:
    """The kind of database, where a test does not ask for both."""
    return "sqlite"


@pytest.fixture
async def desk(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Desk]:
    """A coordinator with three devices of two sizes."""
    url = request.getfixturevalue(f"{kind}_url")
    async with open_federation(url, tmp_path) as federation:
        for number, size in enumerate(["small", "large", "large"], 1):
            await federation.enrol(f"device {number}", make_profile(train=10 * number), labels={"class": size})
        yield Desk(federation, url, tmp_path)


@pytest.fixture
async def played(desk: Desk) -> tuple[str, list[Manifest]]:
    """A run that is over, and the manifests of its four rounds."""
    run = (await desk.federation.admin.create(PLAN)).id
    await desk.federation.play([run])
    views = [await desk.federation.admin.round(run, number) for number in range(4)]
    return run, [view.manifest for view in views if view.manifest is not None]


@both
@pytest.mark.usefixtures("played")
async def test_every_round_of_a_run_comes_to_the_same_bytes_again(desk: Desk) -> None:
    stored = {path: path.stat().st_mtime_ns for path in desk.folder.glob("blobs/sha256/*")}

    said = desk.verify("small")

    made_again = "agrees: adapter and 2 slices, from"
    assert said.stdout.splitlines() == [
        f"round 0 {made_again} the plan alone",
        *(f"round {n} {made_again} 3 contributions" for n in (1, 2, 3)),
    ]
    assert said.exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in desk.folder.glob("blobs/sha256/*")} == stored


@both
async def test_a_manifest_says_what_was_merged(desk: Desk, played: tuple[str, list[Manifest]]) -> None:
    run, manifests = played
    views = [await desk.federation.admin.round(run, number) for number in range(4)]
    detail = await desk.federation.admin.run(run)

    assert [manifest.round for manifest in manifests] == [0, 1, 2, 3]
    assert [manifest.previous for manifest in manifests] == [None, *(view.adapter and view.adapter.digest for view in views[:3])]
    assert [manifest.earlier for manifest in manifests] == [None, None, *(view.adapter and view.adapter.digest for view in views[:2])]
    assert manifests[0].inputs == []
    for view, before, manifest in zip(views[1:], views, manifests[1:], strict=False):
        assert (manifest.plan, manifest.adapter, manifest.slices) == (detail.plan_digest, view.adapter, view.slices)
        assert [input.digest for input in manifest.inputs] == sorted(job.slice.digest for job in view.jobs if job.slice)
        assert sum(input.weight for input in manifest.inputs) == pytest.approx(1)
        assert any(input.shrink < 1 for input in manifest.inputs)
        jobs = {job.id: job for job in view.jobs}
        for input in manifest.inputs:
            job = jobs[input.job]
            assert (input.client, input.rank, input.weight) == (job.client_name, job.rank.rank, job.weight)
            assert (input.base, input.staleness) == (before.slices[input.rank].digest, 0)
        assert manifest.software.keys() == {"hlora", "torch", "numpy", "python", "processor"}


@both
async def test_a_round_from_before_there_were_manifests_is_verified_from_its_rows(desk: Desk, played: tuple[str, list[Manifest]]) -> None:
    run, _ = played
    with desk.federation.parts.database.write() as session:
        session.execute(update(Round).values(manifest=None))
        session.execute(update(Job).where(Job.weight.is_not(None)).values(counted_in=Job.round_id))  # as the migration does

    said = desk.verify(run)

    assert [line.split(":")[0] for line in said.stdout.splitlines()] == [f"round {n} agrees" for n in range(4)]
    assert said.exit_code == 0
    with desk.federation.parts.database.write() as session:
        session.execute(update(Job).where(Job.rank == 2).values(weight=5.0))
    assert desk.verify(run, "--round", "1").stdout.endswith("; nothing says with which software it was made\n")


async def test_contributions_to_a_buffer_are_merged_again_with_the_weights_that_their_age_gave_them(desk: Desk) -> None:
    changes = {"rounds": 4, "norm": None, "cohort": {"target": 3, "quorum": 1}, "buffer": {"size": 2, "exponent": 0.5}}
    run = await desk.federation.open(make_plan(**PLAN.model_dump(mode="json") | changes))
    slow, *quick = desk.federation.devices
    late = await slow.take()
    for _ in range(2):
        for device in quick:
            await device.complete(await device.take())
        desk.federation.tick()
    await slow.complete(late)
    await desk.federation.play([run])

    said = desk.verify(run)

    manifest = (await desk.federation.admin.round(run, 3)).manifest
    assert manifest is not None
    assert [input.staleness for input in manifest.inputs if input.job == late.id] == [2]
    assert [line.split(":")[0] for line in said.stdout.splitlines()] == [f"round {n} agrees" for n in range(5)]


async def test_a_round_that_neither_manifest_nor_rows_describe_is_not_held_to_agree(desk: Desk, played: tuple[str, list[Manifest]]) -> None:
    run, _ = played
    desk.amend(run, 2, manifest=None)
    with desk.federation.parts.database.write() as session:
        session.execute(update(Job).values(state=JobState.cancelled))

    said = desk.verify(run, "--round", "2")

    assert said.stdout.startswith("round 2 cannot be checked: it has no manifest")
    assert said.exit_code == 2


async def test_a_damaged_blob_is_found_and_named_by_every_round_that_needs_it(desk: Desk, played: tuple[str, list[Manifest]]) -> None:
    run, manifests = played
    digest = manifests[2].inputs[0].digest
    data = bytearray(desk.blob(digest).read_bytes())
    data[-1] ^= 1
    desk.blob(digest).write_bytes(data)

    said = desk.verify(run)

    verdicts = [line.split(":")[0] for line in said.stdout.splitlines()]
    assert verdicts == ["round 0 agrees", "round 1 agrees", "round 2 differs", "round 3 agrees"]
    assert digest in said.stdout
    assert said.exit_code == 1


async def test_a_lost_blob_is_found_and_named(desk: Desk, played: tuple[str, list[Manifest]]) -> None:
    run, manifests = played
    desk.blob(manifests[3].slices[2].digest).unlink()

    said = desk.verify(run)

    assert said.stdout.splitlines()[3] == f"round 3 differs: the store has lost {manifests[3].slices[2].digest}"
    assert said.exit_code == 1


async def test_bytes_that_do_not_follow_from_the_manifest_differ_and_the_software_then_and_now_is_told(
    desk: Desk, played: tuple[str, list[Manifest]]
) -> None:
    run, manifests = played
    other = manifests[1].inputs[0].model_copy(update={"weight": 2.0})
    for number, software in ((1, manifests[1].software), (2, manifests[2].software | {"torch": "1.0"})):
        changed = manifests[number].model_copy(update={"inputs": [other, *manifests[number].inputs[1:]], "software": software})
        desk.amend(run, number, manifest=changed.model_dump(mode="json"))

    lines = desk.verify(run).stdout.splitlines()

    assert lines[1].startswith("round 1 differs: adapter, slice of rank 2, slice of rank 4: other bytes than were published")
    assert lines[1].endswith("; with the same software")
    assert f"; torch 1.0 then, {manifests[2].software['torch']} now" in lines[2]


def turned_and_moved(move: float) -> Callable[[bytes], bytes]:
    """An adapter of which another device found the first direction with the other sign, moved by that share of it."""

    def other(data: bytes) -> bytes:
        found = unpack(data)
        signs = torch.tensor([-1.0] + [1.0] * (found.label.rank - 1))
        factors = {name: Factors(b=f.b * signs * (1 + move), a=f.a * signs[:, None]) for name, f in found.factors.items()}
        assert PLAN.layout is not None
        return pack(replace(found, factors=factors), PLAN.layout, Dtype.float32)

    return other


def shortened(data: bytes) -> bytes:
    """An adapter of fewer directions."""
    found = unpack(data)
    assert PLAN.layout is not None
    factors = {name: f.of([0, 1]) for name, f in found.factors.items()}
    return pack(replace(found, label=found.label.model_copy(update={"rank": 2}), factors=factors), PLAN.layout, Dtype.float32)


TOLERANCE = "0.0001 and the rounding of bfloat16; merged on NVIDIA H200, checked on cpu"


def published_elsewhere(desk: Desk, run: str, manifest: Manifest, other: Callable[[bytes], bytes]) -> None:
    """Let a round have been merged on a GPU, and its adapter have come to other bytes there."""
    blobs = desk.federation.parts.blobs
    adapter = blobs.put(other(blobs.read(manifest.adapter.digest)))
    changed = manifest.model_copy(update={"adapter": adapter, "device": "NVIDIA H200"})
    desk.amend(run, manifest.round, adapter=adapter.digest, manifest=changed.model_dump(mode="json"))


async def test_a_round_that_was_merged_on_another_device_agrees_where_its_products_do(
    desk: Desk, played: tuple[str, list[Manifest]]
) -> None:
    run, manifests = played
    assert [manifest.device for manifest in manifests] == ["cpu"] * 4
    published_elsewhere(desk, run, manifests[1], turned_and_moved(1e-6))

    said = desk.verify(run, "--round", "1")

    assert said.stdout == f"round 1 agrees: adapter and 2 slices, from 3 contributions, within {TOLERANCE}\n"
    assert said.exit_code == 0


@pytest.mark.parametrize("other", [turned_and_moved(1e-3), shortened, lambda data: b"no slice"])
async def test_a_round_that_was_merged_on_another_device_differs_where_its_products_do(
    desk: Desk, played: tuple[str, list[Manifest]], other: Callable[[bytes], bytes]
) -> None:
    run, manifests = played
    published_elsewhere(desk, run, manifests[1], other)

    said = desk.verify(run, "--round", "1")

    assert said.stdout == f"round 1 differs: adapter: further from what was published than {TOLERANCE}; with the same software\n"
    assert said.exit_code == 1


async def test_a_slice_that_another_device_did_not_publish_is_missed(desk: Desk, played: tuple[str, list[Manifest]]) -> None:
    run, manifests = played
    fewer = manifests[1].model_copy(update={"slices": {4: manifests[1].slices[4]}, "device": "NVIDIA H200"})
    desk.amend(run, 1, manifest=fewer.model_dump(mode="json"))
    with desk.federation.parts.database.write() as session:
        session.execute(delete(PublishedSlice).where(PublishedSlice.digest == manifests[1].slices[2].digest))

    assert desk.verify(run, "--round", "1").stdout.startswith("round 1 differs: slice of rank 2: further from")


async def test_a_manifest_and_rows_that_contradict_each_other_do_not_agree(desk: Desk, played: tuple[str, list[Manifest]]) -> None:
    run, manifests = played
    desk.amend(run, 1, adapter=manifests[2].adapter.digest)

    said = desk.verify(run, "--round", "1")

    assert (said.exit_code, said.stdout) == (1, "round 1 differs: its manifest names another plan or other blobs than its rows\n")


async def test_a_round_that_cannot_be_merged_any_more_differs(desk: Desk, played: tuple[str, list[Manifest]]) -> None:
    run, manifests = played
    other = manifests[1].inputs[0].model_copy(update={"rank": 3})
    desk.amend(run, 1, manifest=manifests[1].model_copy(update={"inputs": [other]}).model_dump(mode="json"))

    said = desk.verify(run, "--round", "1")

    assert said.stdout.startswith("round 1 differs: it cannot be merged again: ")
    assert said.exit_code == 1


@both
async def test_what_the_retention_policy_gave_up_cannot_be_checked_and_is_no_difference(
    desk: Desk, played: tuple[str, list[Manifest]]
) -> None:
    run, manifests = played
    with desk.federation.parts.database.write() as session:
        retention.forget(session, 1, desk.federation.clock.now)
        kept = session.scalars(select(Round.adapter)).all()
    for digest in {digest for manifest in manifests[:2] for digest in _lasting(manifest)} - {*kept, *_lasting(manifests[3])}:
        desk.blob(digest).unlink()

    said = desk.verify(run)

    verdicts = [line.split(":")[0] for line in said.stdout.splitlines()]
    assert verdicts == ["round 0 agrees", "round 1 cannot be checked", "round 2 cannot be checked", "round 3 agrees"]
    assert said.exit_code == 0
    desk.blob(manifests[1].adapter.digest).unlink()
    assert desk.verify(run).exit_code == 1  # adapters are kept for good


async def test_what_is_given_up_while_it_is_verified_is_no_difference(desk: Desk, played: tuple[str, list[Manifest]]) -> None:
    run, manifests = played
    parts = desk.federation.parts

    def meanwhile(told: str) -> None:
        if told == "round 1: merging it again":
            desk.amend(run, 1, forgotten=True)
            parts.blobs.delete(manifests[1].inputs[0].digest)

    with parts.database.read() as session:
        found = verification.records(session, verification.find(session, run), 1, parts.blobs.url)
    (finding,) = verification.Verifier(parts.database, parts.blobs, parts.executor, meanwhile).verify(found)

    assert finding.line().startswith("round 1 cannot be checked: its contributions were given up")


async def test_a_strategy_that_is_not_installed_any_more_is_no_difference(desk: Desk, played: tuple[str, list[Manifest]]) -> None:
    run, _ = played
    with desk.federation.parts.database.write() as session:
        row = session.get_one(Run, run)
        row.plan = row.plan | {"strategy": {"name": "gone", "options": {}}}

    said = desk.verify(run)

    lines = said.stdout.splitlines()
    assert all(line.startswith(f"round {n} cannot be checked: this program cannot merge it: ") for n, line in enumerate(lines))
    assert "gone" in lines[1]


def _lasting(manifest: Manifest) -> set[str]:
    return {*(blob.digest for blob in manifest.slices.values()), *(d for input in manifest.inputs for d in (input.digest, input.base))}


async def test_for_programs_each_round_is_a_json_object(desk: Desk, played: tuple[str, list[Manifest]]) -> None:
    run, manifests = played

    found = [json.loads(line) for line in desk.verify(run, "--json").stdout.splitlines()]

    assert [(one["run"], one["round"], one["verdict"]) for one in found] == [("small", n, "agrees") for n in range(4)]
    assert all(one["made_with"] == one["verified_with"] == manifests[0].software for one in found)


async def test_a_run_without_published_rounds_leaves_nothing_to_check(desk: Desk) -> None:
    run = (await desk.federation.admin.create(PLAN)).id

    assert desk.verify(run).exit_code == 2
    refused = desk.verify(run, "--round", "1")
    assert "has not published round 1" in str(refused.exception)
    assert "no run with the id or name 'nobody'" in str(desk.verify("nobody").exception)


async def test_there_must_be_a_database_of_the_programs_schema(tmp_path: Path, sqlite_url: str) -> None:
    async with open_federation(sqlite_url, tmp_path) as federation:
        missing = Desk(federation, f"sqlite:///{tmp_path}/none.sqlite", tmp_path).verify("small")
        (tmp_path / "empty.sqlite").touch()
        empty = Desk(federation, f"sqlite:///{tmp_path}/empty.sqlite", tmp_path).verify("small")

    assert "there is no database" in str(missing.exception)
    assert not (tmp_path / "none.sqlite").exists()
    assert "python -m coordinator migrate" in str(empty.exception)
