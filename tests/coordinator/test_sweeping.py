"""The orphan sweep: what nothing names goes, and what is named stays, whoever puts, names and sweeps at the same time."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import random
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import combinations, islice
from pathlib import Path

import pytest
from sqlalchemy.orm import Session
from typer.testing import CliRunner

from coordinator import errands, sweeping, tables
from coordinator.__main__ import app
from coordinator.blobs import GROWING
from coordinator.errands import Stored
from coordinator.initial import first_adapter
from protocol import errors
from protocol.messages import BlobRef, Job
from protocol.states import RoundState, RunState
from tests.coordinator.test_races import second
from tests.federation import Device, Federation, done, make_plan, open_federation, repr_digest

LATER = timedelta(days=1000)  # the test's clock stands still, the files' does not


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def grow_old(federation: Federation, *digests: str) -> None:
    """Let these blobs, by default all, have been put long ago."""
    folder = federation.parts.settings.data / "blobs" / "sha256"
    for path in [folder / digest.removeprefix("sha256:") for digest in digests] or folder.iterdir():
        os.utime(path, (0, 0))


def sweep(federation: Federation) -> set[str]:
    """What the sweep deletes, however young."""
    parts = federation.parts
    return {blob.digest for batch in sweeping.sweep(parts.database, parts.blobs, datetime.now(UTC) + LATER) for blob in batch}


def condemn(federation: Federation, *digests: str) -> list[str]:
    with federation.parts.database.write() as session:
        return sweeping.condemn(session, digests, federation.clock.now)


def here(federation: Federation) -> set[str]:
    return {blob.digest for blob in federation.parts.blobs.digests()}


# --- what is named ------------------------------------------------------------------------------------------------------


async def test_after_a_whole_run_only_orphans_are_swept(federation: Federation) -> None:
    devices = await federation.enrol_many(3)
    run = await federation.open(make_plan(cohort={"target": 3, "quorum": 2}))
    orphan = federation.parts.blobs.put(b"put, and never named").digest
    await federation.play([run], devices)
    needed = here(federation) - {orphan}

    grow_old(federation)
    young = federation.parts.blobs.put(b"about to be named").digest
    done = federation.parts.housekeeping.run_once()

    assert done["blobs"] == 1
    assert here(federation) == needed | {young}
    for number in range(3):
        view = await federation.admin.round(run, number)
        assert view.manifest is not None
        named = {view.manifest.previous, view.manifest.earlier, view.manifest.adapter.digest} - {None}
        named |= {blob.digest for blob in view.manifest.slices.values()}
        named |= {digest for each in view.manifest.inputs for digest in (each.digest, each.base)}
        assert named <= needed


async def test_parts_of_an_upload_are_named_until_it_is_given_up(federation: Federation) -> None:
    _, (device, *_), (job, *_) = await federation.training(make_plan())
    data = await device.trained(job)
    await send_part(device, job, data, 0, 1000)
    part = digest_of(data[:1000])
    assert sweep(federation) == set()

    federation.clock.advance(10)
    await device.put_slice(job, data)

    assert sweep(federation) == {part}
    assert digest_of(data) in here(federation)


async def send_part(device: Device, job: Job, data: bytes, start: int, stop: int) -> None:
    headers = {
        "Lease-Epoch": str(job.lease.epoch),
        "Upload-Offset": str(start),
        "Upload-Length": str(len(data)),
        "Repr-Digest": repr_digest(data),
    }
    done(await device.call("PATCH", f"/v1/jobs/{job.id}/slice", content=data[start:stop], headers=headers))


async def test_a_forgotten_round_keeps_its_adapter_and_what_is_still_worked_on(sqlite_url: str, tmp_path: Path) -> None:
    async with open_federation(sqlite_url, tmp_path, keep_rounds=1) as small:
        devices = await small.enrol_many(3)
        run = await small.open(make_plan(rounds=3, evaluation={"every": 0}))
        for _ in range(2):
            for device in devices:
                await device.complete(await device.take())
            small.tick()
        held = [await device.take() for device in devices]
        before = [await small.admin.round(run, number) for number in range(3)]

        small.parts.housekeeping.run_once()
        swept = sweep(small)

        old = {blob.digest for view in before[:2] for blob in view.slices.values()}
        sent = {job.slice.digest for job in before[1].jobs if job.slice}
        assert before[2].manifest is not None
        started = {noted.base for noted in before[2].manifest.inputs}
        assert started < old
        assert swept == (old | sent) - started
        assert {view.adapter.digest for view in before if view.adapter} <= here(small)
        for device, job in zip(devices, held, strict=True):
            await device.complete(job)
        small.tick()
        assert (await small.admin.run(run)).state is RunState.finished


# --- putting, naming and sweeping at once --------------------------------------------------------------------------------


class Naming:
    """Somebody who has bytes and wants a job to name them."""

    def __init__(self, federation: Federation, device: Device, job: Job, data: bytes) -> None:
        self._parts, self._held, self._data = federation.parts, device.holds(job), data
        self.named = False

    def put(self) -> None:
        self._parts.blobs.put(self._data)

    def name(self) -> None:
        blob = BlobRef(digest=digest_of(self._data), bytes=len(self._data))
        with self._parts.database.write() as session:
            (told,) = errands.keep(session, [Stored(self._held, blob, 0.1, self._parts.blobs)], self._parts.database.clock(session))
        assert told == blob or isinstance(told, errors.Unavailable)
        self.named = told == blob


class Sweep:
    """A sweep for one blob, in its steps."""

    def __init__(self, federation: Federation, digest: str) -> None:
        self._federation, self._digest = federation, digest
        self._found = self._doomed = False

    def steps(self) -> list[Callable[[], None]]:
        return [self._look, self._condemn, self._look_again, self._delete]

    def _look(self) -> None:
        parts = self._federation.parts
        batches = sweeping.orphans(parts.database, parts.blobs, datetime.now(UTC) + LATER)
        self._found = any(blob.digest == self._digest for batch in batches for blob in batch)

    def _condemn(self) -> None:
        if self._found:
            condemn(self._federation, self._digest)

    def _look_again(self) -> None:
        with self._federation.parts.database.read() as session:
            self._doomed = session.get(tables.Condemned, self._digest) is not None

    def _delete(self) -> None:
        if self._doomed:
            sweeping.delete_condemned(self._federation.parts.database, self._federation.parts.blobs, self._digest)


def merges(*lines: list[Callable[[], None]]) -> Iterator[list[Callable[[], None]]]:
    """Every order of all steps in which each line keeps its own."""
    if len(lines) == 1:
        yield lines[0]
        return
    for rest in merges(*lines[1:]):
        size = len(lines[0]) + len(rest)
        for places in combinations(range(size), len(lines[0])):
            first, others = iter(lines[0]), iter(rest)
            yield [next(first) if place in places else next(others) for place in range(size)]


def count_merges(*sizes: int) -> int:
    return math.factorial(sum(sizes)) // math.prod(map(math.factorial, sizes))


async def test_in_whatever_order_a_named_blob_is_there(federation: Federation) -> None:
    """Putting and naming an old blob beside one sweep, in every order; and beside two, of which one may die, in many."""
    _, (device, *_), (job, *_) = await federation.training(make_plan())
    chance = random.Random(0)
    orders = [(0, order) for order in range(count_merges(2, 4))]
    orders += [(lives, order) for lives in (1, 2, 3, 4) for order in chance.sample(range(count_merges(2, 4, lives)), 25)]
    outcomes = set()
    for number, (lives, order) in enumerate(orders):
        data = f"blob {number}".encode()
        federation.parts.blobs.put(data)
        naming = Naming(federation, device, job, data)
        one, two = (Sweep(federation, digest_of(data)) for _ in range(2))
        lines = [[naming.put, naming.name], one.steps(), two.steps()[:lives]]
        for step in next(islice(merges(*filter(None, lines)), order, None)):
            step()
            assert not naming.named or digest_of(data) in here(federation)
        outcomes.add(naming.named)
        sweep(federation)
        if not naming.named:  # whoever has the bytes succeeds the next time
            naming.put()
            naming.name()
        assert naming.named
        assert federation.parts.blobs.read(digest_of(data)) == data
    assert outcomes == {True, False}


async def test_a_sweep_that_wakes_late_deletes_nothing_that_was_put_again_meanwhile(federation: Federation) -> None:
    _, (device, *_), (job, *_) = await federation.training(make_plan())
    data = await device.trained(job)
    digest = federation.parts.blobs.put(data).digest
    condemn(federation, digest)
    _, _, look_again, delete = Sweep(federation, digest).steps()

    look_again()
    sweep(federation)
    await device.put_slice(job, data)
    delete()

    assert federation.parts.blobs.read(digest) == data


async def test_of_naming_and_condemning_at_once_one_waits_for_the_other(federation: Federation) -> None:
    """Neither sees the other's uncommitted row; the second of them must wait until it does."""
    _, (device, other, _), (job, another, _) = await federation.training(make_plan())
    data, more = await device.trained(job), await other.trained(another)
    digest = federation.parts.blobs.put(data).digest

    def name(session: Session) -> None:
        blob = BlobRef(digest=digest, bytes=len(data))
        assert errands.keep(session, [Stored(device.holds(job), blob, 0.1, federation.parts.blobs)], federation.clock.now) == [blob]

    assert await second(federation, name, asyncio.to_thread(condemn, federation, digest)) == []

    lost = federation.parts.blobs.put(more).digest
    with pytest.raises(errors.Unavailable, match="put it again") as caught:
        await second(federation, lambda session: sweeping.condemn(session, [lost], federation.clock.now), other.put_slice(another, more))
    assert caught.value.retryable
    assert sweep(federation) == set()
    assert (await other.put_slice(another, more)).digest == lost
    assert here(federation) >= {digest, lost}


