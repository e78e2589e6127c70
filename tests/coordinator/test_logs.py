"""Logs tell every change of state, and no secret."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from protocol import errors
from protocol.messages import Enrolled
from protocol.views import TokenMade
from tests.federation import Caller, Device, Federation, make_plan, make_profile, read


async def test_no_secret_is_logged_in_the_whole_life_of_a_federation(small: Federation) -> None:
    secrets = [str(small.admin.secret), str(small.viewer.secret)]
    with capture_logs() as logs:
        invitation = await small.admin.invite(uses=3)
        token = read(await small.admin.call("POST", "/v1/tokens", json={"name": "short", "role": "viewer"}), TokenMade)
        await small.enrol_many(3)
        rotated = (await small.admin.change_client(small.devices[0], rotate=True)).json()["credential"]
        small.devices[0] = replace(small.devices[0], secret=rotated)
        body = {"name": "late", "profile": make_profile().model_dump(mode="json")}
        late = read(await Caller(small.http, invitation.token).call("POST", "/v1/clients", json=body), Enrolled)
        small.devices.append(Device(small.http, late.credential, id=late.id, name="late"))
        run = await small.open(make_plan(rounds=1))
        await small.play([run])
        bad = await small.open(make_plan(evaluation={"every": 0}))
        job = await small.devices[1].next_job()
        if job is not None:
            with pytest.raises(errors.MalformedSlice):
                await small.devices[1].put_slice(job, b"nonsense")
        await small.admin.change_run(bad, "stop")
        await small.nobody.call("GET", "/v1/runs", headers={"Authorization": f"Bearer {small.admin.secret}x"})
        secrets += [invitation.token, token.token, *(str(device.secret) for device in small.devices)]

    told = repr(logs)
    assert {"client-enrolled", "run-created", "round-opened", "job-submitted", "round-published", "run-finished", "run-stopped"} <= {
        entry["event"] for entry in logs
    }
    assert [secret for secret in secrets if secret in told] == []


async def test_the_log_and_the_events_tell_the_same(small: Federation) -> None:
    with capture_logs() as logs:
        await small.enrol_many(3)
        run = await small.open(make_plan(rounds=1, evaluation={"every": 0}))
        await small.play([run])

    assert all(entry["log_level"] == "info" for entry in logs)
    opened = next(entry for entry in logs if entry["event"] == "round-opened")
    assert (opened["run"], opened["round"], opened["attempt"]) == (run, 1, 1)


OBEYED = "\x1b[2J\x9b8m\x07"
STORY = f"""
import structlog
from coordinator import logs

logs.configure(%s)
log = structlog.get_logger()
log.info("job-released", reason={OBEYED!a}, other="the lid " + {OBEYED!a}, client="phone", round=1)
try:
    raise ValueError({OBEYED!a})
except ValueError:
    log.exception("advance-failed")
"""


def logged(as_json: bool) -> str:
    """What a process writes to its standard error of what a client wrote, and of a defect that quotes it."""
    story = [sys.executable, "-c", STORY % as_json]
    return subprocess.run(story, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True).stderr


def test_no_terminal_obeys_what_a_client_wrote() -> None:
    said = logged(as_json=False)

    assert said.replace("\n", "").isprintable()
    assert r"reason='\x1b[2J\x9b8m\x07'" in said
    assert r"other='the lid \x1b[2J\x9b8m\x07'" in said
    assert "client=phone" in said
    assert r"ValueError: \x1b[2J\x9b8m\x07" in said


def test_programs_read_in_the_log_what_a_client_wrote() -> None:
    said = logged(as_json=True)

    assert said.replace("\n", "").isprintable()
    assert json.loads(said.partition("\n")[0])["reason"] == OBEYED
