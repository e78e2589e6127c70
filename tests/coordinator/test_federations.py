"""Whole federations, from the first enrolment to the adapter that is pulled."""

from __future__ import annotations

import io
import math
import random
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from protocol.messages import Dataset, Metric
from protocol.states import JobKind, JobState, RoundState, RunState
from protocol.views import Page, RoundSummary, RunView
from tests.federation import Federation, make_plan, make_profile, open_federation

FIXED = {"name": "fixed", "ladder": [2, 4], "options": {"rank": 2}}
LABELS = {"name": "labels", "ladder": [2, 4, 8], "options": {"label": "size", "table": {"small": 2, "large": 8}}}
CAPACITY = {"name": "capacity", "ladder": [2, 4, 8]}
MACHINES = {"phone": (10, "small"), "laptop": (200, "large"), "workstation": (3000, "large")}


async def enrol_unequal(federation: Federation, order: Sequence[str] = tuple(MACHINES)) -> None:
    """Three machines that are not alike, in that order."""
    for name in order:
        rows, size = MACHINES[name]
        await federation.enrol(name, make_profile(train=rows), {"size": size})


async def digests(federation: Federation, run: str, rounds: int) -> list[Any]:
    """The names of everything that a run published."""
    views = [await federation.admin.round(run, number) for number in range(rounds + 1)]
    return [(view.adapter, view.slices) for view in views]


@pytest.mark.parametrize("strategy", ["delta", "hlora"])
@pytest.mark.parametrize("ranks", [FIXED, LABELS, CAPACITY], ids=lambda ranks: ranks["name"])
async def test_a_federation_ends_with_every_round_published(federation: Federation, strategy: str, ranks: dict[str, Any]) -> None:
    await enrol_unequal(federation)
    run = await federation.open(make_plan(strategy={"name": strategy}, ranks=ranks))

    (view,) = await federation.play([run])

    assert (view.state, view.round, view.reason) == (RunState.finished, 2, None)
    assert view.ended_at is not None
    rounds = (await federation.admin.get(f"/v1/runs/{run}/rounds", Page[RoundSummary])).items
    assert [(r.number, r.attempt, r.state, r.contributions) for r in rounds] == [
        (number, 1, RoundState.published, 3 if number else 0) for number in range(3)
    ]
    assert all(sum(r.ranks.values()) == r.contributions and set(r.ranks) <= set(ranks["ladder"]) for r in rounds)


async def test_the_label_decides_the_rank_and_the_round_says_why(small: Federation) -> None:
    await enrol_unequal(small)
    run = await small.open(make_plan(ranks=LABELS, rounds=1))

    await small.play([run])

    jobs = {job.client_name: job for job in (await small.admin.round(run, 1)).jobs if job.kind is JobKind.train}
    assert {name: job.rank.rank for name, job in jobs.items()} == {"phone": 2, "laptop": 8, "workstation": 8}
    assert all("size" in job.rank.reason for job in jobs.values())
    assert [(await small.admin.client(device)).rank for device in small.devices] == [jobs[device.name].rank for device in small.devices]


@pytest.mark.parametrize("strategy", ["delta", "hlora"])
async def test_what_is_published_depends_neither_on_arrival_nor_on_enrolment(sqlite_url: str, tmp_path: Path, strategy: str) -> None:
    plan = make_plan(strategy={"name": strategy}, ranks=LABELS, rounds=3)
    published = []
    for turn in range(3):
        generator = random.Random(turn)
        fresh = shutil.copy(sqlite_url.removeprefix("sqlite:///"), tmp_path / f"{turn}.sqlite")
        async with open_federation(f"sqlite:///{fresh}", tmp_path / str(turn)) as federation:
            await enrol_unequal(federation, generator.sample(list(MACHINES), 3))
            run = await federation.open(plan)
            await federation.play([run], generator.sample(federation.devices, 3))
            published.append(await digests(federation, run, 3))

    assert published[0] == published[1] == published[2]
    assert len({adapter.digest for adapter, _ in published[0]}) == 4