async def test_many_who_put_and_name_lose_nothing_to_many_who_sweep(federation: Federation) -> None:
    """Threads that share few contents, so that they meet; each looks at what it has named as long as it is named."""
    _, devices, held = await federation.training(make_plan())
    over = threading.Event()
    counts = {"named": 0, "refused": 0, "swept": 0}

    def name(device: Device, job: Job, seed: int) -> None:
        chance = random.Random(seed)
        while not over.wait(0.002):  # SQLite has no queue: without a pause nobody else would ever write
            data = f"one of {chance.randrange(4)}".encode()
            naming = Naming(federation, device, job, data)
            naming.put()
            naming.name()
            counts["named" if naming.named else "refused"] += 1
            assert not naming.named or federation.parts.blobs.read(digest_of(data)) == data

    def sweep_on() -> None:
        for _ in range(15):
            counts["swept"] += len(sweep(federation))

    namers = [asyncio.create_task(asyncio.to_thread(name, *pair, seed)) for seed, pair in enumerate(zip(devices, held, strict=True))]
    try:
        await asyncio.gather(*(asyncio.to_thread(sweep_on) for _ in range(2)))
    finally:
        over.set()
    await asyncio.gather(*namers)

    assert counts["named"] > 0
    assert counts["swept"] > 0
    for job in held:
        with federation.parts.database.read() as session:
            named = session.get_one(tables.Job, job.id).slice
        assert named is None or named in here(federation)


