"""Published rounds made again from their blobs, and compared with what was published.

Every byte is compared; of a round that was merged on another device than this program merges on, every product of factors.

Nothing is changed: a round is merged into a temporary folder, from the real store's blobs, each of which is first held
against its own digest. A coordinator may work beside.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from coordinator import counting, manifests, nearness, published, publishing
from coordinator.assembly import Merged
from coordinator.blobs import Blobs
from coordinator.database import Database
from coordinator.devices import PROCESSOR
from coordinator.initial import first_adapter
from coordinator.jobs import plan_of
from coordinator.merge import RoundTask, merge_round
from coordinator.reading import open_slice
from coordinator.tables import Round, Run
from protocol import errors
from protocol.messages import BlobRef
from protocol.plan import Dtype, Plan
from protocol.states import RoundState
from protocol.views import Manifest

READ = 4 << 20  # bytes of a blob that are hashed at a time
Tell = Callable[[str], None]  # told how far it is, often


class Verdict(StrEnum):
    """What became of a round's verification."""

    agrees = "agrees"
    differs = "differs"
    unknown = "cannot be checked"


GIVEN_UP = (Verdict.unknown, "its contributions were given up by the retention policy; its adapter is there and sound")


@dataclass(frozen=True)
class Finding:
    """One round, verified."""

    run: str
    round: int
    verdict: Verdict
    detail: str  # what agrees, what differs, or why nobody can say
    made_with: Mapping[str, str]  # software versions; none where the round has no manifest
    verified_with: Mapping[str, str]

    def line(self) -> str:
        """For a person."""
        return f"round {self.round} {self.verdict}: {self.detail}"


@dataclass(frozen=True)
class Record:
    """A published round as its rows describe it."""

    id: int
    run: str
    number: int
    task: RoundTask | Plan | None  # None where nothing says what was merged
    names: dict[str, str]  # "adapter", "slice of rank 2", "start of rank 2" → digest
    made_with: dict[str, str]
    device: str  # that it was merged on
    contradiction: str | None  # between manifest and rows

    def contributions(self) -> set[str]:
        """The blobs that were merged, and those that they started from."""
        inputs = self.task.inputs if isinstance(self.task, RoundTask) else ()
        return {digest for input in inputs for digest in (input.digest, input.base)}

    def adapters(self) -> set[str]:
        """The round's global adapter, and those that it was made from."""
        before: tuple[str | None, ...] = ()
        if isinstance(self.task, RoundTask):
            before = (self.task.previous, self.task.earlier)
        elif self.task is not None:
            before = (self.task.continues,)
        return {self.names["adapter"], *(digest for digest in before if digest is not None)}


def find(session: Session, run: str) -> Run:
    """The run of that id, or the newest of that name. Raises NotFound."""
    found = session.get(Run, run) or session.scalar(select(Run).where(Run.name == run).order_by(Run.created_at.desc()).limit(1))
    if found is None:
        raise errors.NotFound(f"there is no run with the id or name {run!r}")
    return found


def records(session: Session, run: Run, number: int | None, store: str) -> list[Record]:
    """A run's published rounds, oldest first, or the one of that number. Raises NotFound where that one is not published."""
    query = select(Round).where(Round.run_id == run.id, Round.state == RoundState.published).order_by(Round.number)
    rows = list(session.scalars(query if number is None else query.where(Round.number == number)))
    if not rows and number is not None:
        raise errors.NotFound(f"run {run.name} has not published round {number}")
    return [_record(session, run, row, store) for row in rows]


def _record(session: Session, run: Run, row: Round, store: str) -> Record:
    manifest = None if row.manifest is None else Manifest.model_validate(row.manifest)
    ranks, starts = published.slices(session, row.id), published.own_starts(session, row.id)
    names = _names(str(row.adapter), ranks, starts)
    task = _merged_from(session, row, store) if manifest is None else manifests.task_of(manifest, plan_of(run), store)
    contradiction = None
    noted = None if manifest is None else (manifest.plan, manifest.adapter.digest, manifest.slices, manifest.starts)
    if noted is not None and noted != (run.plan_digest, row.adapter, ranks, starts):
        contradiction = "its manifest names another plan or other blobs than its rows"
    made_with, device = (manifest.software, manifest.device) if manifest else ({}, PROCESSOR)
    return Record(row.id, run.name, row.number, task, names, made_with, device, contradiction)


def _names(adapter: str, slices: Mapping[int, BlobRef], starts: Mapping[int, BlobRef]) -> dict[str, str]:
    """What each of a round's blobs is, and its digest."""
    ranks = {f"{kind} of rank {rank}": blob.digest for kind, of in (("slice", slices), ("start", starts)) for rank, blob in of.items()}
    return {"adapter": adapter} | ranks


def _merged_from(session: Session, row: Round, store: str) -> RoundTask | Plan | None:
    """The task of a round that was published before there were manifests."""
    jobs = counting.counted(session, row.id)
    return publishing.task_of(session, row, jobs, store) if jobs or row.number == 0 else None


