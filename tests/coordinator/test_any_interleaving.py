"""Whatever happens in whatever order: no result is taken twice, nobody who is refused changes anything, and all ends.

HLORA_TEST_INTERLEAVINGS=N plays N of them on each database instead of a few; each has fifty steps.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from protocol import errors, slices
from protocol.messages import Job
from protocol.slices import Slice
from protocol.states import ClientState, JobKind
from tests.coordinator import hostile
from tests.coordinator.machine import Held, World
from tests.coordinator.witness import COUNTED
from tests.federation import Device, make_plan, make_profile
from tests.postgres import TEMPLATE, Server

MANY = int(os.environ.get("HLORA_TEST_INTERLEAVINGS", "0"))
STEPS = 50
CLIENTS = 4
SITES = st.sampled_from([0, 1])
DEVICES = st.integers(0, CLIENTS)
SHARE = st.floats(0, 1, exclude_max=True)
TIMES = {"lease": 10, "no_progress": 40, "job": 60, "round": 100}
UNMEASURED = {"evaluation": {"every": 0}}
PLANS: list[dict[str, Any]] = [
    UNMEASURED,
    UNMEASURED | {"norm": {"bound": 2.0, "action": "reject"}, "rounds": 3, "suspicious": 1.5},
    UNMEASURED | {"cohort": {"target": 1, "quorum": 1}, "ranks": {"name": "capacity", "ladder": [2, 4]}},
    UNMEASURED | {"buffer": {"size": 2, "largest_staleness": 1}, "rounds": 4},
    {"cohort": {"target": 3, "quorum": 1, "over_selection": 1.3, "attempts": 2}, "largest_share": 0.5, "strategy": {"name": "hlora"}},
]
USUAL = ["one polls", "all poll", "all but one finish", "a conductor looks", "time passes"]
# What cannot be taken back is drawn seldom: little happens after it.
RUN_CHANGES = ["resume"] * 5 + ["pause"] * 3 + ["stop"]
CLIENT_CHANGES = [ClientState.active] * 4 + [ClientState.paused] * 3 + [ClientState.revoked]
POISONS: dict[str, Callable[[Slice, Job], bytes]] = {
    "NaN": hostile.NON_FINITE["NaN in a"],
    "another rank": lambda start, job: slices.pack(hostile.of_rank(start, 1), job.layout, job.wire),
    "numbers without end": lambda start, job: slices.pack(hostile.grown(start, 3e38), job.layout, job.wire),
    "nonsense": lambda start, job: b"nonsense",
}
JOBS: st.SearchStrategy[Held] = st.runner().flatmap(lambda machine: st.sampled_from(machine.world.jobs()))
handling = precondition(lambda machine: machine.world.handed)


class Interleaving(RuleBasedStateMachine):
    """Everything that machines, their owners, operators and time do to a federation."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    @initialize(plan=st.sampled_from(PLANS))
    def begins(self, plan: dict[str, Any]) -> None:
        for site in (0, 1):
            self.world.start(site)
        for _ in range(CLIENTS):
            self.world.enrol()
        self.world.create(make_plan(**plan, times=TIMES))
        self.world.sites[0].tick()
        self.world.everybody_polls(site=0)

    # What devices do. A job in hand is held still, mostly; what is said of one that is not is refused, and changes nothing.

    @rule(
        what=st.sampled_from(USUAL),
        number=DEVICES,
        site=SITES,
    )
    def work_goes_on(self, what: str, number: int, site: int) -> None:
        """The usual, in one rule: hypothesis leaves many rules out of a story, and without these nothing comes of it."""
        match what:
            case "one polls":
                self.world.poll(number % len(self.world.devices), site)
            case "all poll":
                self.world.everybody_polls(site)
            case "all but one finish":
                self.world.finish_all(site, but=number)
            case "a conductor looks":
                self.world.sites[site].tick()
            case "time passes":
                self.world.work_on(10)

    @handling
    @rule(held=JOBS, site=SITES, step=st.integers(0, 3))
    def a_lease_is_renewed(self, held: Held, site: int, step: int) -> None:
        self.says(held, self.device(held, site).renew(held.job, step=step))

    @handling
    @rule(held=JOBS, site=SITES, problem=st.sampled_from([None, "memory-refusal"]))
    def a_job_is_given_back(self, held: Held, site: int, problem: str | None) -> None:
        self.says(held, self.device(held, site).give_back(held.job, problem=problem))

    @handling
    @rule(held=JOBS, site=SITES, salt=st.integers(0, 1))
    def a_slice_is_sent(self, held: Held, site: int, salt: int) -> None:
        if held.job.kind is JobKind.train:
            self.says(held, self.device(held, site).put_slice(held.job, held.trained(salt)))

    @handling
    @rule(held=JOBS, site=SITES, examples=st.integers(4, 5))
    def a_result_is_sent(self, held: Held, site: int, examples: int) -> None:
        """Sometimes before the slice, sometimes another one than before."""
        before = self.world.job(held.job)
        result = self.device(held, site).result(held.job, before["slice"], examples=examples)
        self.says(held, self.device(held, site).put_result(held.job, result))

    @handling
    @rule(held=JOBS, site=SITES, looks=st.booleans())
    def a_job_is_done(self, held: Held, site: int, looks: bool) -> None:
        """The slice, then the result; sometimes a conductor looks at once."""
        device, row = self.device(held, site), self.world.job(held.job)
        if held.job.kind is JobKind.train:
            if not self.says(held, device.put_slice(held.job, held.trained())):
                return
            row = self.world.job(held.job)
        self.says(held, device.put_result(held.job, device.result(held.job, row["slice"])))
        if looks:
            self.world.sites[site].tick()

    @handling
    @rule(held=JOBS, site=SITES, poison=st.sampled_from(sorted(POISONS)))
    def a_poisoned_slice_is_sent(self, held: Held, site: int, poison: str) -> None:
        if held.job.kind is JobKind.train:
            data = POISONS[poison](slices.unpack(held.start), held.job)
            assert not self.says(held, self.device(held, site).put_slice(held.job, data))

    @handling
    @rule(held=JOBS, site=SITES, at=SHARE)
    def an_upload_is_cut(self, held: Held, site: int, at: float) -> None:
        data = held.trained()
        headers = {"Content-Length": str(len(data))}
        assert not self.says(held, self.device(held, site).put_slice(held.job, data[: int(at * len(data))], headers=headers))

    @handling
    @rule(held=JOBS, site=SITES, salt=st.integers(0, 1), share=SHARE | st.just(1.0), cut=SHARE | st.none())
    def a_part_is_sent(self, held: Held, site: int, salt: int, share: float, cut: float | None) -> None:
        """From where the upload stands; all that is left, or a share of it; cut on the way, or not."""
        device, data = self.device(held, site), held.trained(salt)
        start, whole = self.world.standing_at(held, slices.digest(data)), self.world.job(held.job)["slice"] == slices.digest(data)
        stop = start + round(share * (len(data) - start))
        came = stop if cut is None else start + int(cut * (stop - start))
        heard = self.says(held, device.patch(held.job, data, start, came, headers={"Content-Length": str(stop - start)}))
        assert came == stop or whole or not heard

    @handling
    @rule(held=JOBS, site=SITES, start=st.integers(0, 2000), length=st.integers(0, 3000))
    def a_part_from_anywhere_is_sent(self, held: Held, site: int, start: int, length: int) -> None:
        """Taken only from where an upload stands that has begun, unless it is whole already."""
        data = held.trained()
        self.says(held, self.device(held, site).patch(held.job, data, 0, 500))
        row = self.world.job(held.job)
        there = start == self.world.standing_at(held, slices.digest(data)) or row["slice"] == slices.digest(data)
        assert not self.says(held, self.device(held, site).patch(held.job, data, start, start + length)) or there

    @handling
    @rule(held=JOBS, site=SITES)
    def an_upload_is_asked_for(self, held: Held, site: int) -> None:
        self.says(held, self.device(held, site).head(held.job))

    @handling
    @rule(held=JOBS, site=SITES, off=st.sampled_from([-2, -1, 1, 2]), what=st.sampled_from(["renew", "give_back", "slice", "result"]))
    def a_wrong_epoch_is_refused(self, held: Held, site: int, off: int, what: str) -> None:
        epoch = max(1, self.world.job(held.job)["epoch"] + off)
        if epoch != self.world.job(held.job)["epoch"]:
            wrong = held.job.model_copy(update={"lease": held.job.lease.model_copy(update={"epoch": epoch})})
            self.refused(self.call(self.device(held, site), wrong, held, what))

    @handling
    @rule(held=JOBS, site=SITES, number=DEVICES, what=st.sampled_from(["renew", "give_back", "slice", "result"]))
    def anothers_job_is_refused(self, held: Held, site: int, number: int, what: str) -> None:
        other = number % len(self.world.devices)
        if other != held.owner:
            error = self.refused(self.call(self.world.device(other, site), held.job, held, what))
            assert isinstance(error, (errors.NotFound, errors.Unauthenticated))

    @precondition(lambda self: self.world.heard)
    @rule(site=SITES, which=st.integers(0, 1000))
    def an_earlier_request_is_repeated(self, site: int, which: int) -> None:
        """Whatever came of it then, and whoever got the answer: a result that was taken is taken still, and no other."""
        earlier = self.world.heard[-1 - which % len(self.world.heard)]
        answer = self.world.again(earlier, site)
        if earlier.result and earlier.status < 300 and answer.status_code != 401:
            assert answer.status_code == 200
            assert answer.json()["job"] == earlier.path.split("/")[3]

    # What operators and owners do.

    @rule(site=SITES)
    def a_device_is_enrolled(self, site: int) -> None:
        if len(self.world.devices) < CLIENTS + 3:
            self.world.enrol(site)

    @rule(site=SITES, number=DEVICES, rows=st.integers(0, 20))
    def a_profile_is_told(self, site: int, number: int, rows: int) -> None:
        self.tries(self.world.device(number % len(self.world.devices), site).put_profile(make_profile(train=rows)))

    @rule(site=SITES, number=DEVICES, state=st.sampled_from(CLIENT_CHANGES))
    def a_client_is_changed(self, site: int, number: int, state: ClientState) -> None:
        device = self.world.devices[number % len(self.world.devices)]
        self.tries(self.world.admin(site).change_client(device, state=state))

    @rule(site=SITES, verb=st.sampled_from(RUN_CHANGES), which=st.integers(0, 1))
    def a_run_is_changed(self, site: int, verb: str, which: int) -> None:
        self.tries(self.world.admin(site).change_run(self.world.runs[which % len(self.world.runs)], verb))

    @precondition(lambda self: len(self.world.runs) < 2)
    @rule(site=SITES, plan=st.sampled_from(PLANS))
    def another_run_is_made(self, site: int, plan: dict[str, Any]) -> None:
        self.world.create(make_plan(**plan, times=TIMES), site)

    # What coordinators and time do.

    @rule(seconds=st.sampled_from([15, 40, 60]))
    def much_time_passes(self, seconds: int) -> None:
        self.world.work_on(seconds)

    @rule(seconds=st.sampled_from([-3600.0, -3.0, 3.0, 60.0, 3600.0, 30 * 86400.0]))
    def the_clock_jumps(self, seconds: float) -> None:
        self.world.clock.advance(seconds)

    @handling
    @rule(held=JOBS, site=SITES)
    def the_house_is_kept(self, held: Held, site: int) -> None:
        """While a slice is on its way, if it can be."""
        self.tries(self.device(held, site).patch(held.job, held.trained(), 0, 500))
        self.world.keep_house(site)

    @rule(site=SITES)
    def a_coordinator_starts_again(self, site: int) -> None:
        self.world.stop(site)
        self.world.start(site)

    @invariant()
    def all_holds(self) -> None:
        if self.world.sites:
            self.world.check()

    def teardown(self) -> None:
        try:
            if sys.exception() is None and self.world.sites:
                self.world.settle()
        finally:
            self.world.close()

    # What is said, and whether it was heard.

    def device(self, held: Held, site: int) -> Device:
        return self.world.device(held.owner, site)

    def call(self, device: Device, job: Job, held: Held, what: str) -> Coroutine[Any, Any, object]:
        match what:
            case "renew":
                return device.renew(job)
            case "give_back":
                return device.give_back(job)
            case "slice":
                return device.put_slice(job, held.trained())
        return device.put_result(job, device.result(job, slices.digest(held.trained())))

    def refused(self, call: Coroutine[Any, Any, object]) -> errors.HLoRAError:
        """The refusal that must come."""
        with pytest.raises(errors.HLoRAError) as caught:
            self.world.do(call)
        return caught.value

    def tries(self, call: Coroutine[Any, Any, object]) -> bool:
        """Whether it was heard. A refusal has been looked at by the witness."""
        try:
            self.world.do(call)
        except errors.HLoRAError:
            return False
        return True

    def says(self, held: Held, call: Coroutine[Any, Any, object]) -> bool:
        """Whether a device was heard: only one that holds the job, or that repeats what ended it."""
        row = self.world.job(held.job)
        holding, again = self.world.holds(held), row["epoch"] == held.job.lease.epoch and row["state"] in (*COUNTED, "released")
        heard = self.tries(call)
        assert holding or again or not heard
        return heard


def interleave(world: Callable[[], World], examples: int) -> None:
    """Play that many interleavings, or as many as the environment asks for."""
    chosen = settings(
        max_examples=MANY or examples,
        stateful_step_count=STEPS,
        deadline=None,
        derandomize=not MANY,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )

    class Here(Interleaving):
        def __init__(self) -> None:
            super().__init__(world())

    run_state_machine_as_test(Here, settings=chosen)


def test_any_interleaving_on_sqlite(sqlite_url: str, tmp_path: Path) -> None:
    numbers = itertools.count()
    migrated = Path(sqlite_url.removeprefix("sqlite:///"))

    def world() -> World:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        return World(f"sqlite:///{shutil.copy(migrated, folder)}", folder)

    interleave(world, examples=10)


@pytest.mark.postgres
def test_any_interleaving_on_postgres(postgres: Server, tmp_path: Path) -> None:
    numbers = itertools.count()

    def world() -> World:
        fresh = World("", tmp_path / str(next(numbers)))
        fresh.url = fresh.closing.enter_context(postgres.database(TEMPLATE))
        return fresh

    interleave(world, examples=3)
