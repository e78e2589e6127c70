"""When rounds open, close and are abandoned; every wait has an end and a reason."""

from __future__ import annotations

import pytest

from protocol import errors
from protocol.messages import Verdict
from protocol.states import JobKind, JobState, RoundState, RunState
from protocol.views import Page, RoundSummary, RunView
from tests.federation import Federation, make_plan, make_profile

TIMES = {"lease": 60, "no_progress": 600, "job": 3600, "round": 7200}
UNMEASURED = {"every": 0}


async def test_the_target_closes_the_round_at_once_and_a_late_result_is_over(federation: Federation) -> None:
    """Five are drawn for a target of three: the other two are told that it is over, whatever they were doing."""
    run, devices, jobs = await federation.training(make_plan(cohort={"target": 3, "quorum": 2, "over_selection": 1.5}), count=5)
    late = (await devices[4].put_slice(jobs[4], await devices[4].trained(jobs[4]))).digest
    for device, job in zip(devices[:3], jobs[:3], strict=True):
        await device.complete(job)

    federation.tick()

    view = await federation.admin.round(run, 1)
    assert (view.state, view.reason, view.cohort, view.contributions) == (RoundState.published, "the target of 3 is in", 5, 3)
    assert sorted(job.state for job in view.jobs) == [JobState.accepted] * 3 + [JobState.cancelled] * 2
    for device, job in zip(devices[3:], jobs[3:], strict=True):
        with pytest.raises(errors.JobOver, match="the round closed"):
            await device.renew(job)
    with pytest.raises(errors.JobOver, match="the round closed"):
        await devices[4].put_result(jobs[4], devices[4].result(jobs[4], late))
    assert (await devices[4].take()).round == 2


async def test_over_selection_draws_the_target_times_itself_rounded_up(small: Federation) -> None:
    run, _, _ = await small.training(make_plan(cohort={"target": 3, "quorum": 1, "over_selection": 1.1}), count=4)

    assert (await small.admin.round(run, 1)).cohort == 4


async def test_a_round_of_too_few_able_clients_draws_them_all(small: Federation) -> None:
    await small.enrol_many(2)
    run = await small.open(make_plan(evaluation=UNMEASURED))
    assert "2 able of a target of 3, quorum 2" in str((await small.admin.run(run)).reason)

    for seconds in (30, 29.9, 0.1):  # a lease's time is given to the third machine to come
        assert (await small.admin.run(run)).reason is not None
        small.clock.advance(seconds)
        for device in small.devices:
            await device.next_job()
        small.tick()

    assert (await small.admin.round(run, 1)).cohort == 2
    assert (await small.admin.run(run)).reason is None


async def test_at_the_deadline_a_quorum_is_enough(federation: Federation) -> None:
    times = dict.fromkeys(TIMES, 3600)
    run, (one, two, three), (first, second, third) = await federation.training(make_plan(times=times))
    await one.complete(first)
    await two.complete(second)
    federation.advance(3599)
    await three.renew(third, step=1)
    assert (await federation.admin.round(run, 1)).state is RoundState.open

    federation.advance(1)

    view = await federation.admin.round(run, 1)
    assert (view.state, view.reason) == (RoundState.published, "2 contributions at the deadline, quorum 2")
    assert {job.client_name: job.state for job in view.jobs}["device 3"] is JobState.expired
    assert sum(job.weight or 0 for job in view.jobs) == pytest.approx(1)


async def test_without_a_quorum_at_the_deadline_a_new_attempt_is_drawn(federation: Federation) -> None:
    run, (device, *_), (job, *_) = await federation.training(make_plan())
    await device.complete(job)

    federation.clock.advance(7200)
    for other in federation.devices:
        await other.next_job()
    federation.tick()

    first, second = await federation.admin.round(run, 1, attempt=1), await federation.admin.round(run, 1)
    assert (first.state, first.reason) == (RoundState.abandoned, "1 contributions at the deadline, quorum 2")
    assert (second.state, second.attempt, second.contributions) == (RoundState.open, 2, 0)
    again = [await other.take() for other in federation.devices]
    assert {work.slice for work in again} == {job.slice}
    for other, work in zip(federation.devices, again, strict=True):
        await other.complete(work)
    federation.tick()
    assert (await federation.admin.run(run)).round == 1