async def test_the_seed_decides_the_first_adapter_and_the_work(small: Federation) -> None:
    await enrol_unequal(small)
    runs = [await small.open(make_plan(seed=seed, rounds=1)) for seed in (1, 1, 2)]

    await small.play(runs)

    first, same, other = [await digests(small, run, 1) for run in runs]
    assert first == same
    assert all(mine != theirs for mine, theirs in zip(first, other, strict=True))


async def test_several_runs_go_on_at_once(federation: Federation) -> None:
    await federation.enrol_many(4)
    plans = [
        make_plan(name=name, strategy={"name": strategy}) for name, strategy in (("one", "delta"), ("two", "hlora"), ("three", "delta"))
    ]
    runs = [await federation.open(plan) for plan in plans]

    views = await federation.play(runs)

    assert [view.state for view in views] == [RunState.finished] * 3
    newest_first = (await federation.viewer.get("/v1/runs", Page[RunView])).items
    assert {view.name for view in newest_first} == {"one", "two", "three"}


async def test_a_published_round_shows_its_jobs_weights_bytes_and_kept_energy(federation: Federation) -> None:
    await federation.enrol_many(3)  # 10, 20 and 30 rows
    run = await federation.open(make_plan(rounds=1))
    await federation.play([run])

    view = await federation.viewer.round(run, 1)

    training = sorted((job for job in view.jobs if job.kind is JobKind.train), key=lambda job: job.client_name)
    assert [job.state for job in training] == [JobState.accepted] * 3
    assert [job.weight for job in training] == pytest.approx([1 / 3] * 3)  # each says 5 rows
    assert view.ranks == {4: 3}
    assert view.bytes_up == sum(job.slice.bytes for job in training if job.slice)
    assert view.bytes_down == 6 * view.slices[4].bytes  # a slice for each training and each evaluation job
    assert view.train_seconds == 6.0
    assert view.merge_seconds is not None
    assert view.reason == "the target of 3 is in"
    assert set(view.energy) == {"attention.key", "attention.query"}
    for energy in view.energy.values():
        assert energy.total > 0
        assert 0 < energy.kept[2] <= energy.kept[4] <= 1
    assert set(view.kept_energy) == {2, 4}
    assert 0 < view.kept_energy[2] <= view.kept_energy[4] <= 1
    assert all(job.change_norm and job.change_norm > 0 for job in training)


async def test_round_zero_publishes_an_adapter_that_changes_nothing(small: Federation) -> None:
    await small.enrol_many(3)
    run = await small.open(make_plan())

    view = await small.admin.round(run, 0)

    assert (view.state, view.contributions, view.reason) == (RoundState.published, 0, None)
    assert set(view.slices) == {2, 4}
    assert all(energy.total == 0 and set(energy.kept.values()) == {1.0} for energy in view.energy.values())
    assert view.kept_energy == {2: 1.0, 4: 1.0}


async def test_metrics_are_means_over_clients_weighted_by_rows(small: Federation) -> None:
    one, two, three = [await small.enrol(f"device {n}", make_profile(held_out=5)) for n in range(3)]
    run = await small.open(make_plan(rounds=1))
    for device, value, weight in ((one, 0.0, 1.0), (two, 0.5, 2.0), (three, 1.0, 5.0)):
        await device.complete(await device.take(JobKind.evaluate), metrics={"accuracy": Metric(value=value, weight=weight)})

    assert (await small.admin.round(run, 0)).metrics == {"accuracy": pytest.approx((0.5 * 2 + 1 * 5) / 8)}
    assert (await small.admin.run(run)).metrics == {"accuracy": pytest.approx(0.75)}


