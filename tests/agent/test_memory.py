"""An agent's memory does not grow with its slice: one of hundreds of megabytes goes down, through the outbox, and up."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from protocol.states import JobState
from tests.agent.links import served
from tests.agent.looping import ALONE, last_job
from tests.federation import LAYOUT, Federation, make_plan

pytestmark = pytest.mark.slow
MEGABYTES = int(os.environ.get("HLORA_TEST_MEGABYTES", "300"))
GROWTH = 100 << 20  # bytes
PATIENCE = 240.0 + MEGABYTES  # seconds; an outer bound, nothing is measured by it
ROOT = Path(__file__).parents[2]
LARGE = LAYOUT.model_copy(update={"full": {f"layer.{n:03}": (1000, 2500) for n in range(MEGABYTES // 10)}})

# The agent's own process, so that its memory is its own. It sends back what it was given, under another label.
AGENT = """
import asyncio, json, sys
from pathlib import Path
import psutil
from pydantic import SecretStr
from agent.client import Client
from agent.loop import Loop
from agent.policy import Policy
from agent.training import Outcome
from protocol.messages import Usage
from protocol.contents import Label
from protocol.slices import Slice

peak = 0

def look():  # what is allocated; the pages of mapped files belong to the system's cache
    global peak
    memory = psutil.Process().memory_info()
    peak = max(peak, memory.rss - memory.shared)

def train(job, start, tell):
    label = Label(rank=job.rank, scale=job.scale, round=job.round, base=job.slice.digest, examples=5)
    return Outcome(examples=5, metrics={}, usage=Usage(seconds=1), slice=Slice(label, start.factors, start.full))

async def watch():
    while True:
        look()
        await asyncio.sleep(0.02)

async def main(url, credential, home):
    async with Client(url, SecretStr(credential)) as client:
        loop = Loop(client, train, Policy(), Path(home), wait_seconds=0)
        await loop.step()  # nothing to do yet: all is imported and connected
        look()
        before = peak
        print("ready", flush=True)
        sys.stdin.readline()
        watching = asyncio.create_task(watch())
        step = await loop.step()
        watching.cancel()
        print(json.dumps({"step": step, "before": before, "peak": peak}))

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_large_slice_moves_down_and_up_in_little_memory(federation: Federation, tmp_path: Path) -> None:
    device = await federation.enrol("device")
    assert device.secret is not None
    async with served(federation.app) as url:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-c", AGENT, url, device.secret, str(tmp_path / "home")),
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), PATIENCE) == b"ready\n"
        run = await federation.open(make_plan(**ALONE, layout=LARGE.model_dump(mode="json")))
        out, _ = await asyncio.wait_for(process.communicate(b"go\n"), PATIENCE)
    said = json.loads(out.splitlines()[-1])  # behind the log
    assert said["step"] == "done"
    assert (await last_job(federation, run))[0] is JobState.submitted
    print(f"{MEGABYTES} MB: {(said['peak'] - said['before']) / 2**20:.0f} MiB of growth")
    assert said["peak"] - said["before"] < GROWTH