async def test_a_round_abandoned_too_often_pauses_the_run_with_the_reason(federation: Federation) -> None:
    await federation.enrol_many(3)
    run = await federation.open(make_plan(cohort={"target": 3, "quorum": 2, "attempts": 2}, evaluation=UNMEASURED))
    for _ in range(2):
        federation.clock.advance(7200)
        for device in federation.devices:
            await device.next_job()
        federation.tick()

    view = await federation.admin.run(run)
    assert view.state is RunState.paused
    assert view.reason == "round 1 was abandoned 2 times, the last because of 0 contributions at the deadline, quorum 2"

    await federation.admin.change_run(run, "resume")
    federation.tick()
    assert (await federation.admin.round(run, 1)).attempt == 3
    (final,) = await federation.play([run])
    assert final.state is RunState.finished


async def test_a_run_that_waits_too_long_for_clients_pauses_with_the_reason(federation: Federation) -> None:
    await federation.enrol("alone")
    run = await federation.open(make_plan())
    waiting = await federation.admin.run(run)
    assert (waiting.state, waiting.reason) == (RunState.running, "waits for clients: 1 able of a target of 3, quorum 2")

    federation.advance(7200)

    view = await federation.admin.run(run)
    assert view.state is RunState.paused
    assert str(view.reason).endswith("(alone: not seen lately); gave up after 7200 s")
    await federation.admin.change_run(run, "resume")
    federation.tick()
    assert (await federation.admin.run(run)).state is RunState.running


async def test_a_lost_job_is_drawn_again_though_the_quorum_is_in(federation: Federation) -> None:
    """Two of three are in and the third gives up: somebody else is asked, for the target is three."""
    devices = await federation.enrol_many(4)
    run = await federation.open(make_plan(evaluation=UNMEASURED))
    jobs = {device: job for device in devices if (job := await device.next_job()) is not None}
    (spare,) = set(devices) - set(jobs)
    lost, *kept = jobs
    for device in kept:
        await device.complete(jobs[device])

    await lost.give_back(jobs[lost])
    federation.tick()

    await spare.complete(await spare.take())
    federation.tick()
    view = await federation.admin.round(run, 1)
    assert (view.reason, view.contributions) == ("the target of 3 is in", 3)


async def test_with_nobody_left_to_wait_for_the_quorum_closes_the_round(federation: Federation) -> None:
    run, (one, two, three), (first, second, third) = await federation.training(make_plan())
    await one.complete(first)
    await two.complete(second)

    await three.give_back(third, "no such model", problem="model-refusal")
    federation.tick()

    view = await federation.admin.round(run, 1)
    assert (view.state, view.reason) == (RoundState.published, "2 contributions, quorum 2, and nobody left to wait for")


async def test_the_draw_is_the_same_for_the_same_seed_and_another_for_another(small: Federation) -> None:
    for number in range(12):
        await small.enrol(f"device {number}")
    runs = [await small.open(make_plan(seed=seed, evaluation=UNMEASURED)) for seed in (1, 1, 2)]

    first, same, other = [{job.client_name for job in (await small.admin.round(run, 1)).jobs} for run in runs]

    assert first == same != other
    assert len(first) == 3


async def test_no_contribution_weighs_more_than_its_share(small: Federation) -> None:
    run, devices, jobs = await small.training(make_plan(largest_share=0.5))
    await devices[0].put_profile(make_profile(train=10**9))
    for device, job, examples in zip(devices, jobs, (10**9, 20, 30), strict=True):
        await device.complete(job, examples=examples)
    small.tick()

    weights = {job.client_name: job.weight for job in (await small.admin.round(run, 1)).jobs}
    assert weights == {"device 1": pytest.approx(0.5), "device 2": pytest.approx(0.2), "device 3": pytest.approx(0.3)}


async def test_a_clients_examples_count_up_to_what_its_profile_has(small: Federation) -> None:
    run, devices, jobs = await small.training(make_plan())  # 10, 20 and 30 rows
    for device, job in zip(devices, jobs, strict=True):
        await device.complete(job, examples=10**12)
    small.tick()

    weights = {job.client_name: job.weight for job in (await small.admin.round(run, 1)).jobs}
    assert weights == {"device 1": pytest.approx(1 / 6), "device 2": pytest.approx(2 / 6), "device 3": pytest.approx(3 / 6)}