async def test_what_a_client_measures_weighs_no_more_than_the_rows_of_its_profile(small: Federation) -> None:
    honest, liar = [await small.enrol(f"device {n}", make_profile(held_out=rows)) for n, rows in enumerate((9, 1))]
    run = await small.open(make_plan(rounds=1, cohort={"target": 2, "quorum": 2}))
    for device, value, weight in ((honest, 0.5, 9), (liar, 1.0, 1e15)):
        metrics = {"accuracy": Metric(value=value, weight=weight), "loss": Metric(value=value, weight=weight)}
        await device.complete(await device.take(JobKind.evaluate), metrics=metrics)
    for device, value, weight in ((honest, 0.5, 10), (liar, 1.0, 1e15)):
        await device.complete(await device.take(), metrics={"loss_after": Metric(value=value, weight=weight)})
    small.tick()

    mean = pytest.approx((9 * 0.5 + 1 * 1.0) / 10)
    assert (await small.admin.run(run)).metrics == {"accuracy": mean, "loss": mean}
    assert (await small.admin.round(run, 1)).train_metrics == {"loss_after": pytest.approx(0.75)}  # ten training rows each


async def test_metrics_stay_what_they_were_when_a_client_has_other_rows_later(small: Federation) -> None:
    devices = [await small.enrol(f"device {n}", make_profile(held_out=rows)) for n, rows in enumerate((9, 1))]
    run = await small.open(make_plan(rounds=1, cohort={"target": 2, "quorum": 2}))
    for device, value, weight in zip(devices, (0.5, 1.0), (9, 1), strict=True):
        await device.complete(await device.take(JobKind.evaluate), metrics={"accuracy": Metric(value=value, weight=weight)})
    await devices[0].put_profile(make_profile(datasets={}))

    assert (await small.admin.run(run)).metrics == {"accuracy": pytest.approx((9 * 0.5 + 1 * 1.0) / 10)}


async def test_a_language_models_losses_weigh_up_to_the_tokens_that_its_rows_can_have(small: Federation) -> None:
    honest, liar = [await small.enrol(f"device {n}", make_profile(held_out=rows)) for n, rows in enumerate((9, 1))]
    run = await small.open(make_plan(task={"kind": "causal-lm", "max_length": 100}, rounds=1, cohort={"target": 2, "quorum": 2}))
    for device, value, weight in ((honest, 1.0, 900), (liar, 2.0, 1e15)):
        metrics = {name: Metric(value=value, weight=weight) for name in ("loss", "rounding")}
        await device.complete(await device.take(JobKind.evaluate), metrics=metrics)

    assert (await small.admin.round(run, 0)).metrics == {
        "loss": pytest.approx(1.1),
        "perplexity": pytest.approx(math.exp(1.1)),
        "rounding": pytest.approx(1.1),
    }


async def test_no_clients_measurement_weighs_more_than_the_plans_largest_share(small: Federation) -> None:
    devices = [await small.enrol(f"device {n}", make_profile(held_out=rows)) for n, rows in enumerate((1000, 1, 1))]
    run = await small.open(make_plan(rounds=1, largest_share=0.5))
    for device, value, weight in zip(devices, (1.0, 0.0, 0.0), (1000, 1, 1), strict=True):
        await device.complete(await device.take(JobKind.evaluate), metrics={"accuracy": Metric(value=value, weight=weight)})

    assert (await small.admin.round(run, 0)).metrics == {"accuracy": pytest.approx(0.5)}


async def test_perplexity_is_that_of_the_mean_loss(small: Federation) -> None:
    one, two, _ = await small.enrol_many(3)
    run = await small.open(make_plan(task={"kind": "causal-lm"}, rounds=1))
    for device, loss in ((one, 0.0), (two, 2.0)):
        await device.complete(await device.take(JobKind.evaluate), metrics={"loss": Metric(value=loss, weight=1)})

    assert (await small.admin.round(run, 0)).metrics == {"loss": 1.0, "perplexity": pytest.approx(2.718281828)}


@pytest.mark.parametrize(("every", "measured"), [(0, []), (1, [0, 1, 2, 3]), (2, [0, 2, 3]), (5, [0, 3])])
async def test_evaluation_comes_every_so_often_and_always_first_and_last(small: Federation, every: int, measured: list[int]) -> None:
    await small.enrol_many(3)
    run = await small.open(make_plan(rounds=3, evaluation={"every": every}))

    await small.play([run])

    rounds = (await small.admin.get(f"/v1/runs/{run}/rounds", Page[RoundSummary])).items
    assert [view.number for view in rounds if view.metrics] == measured


