"""The owner's last word."""

from __future__ import annotations

from datetime import time
from pathlib import Path

import pytest

from agent import policy
from agent.policy import Policy
from protocol import errors
from protocol.messages import Job, Limits
from tests.agent.work import NOON, make_job


@pytest.fixture
def job(encoder: Path) -> Job:
    return make_job(encoder, rank=4)


def test_without_a_file_everything_is_allowed_and_four_fifths_of_the_memory_offered(tmp_path: Path, job: Job) -> None:
    allowed = policy.load(tmp_path)
    allowed.check(job, NOON)
    allowed.check_steps(10**9)
    assert allowed.limits() == Limits()
    assert allowed.offered(1000) == 800


@pytest.mark.parametrize(
    ("toml", "line"),
    [
        ('models = ["sentence-transformers/*"]', "models"),
        ('data = ["letters"]', "data"),
        ("largest_rank = 3", "largest_rank"),
        ("max_bytes = 1000", "max_bytes"),
    ],
)
def test_what_the_policy_does_not_allow_is_refused_naming_its_line(tmp_path: Path, job: Job, toml: str, line: str) -> None:
    (tmp_path / "policy.toml").write_text(toml)
    with pytest.raises(errors.PolicyRefusal) as refused:
        policy.load(tmp_path).check(job, NOON)
    assert refused.value.facts["line"] == line


def test_a_job_that_comes_outside_the_hours_is_put_off_rather_than_refused(tmp_path: Path, job: Job) -> None:
    with pytest.raises(errors.Refusal, match="the policy's hours are 22:00-06:00; it is 12:00") as refused:
        Policy(hours=["22:00-06:00"]).check(job, NOON)
    assert type(refused.value) is errors.Refusal
    assert refused.value.facts["stopping"]


def test_what_the_policy_allows_passes(tmp_path: Path, job: Job) -> None:
    (tmp_path / "policy.toml").write_text(
        f'models = ["*/encoder"]\ndata = ["things"]\nlargest_rank = 4\nmax_bytes = {job.slice.bytes + job.max_upload_bytes}\n'
        'hours = ["11:00-13:00"]\n'
    )
    policy.load(tmp_path).check(job, NOON)


def test_more_steps_than_allowed_are_refused() -> None:
    Policy(max_steps=10).check_steps(10)
    with pytest.raises(errors.PolicyRefusal, match="max_steps is 10; the job takes 11"):
        Policy(max_steps=10).check_steps(11)


@pytest.mark.parametrize(
    ("span", "inside", "outside"),
    [("09:00-17:00", ["09:00", "16:59"], ["08:59", "17:00", "00:00"]), ("22:00-06:00", ["22:00", "00:00", "05:59"], ["06:00", "21:59"])],
)
def test_hours_hold_their_start_but_not_their_end_also_past_midnight(span: str, inside: list[str], outside: list[str]) -> None:
    allowed = Policy(hours=[span])
    assert all(allowed.may_work(time.fromisoformat(t)) for t in inside)
    assert not any(allowed.may_work(time.fromisoformat(t)) for t in outside)


@pytest.mark.parametrize(("share", "most", "offered"), [(0.5, None, 500), (1.0, 300, 300), (0.2, 300, 200)])
def test_the_smaller_of_share_and_bytes_is_offered(share: float, most: int | None, offered: int) -> None:
    assert Policy(memory_share=share, memory_bytes=most).offered(1000) == offered


def test_the_coordinator_is_told_the_limits_that_spare_a_round_trip() -> None:
    allowed = Policy(models=["a/*"], largest_rank=8, max_steps=100, max_bytes=10**6, data=["private"])
    assert allowed.limits() == Limits(largest_rank=8, max_steps=100, max_bytes=10**6, models=["a/*"])


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("largest_rank = ", "no TOML"),
        ("largest_rank = 0", "largest_rank"),
        ("largest_rang = 4", "largest_rang is unknown; is largest_rank meant?"),
        ('hours = ["late"]', "no span of hours"),
        ('device = "gpu"', "device"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused_rather_than_ignored(tmp_path: Path, toml: str, words: str) -> None:
    (tmp_path / "policy.toml").write_text(toml)
    with pytest.raises(errors.PolicyRefusal) as refused:
        policy.load(tmp_path)
    assert words in refused.value.detail