async def test_a_client_that_lost_its_data_weighs_least_not_nothing(small: Federation) -> None:
    run, devices, jobs = await small.training(make_plan())
    for device, job in zip(devices, jobs, strict=True):
        await device.complete(job, examples=10)
    await devices[0].put_profile(make_profile(datasets={}))
    small.tick()

    weights = {job.client_name: job.weight for job in (await small.admin.round(run, 1)).jobs}
    assert weights["device 1"] == pytest.approx(1 / 21)


# --- pause, resume, stop ------------------------------------------------------------------------------------------------


async def test_a_paused_run_takes_what_is_in_work_and_hands_nothing_out(federation: Federation) -> None:
    await federation.enrol_many(3)
    run = await federation.open(make_plan(evaluation=UNMEASURED))
    one, two, three = federation.devices
    job = await one.take()

    view = await federation.admin.change_run(run, "pause")
    assert (view.state, view.reason) == (RunState.paused, "by an operator")
    assert await two.next_job() is None
    assert (await one.renew(job)).verdict is Verdict.proceed
    await one.complete(job)
    federation.tick()
    assert (await federation.admin.round(run, 1)).contributions == 1

    await federation.admin.change_run(run, "resume")
    for device in (two, three):
        await device.complete(await device.take())
    federation.tick()
    assert (await federation.admin.run(run)).round == 1


async def test_a_run_paused_while_a_round_waits_to_be_merged_merges_it_when_resumed(federation: Federation) -> None:
    run = (await federation.admin.create(make_plan())).id
    await federation.admin.change_run(run, "pause")
    federation.tick()
    assert (await federation.admin.round(run, 0)).state is RoundState.merging

    await federation.admin.change_run(run, "resume")
    federation.tick()

    assert (await federation.admin.round(run, 0)).state is RoundState.published


async def test_pausing_and_resuming_twice_is_doing_it_once(small: Federation) -> None:
    run = (await small.admin.create(make_plan())).id
    for verb, state in (("pause", RunState.paused), ("resume", RunState.running), ("stop", RunState.stopped)):
        views = [await small.admin.change_run(run, verb) for _ in range(2)]
        assert [view.state for view in views] == [state] * 2
        assert views[0] == views[1]


async def test_a_round_has_as_much_time_after_a_pause_as_it_had_before(federation: Federation) -> None:
    """Of two hours one is over when a pause begins that is longer than both; nobody had picked the third job up."""
    one, two, three = await federation.enrol_many(3)
    run = await federation.open(make_plan(times=TIMES | {"no_progress": 7200}, evaluation=UNMEASURED))
    for device in (one, two):
        await device.complete(await device.take())
    federation.advance(3600)
    await federation.admin.change_run(run, "pause")
    federation.advance(100_000)
    assert [job.state for job in (await federation.admin.round(run, 1)).jobs].count(JobState.queued) == 1

    await federation.admin.change_run(run, "resume")
    federation.advance(3599)

    assert (await federation.admin.round(run, 1)).state is RoundState.open
    assert (await three.take()).remaining_seconds == 1
    federation.advance(1)
    assert (await federation.admin.round(run, 1)).reason == "2 contributions at the deadline, quorum 2"


async def test_the_last_adapter_is_measured_after_a_pause_in_which_nobody_could(federation: Federation) -> None:
    """A pause of a day, while the evaluations wait to be picked up."""
    devices = await federation.enrol_many(2)
    run = await federation.open(make_plan(rounds=1, cohort={"target": 2, "quorum": 2}, evaluation={"every": 5}))
    for device in devices:
        await device.complete(await device.take(JobKind.evaluate))
        await device.complete(await device.take())
    federation.tick()
    await federation.admin.change_run(run, "pause")
    for _ in range(24):
        federation.advance(3600)

    await federation.admin.change_run(run, "resume")
    federation.tick()

    assert (await federation.admin.run(run)).reason == "waits for the last evaluation"
    (view,) = await federation.play([run])
    assert view.state is RunState.finished
    assert view.metrics == {"accuracy": 0.5}


async def test_a_client_that_is_revoked_during_a_pause_loses_its_queued_job(small: Federation) -> None:
    one, *_ = await small.enrol_many(3)
    run = await small.open(make_plan(evaluation=UNMEASURED))
    await small.admin.change_run(run, "pause")
    await small.admin.change_client(one, state="revoked")
    small.tick()

    states = {job.client_name: job.state for job in (await small.admin.round(run, 1)).jobs}
    assert states == {"device 1": JobState.cancelled, "device 2": JobState.queued, "device 3": JobState.queued}