class Verifier:
    """Verifies rounds, and looks at each blob once, however many rounds name it."""

    def __init__(self, database: Database, blobs: Blobs, executor: Executor, tell: Tell) -> None:
        self._database, self._blobs, self._executor, self._tell = database, blobs, executor, tell
        self._here = manifests.software()
        self._states: dict[str, str] = {}

    def verify(self, found: list[Record]) -> Iterator[Finding]:
        """One finding for each round, as soon as it is known."""
        for record in found:
            verdict, detail = self._examine(record)
            yield Finding(record.run, record.number, verdict, detail, record.made_with, self._here)

    def _examine(self, record: Record) -> tuple[Verdict, str]:
        if record.contradiction is not None:
            return Verdict.differs, record.contradiction
        states = self._look_at(record, record.contributions() | record.adapters() | set(record.names.values()))
        if damaged := sorted(digest for digest, state in states.items() if state == "damaged"):
            return Verdict.differs, f"the bytes of {', '.join(damaged)} are not those that the name stands for: the store has damaged them"
        lost = {digest for digest, state in states.items() if state == "missing"}
        if lost and not (self._forgotten(record) and lost.isdisjoint(record.adapters())):
            return Verdict.differs, f"the store has lost {', '.join(sorted(lost))}"
        if not lost.isdisjoint(record.contributions()):
            return GIVEN_UP
        if record.task is None:
            return Verdict.unknown, "it has no manifest, and its rows do not say what was merged"
        return self._compare(record, record.task)

    def _look_at(self, record: Record, digests: set[str]) -> dict[str, str]:
        """The state of each blob: sound, damaged or missing. Several are read at a time, as hashing takes longer than reading."""
        fresh = sorted(digests - self._states.keys())
        with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="verify") as pool:
            for count, (digest, found) in enumerate(zip(fresh, pool.map(partial(state, self._blobs), fresh), strict=True), 1):
                self._states[digest] = found
                self._tell(f"round {record.number}: {count} of {len(fresh)} blobs read")
        return {digest: self._states[digest] for digest in digests}

    def _forgotten(self, record: Record) -> bool:
        """As it is now: a policy may have given the round up since its rows were read."""
        with self._database.read() as session:
            return session.get_one(Round, record.id).forgotten

    def _compare(self, record: Record, task: RoundTask | Plan) -> tuple[Verdict, str]:
        self._tell(f"round {record.number}: merging it again")
        with tempfile.TemporaryDirectory(prefix="hlora-") as folder:
            scratch = Blobs.open(Path(folder).as_uri())
            try:
                made = first_adapter(task, scratch, self._blobs) if isinstance(task, Plan) else merge_round(task, self._executor, scratch)
            except errors.InvalidPlan as error:
                return Verdict.unknown, f"this program cannot merge it: {error}"
            except (errors.NotFound, errors.InvalidSlice, errors.UnmergeableRound) as error:
                if isinstance(error, errors.NotFound) and self._forgotten(record):  # since its blobs were looked at
                    return GIVEN_UP
                return Verdict.differs, f"it cannot be merged again: {error}{self._versions(record)}"
            return self._held_against(record, task, made, scratch)

    def _held_against(self, record: Record, task: RoundTask | Plan, made: Merged, scratch: Blobs) -> tuple[Verdict, str]:
        """The round as it is, and as it was made again: these bytes are in the scratch."""
        wire, names = (task if isinstance(task, Plan) else task.plan).wire, _names(made.adapter.digest, made.slices, made.starts)
        wrong = [what for what in record.names | names if names.get(what) != record.names.get(what)]
        found, within = "other bytes than were published", ""
        if made.device != record.device:
            wrong = [what for what in wrong if not self._near(what, record.names.get(what), names.get(what), wire, scratch)]
            bound = f"{nearness.TOLERANCE:g} and the rounding of {wire}; merged on {record.device}, checked on {made.device}"
            found, within = f"further from what was published than {bound}", f", within {bound}"
        if wrong:
            return Verdict.differs, f"{', '.join(wrong)}: {found}{self._versions(record)}"
        if isinstance(task, RoundTask):
            origin = f"{len(task.inputs)} contributions"
        else:
            origin = "the plan alone" if task.continues is None else "the adapter that the plan continues"
        files = f"adapter and {len(made.slices)} slices" + (f", {len(made.starts)} starts" if made.starts else "")
        return Verdict.agrees, f"{files}, from {origin}{within}"

    def _near(self, what: str, published: str | None, made: str | None, wire: Dtype, scratch: Blobs) -> bool:
        if published is None or made is None:
            return False
        try:
            apart = nearness.apart(open_slice(self._blobs, published), open_slice(scratch, made))
        except errors.InvalidSlice:  # what is named as published is something else
            return False
        return apart <= nearness.allowed(Dtype.float32 if what == "adapter" else wire)

    def _versions(self, record: Record) -> str:
        """In which software then and now differ, in words."""
        if not record.made_with:
            return "; nothing says with which software it was made"
        names = [name for name in record.made_with | self._here if record.made_with.get(name) != self._here.get(name)]
        changed = [f"{name} {record.made_with.get(name, 'none')} then, {self._here.get(name, 'none')} now" for name in names]
        return f"; {'; '.join(changed)}" if changed else "; with the same software"


def state(blobs: Blobs, digest: str) -> str:
    """Whether a blob's bytes are still those that its name stands for: sound, damaged or missing."""
    hashed = hashlib.sha256()
    try:
        for chunk in blobs.chunks(digest, size=READ):
            hashed.update(chunk)
    except errors.NotFound:
        return "missing"
    return "sound" if digest == f"sha256:{hashed.hexdigest()}" else "damaged"