@pytest.mark.parametrize("deleted", [False, True])
async def test_a_sweep_that_died_is_finished_by_the_next(federation: Federation, deleted: bool) -> None:
    run, (device, *_), (job, *_) = await federation.training(make_plan())
    data = await device.trained(job)
    digest = federation.parts.blobs.put(data).digest
    assert condemn(federation, digest) == [digest]
    if deleted:
        federation.parts.blobs.delete(digest)

    with pytest.raises(errors.Unavailable):
        await device.put_slice(job, data)
    assert (await federation.admin.job(run, job)).slice is None

    federation.parts.housekeeping.run_once()

    assert digest not in here(federation)
    await device.put_slice(job, data)
    assert sweep(federation) == set()
    assert federation.parts.blobs.read(digest) == data


async def test_a_round_whose_outcome_is_being_swept_is_published_after_that(federation: Federation) -> None:
    """As after a crash before publishing, and a long outage: the merge is repeated while its orphans are on their way out."""
    await federation.enrol_many(3)
    plan = make_plan()
    orphan = first_adapter(plan, federation.parts.blobs).adapter.digest
    condemn(federation, orphan)
    run = (await federation.admin.create(plan)).id

    with pytest.raises(errors.Unavailable):
        federation.tick()
    federation.parts.housekeeping.run_once()
    federation.tick()

    view = await federation.admin.round(run, 0)
    assert (view.state, view.adapter and view.adapter.digest) == (RoundState.published, orphan)
    assert orphan in here(federation)