async def test_a_stopped_run_ends_its_round_and_every_job(federation: Federation) -> None:
    run, (one, two, three), (first, second, third) = await federation.training(make_plan())
    await one.complete(first)
    await two.put_slice(second, await two.trained(second))

    view = await federation.admin.change_run(run, "stop")

    assert (view.state, view.reason) == (RunState.stopped, "by an operator")
    assert view.ended_at is not None
    with pytest.raises(errors.JobOver, match="the run was stopped"):
        await three.renew(third)
    with pytest.raises(errors.JobOver, match="the run was stopped"):
        await two.put_result(second, two.result(second))
    federation.advance(10_000)
    ended = await federation.admin.round(run, 1)
    assert (ended.state, ended.reason) == (RoundState.abandoned, "the run was stopped")
    assert [await device.next_job() for device in federation.devices] == [None] * 3


@pytest.mark.parametrize(("ending", "forbidden"), [("finish", ["pause", "resume", "stop"]), ("stop", ["pause", "resume"])])
async def test_an_ended_run_stays_ended(small: Federation, ending: str, forbidden: list[str]) -> None:
    await small.enrol_many(2)
    run = await small.open(make_plan(rounds=1, cohort={"target": 2, "quorum": 1}, evaluation=UNMEASURED))
    if ending == "finish":
        await small.play([run])
    else:
        await small.admin.change_run(run, "stop")

    for verb in forbidden:
        with pytest.raises(errors.Conflict):
            await small.admin.change_run(run, verb)


async def test_a_run_finishes_when_its_last_adapter_has_been_measured(federation: Federation) -> None:
    await federation.enrol_many(2)
    run = await federation.open(make_plan(rounds=1, cohort={"target": 2, "quorum": 2}, evaluation={"every": 5}))
    one, two = federation.devices
    for device in (one, two):
        await device.complete(await device.take(JobKind.evaluate))
        await device.complete(await device.take())
    federation.tick()
    await one.complete(await one.take(JobKind.evaluate))
    federation.tick()
    waiting = await federation.admin.run(run)
    assert (waiting.state, waiting.reason) == (RunState.running, "waits for the last evaluation")

    federation.advance(600)  # the other is not coming any more

    assert (await federation.admin.run(run)).state is RunState.finished


async def test_a_round_may_weigh_a_single_contribution(small: Federation) -> None:
    await small.enrol("alone")
    run = await small.open(make_plan(rounds=1, cohort={"target": 1, "quorum": 1}, largest_share=0.1))

    (view,) = await small.play([run])

    assert view.state is RunState.finished
    assert [job.weight for job in (await small.admin.round(run, 1)).jobs if job.weight is not None] == [1.0]


async def test_lists_of_rounds_show_every_attempt(small: Federation) -> None:
    await small.enrol_many(3)
    run = await small.open(make_plan(evaluation=UNMEASURED))
    small.clock.advance(7200)
    for device in small.devices:
        await device.next_job()
    small.tick()

    rounds = (await small.viewer.get(f"/v1/runs/{run}/rounds", Page[RoundSummary])).items

    assert [(view.number, view.attempt, view.state) for view in rounds] == [
        (0, 1, RoundState.published),
        (1, 1, RoundState.abandoned),
        (1, 2, RoundState.open),
    ]
    assert (await small.viewer.get("/v1/runs", Page[RunView])).items[0].round == 0


async def test_the_learning_rate_cools_along_half_a_cosine_to_its_share_in_the_last_round(small: Federation) -> None:
    plan = make_plan(rounds=3, training={"learning_rate": 0.01, "cooling": 0.2}, evaluation=UNMEASURED)
    _, devices, jobs = await small.training(plan)
    rates = []

    for _ in range(plan.rounds):
        rates.append([job.training.learning_rate for job in jobs])
        for device, job in zip(devices, jobs, strict=True):
            await device.complete(job)
        small.tick()
        jobs = [await device.take() for device in devices] if len(rates) < plan.rounds else []

    assert rates == [pytest.approx([rate] * 3) for rate in (0.01, 0.006, 0.002)]  # in the middle 0.2 and half of the other 0.8


@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_without_cooling_every_round_has_the_plans_learning_rate(rounds: int) -> None:
    plan = make_plan(rounds=rounds)

    assert {plan.learning_rate(round) for round in range(rounds + 2)} == {0.001}