async def test_the_plan_may_fix_the_rank_at_which_is_measured(small: Federation) -> None:
    await small.enrol_many(3)
    run = await small.open(make_plan(rounds=1, evaluation={"rank": 2}))

    await small.play([run])

    view = await small.admin.round(run, 1)
    assert {(job.kind, job.rank.rank) for job in view.jobs} == {(JobKind.train, 4), (JobKind.evaluate, 2)}


async def test_only_clients_with_rows_held_back_measure(small: Federation) -> None:
    await small.enrol("trains", make_profile(held_out=0))
    await small.enrol("both")
    await small.enrol("measures", make_profile(train=0))
    run = await small.open(make_plan(rounds=1, cohort={"target": 2, "quorum": 2}))

    await small.play([run])

    jobs = (await small.admin.round(run, 1)).jobs
    assert {job.client_name for job in jobs if job.kind is JobKind.train} == {"trains", "both"}
    assert {job.client_name for job in jobs if job.kind is JobKind.evaluate} == {"both", "measures"}


async def test_an_adapter_is_pulled_as_an_archive_and_file_by_file(small: Federation) -> None:
    await small.enrol_many(3)
    run = await small.open(make_plan())
    await small.play([run])

    response = await small.viewer.call("GET", f"/v1/runs/{run}/adapter", params={"rank": 2})

    assert (response.status_code, response.headers["content-type"]) == (200, "application/zip")
    archive = zipfile.ZipFile(io.BytesIO(response.content))
    assert "adapter_model.safetensors" in archive.namelist()
    for name in archive.namelist():
        one = await small.viewer.call("GET", f"/v1/runs/{run}/adapter/{name}", params={"rank": 2})
        assert one.content == archive.read(name)
    newest = await small.viewer.call("GET", f"/v1/runs/{run}/adapter")
    last = await small.viewer.call("GET", f"/v1/runs/{run}/adapter", params={"round": 2, "rank": 4})
    first = await small.viewer.call("GET", f"/v1/runs/{run}/adapter", params={"round": 1})
    assert newest.content == last.content != first.content


async def test_clients_that_cannot_take_part_are_left_out_with_the_reason(small: Federation) -> None:
    await small.enrol("able")
    await small.enrol("elsewhere", make_profile(datasets={"images": Dataset(train=5)}))
    await small.enrol("empty", make_profile(train=0))
    await small.enrol("narrow", make_profile(datasets={"texts": Dataset(train=5, columns=["text"])}))
    await small.enrol("strict", make_profile(limits={"models": ["other-*"]}))
    await small.enrol("tiny", make_profile(limits={"largest_rank": 1}))
    run = await small.open(make_plan())

    view = await small.admin.run(run)

    assert view.state is RunState.running
    assert view.reason is not None
    assert view.reason.startswith("waits for clients: 1 able of a target of 3, quorum 2")
    for said in (
        "elsewhere: has no data set 'texts'",
        "empty: data set 'texts' has no rows to train",
        "narrow: data set 'texts' lacks column 'label'",
        "strict: its owner does not allow model base",
        "tiny: ",
    ):
        assert said in view.reason


async def test_columns_of_a_pair_and_of_a_prompt_are_asked_for(small: Federation) -> None:
    await small.enrol("pairless", make_profile(datasets={"texts": Dataset(train=5, columns=["text", "label"])}))
    pair = await small.open(make_plan(task={"kind": "sequence-classification", "labels": ["a", "b"], "text_pair": "other"}))
    prompt = await small.open(make_plan(task={"kind": "causal-lm", "prompt": "question"}))

    assert "lacks column 'other'" in str((await small.admin.run(pair)).reason)
    assert "lacks column 'question'" in str((await small.admin.run(prompt)).reason)


async def test_many_obstacles_are_counted_not_listed(small: Federation) -> None:
    for number in range(7):
        await small.enrol(f"empty {number}", make_profile(train=0))
    run = await small.open(make_plan())

    assert "; and 2 more)" in str((await small.admin.run(run)).reason)