# --- files, and the command ----------------------------------------------------------------------------------------------


async def test_what_nobody_finished_is_removed_when_it_is_old(small: Federation) -> None:
    spool, staging = small.parts.settings.spool_folder, small.parts.settings.data / "blobs" / "staging"
    spool.mkdir()
    old, young = spool / "upload-old", staging / "young"
    foreign, cut = spool / "notes.txt", staging / "cut off"
    for path in (old, young, foreign, cut):
        path.write_bytes(b"half of something")
    merged, merging = (Path(tempfile.mkdtemp(prefix=GROWING)) for _ in range(2))
    for folder in (merged, merging):
        (folder / "adapter").write_bytes(b"half of an adapter")
    for path in (old, foreign, cut, merged / "adapter", merged, merging):
        os.utime(path, (0, 0))

    small.clock.advance(50 * 365 * 86_400)  # a database may think that it is another century
    assert small.parts.housekeeping.run_once()["files"] >= 3

    assert [path.exists() for path in (old, cut, merged)] == [False, False, False]
    assert [path.exists() for path in (young, foreign, merging)] == [True, True, True]
    shutil.rmtree(merging)


def call(folder: Path, *words: str) -> str:
    result = CliRunner().invoke(app, words, env={"HLORA_COORDINATOR_DATA": str(folder)})
    assert result.exit_code == 0, result.output
    return result.stdout


async def test_the_command_sweeps_beside_a_coordinator_and_says_before_what_it_would_delete(tmp_path: Path) -> None:
    call(tmp_path, "migrate")
    async with open_federation(f"sqlite:///{tmp_path}/hlora.sqlite", tmp_path) as small:
        await small.enrol_many(3)
        await small.open(make_plan())
        needed = here(small)
        orphan = small.parts.blobs.put(b"put, and never named")
        grow_old(small)
        small.parts.settings.spool_folder.mkdir()
        cut = small.parts.settings.spool_folder / "upload-cut"
        cut.touch()
        os.utime(cut, (0, 0))

        would = json.loads(call(tmp_path, "sweep", "--dry-run", "--json"))
        assert here(small) == needed | {orphan.digest}
        said = call(tmp_path, "sweep")

        found = {"digest": orphan.digest, "bytes": orphan.bytes, "put": "1970-01-01T00:00:00+00:00"}
        assert (would["dry_run"], would["blobs"]) == (True, [found])
        assert str(cut) in would["files"]
        assert f"deleted {orphan.digest}, {orphan.bytes} bytes" in said
        assert f"deleted {cut}\n" in said
        assert "deleted 1 blobs that nothing names and " in said
        assert here(small) == needed
        assert not cut.exists()
        assert json.loads(call(tmp_path, "sweep", "--json")) == {"dry_run": False, "blobs": [], "files": []}
