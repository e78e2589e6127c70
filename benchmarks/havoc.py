"""Coordinators and agents behind links that fail, killed and stopped at random, and started again.

Everything that is drawn comes from one seed: who is struck and when, which connection fails and where. What it meets is not:
the machines run as fast as they run.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.proxy import Fate, Link
from benchmarks.undisturbed import Home
from benchmarks.victims import Order
from benchmarks.zygote import Zygote
from protocol import errors
from protocol.plan import Plan
from protocol.states import RunState
from protocol.views import RunDetail

PACE = (0.1, 1.6)  # seconds from one blow to the next
AWAY = (0.0, 0.6)  # seconds until a killed process is started again
ASLEEP = (0.2, 5.0)  # seconds that a stopped process stays so: shorter and longer than a lease
STOPPED = 0.15  # share of the blows that stop a process instead of killing it
FRESH = 0.03  # share of the starts that import everything anew
LOOK_SECONDS = 0.3
PATIENCE = 300.0  # seconds without an answer, or without another round


@dataclass
class Victim:
    """A process that is there again soon after it was killed."""

    order: Order
    process: int = 0
    struck: bool = False  # dead, or asleep


@dataclass
class Havoc:
    """The whole scene, and what was done to it."""

    zygote: Zygote
    coordinators: Sequence[Victim]
    agents: Sequence[Victim]
    secret: str  # an administrator's token
    chance: random.Random
    blows: Counter[str] = field(default_factory=Counter)  # kills by kind, and stops
    times: list[float] = field(default_factory=list)  # of time.time(), when each blow was over
    fresh: int = 0
    died: list[str] = field(default_factory=list)  # who ended without having been killed: a defect
    runs: list[str] = field(default_factory=list)

    def start(self, victim: Victim) -> None:
        """Start a process, mostly by a fork."""
        fresh = self.chance.random() < FRESH
        self.fresh += fresh
        victim.process, victim.struck = self.zygote.start(victim.order, fresh=fresh), False

    @property
    def kills(self) -> int:
        """How many processes were killed."""
        return self.blows["coordinator"] + self.blows["agent"]

    async def strike_until(self, kills: int) -> None:
        """Strike one after the other, and let those who were struck come back meanwhile."""
        async with asyncio.TaskGroup() as coming_back:
            while self.kills < kills:
                await asyncio.sleep(self.chance.uniform(*PACE))
                kind = self.chance.choice([self.coordinators, self.agents])
                standing = [victim for victim in kind if not victim.struck]
                if standing:
                    coming_back.create_task(self._strike(self.chance.choice(standing)))

    async def _strike(self, victim: Victim) -> None:
        victim.struck = True
        if self.chance.random() < STOPPED:
            self.blows["stopped"] += 1
            os.kill(victim.process, signal.SIGSTOP)
            await asyncio.sleep(self.chance.uniform(*ASLEEP))
            os.kill(victim.process, signal.SIGCONT)
            victim.struck = False
        else:
            self.blows[victim.order.kind] += 1
            if not self.zygote.kill(victim.process):
                self.died.append(victim.order.name)
            await asyncio.sleep(self.chance.uniform(*AWAY))
            self.start(victim)
        self.times.append(time.time())

    def look_after(self) -> None:
        """Start again who ended by itself, and remember it."""
        ended = set(self.zygote.ended())
        for victim in self._all():
            if victim.process in ended:
                self.died.append(victim.order.name)
                self.start(victim)

    def _all(self) -> list[Victim]:
        return [*self.coordinators, *self.agents]

    async def ask(self, method: str, path: str, **content: object) -> httpx.Response:
        """An operator's request to any coordinator, until one answers. Raises Unavailable if none does for a long time."""
        until = time.monotonic() + PATIENCE
        async with httpx.AsyncClient(headers={"Authorization": f"Bearer {self.secret}"}, timeout=10, trust_env=False) as http:
            while time.monotonic() < until:
                port = self.chance.choice(self.coordinators).order.port
                try:
                    answer = await http.request(method, f"http://127.0.0.1:{port}{path}", **content)  # type: ignore[arg-type]  # httpx's own
                except httpx.TransportError:
                    await asyncio.sleep(LOOK_SECONDS)
                    continue
                if answer.is_success:
                    return answer
                if answer.status_code < 500:
                    raise errors.InvalidRequest(f"{method} {path} was refused: {answer.text}")
                await asyncio.sleep(LOOK_SECONDS)
        raise errors.Unavailable(f"no coordinator answered {method} {path} for {PATIENCE:g} s")

    async def carry_out(self, plan: Plan) -> None:
        """Make a run and see it to its end. Raises Unavailable if it does not end, with what it says of itself."""
        key = f"chaos {len(self.runs)}"
        made = await self.ask("POST", "/v1/runs", json=plan.model_dump(mode="json"), headers={"Idempotency-Key": key})
        run = RunDetail.model_validate_json(made.content)
        self.runs.append(run.id)
        round, until = run.round, time.monotonic() + PATIENCE
        while run.state is not RunState.finished:
            if run.round != round:
                round, until = run.round, time.monotonic() + PATIENCE
            if time.monotonic() > until or run.state is not RunState.running:
                raise errors.Unavailable(f"a run is {run.state} after round {round} of {run.rounds}: {run.reason or 'no reason is given'}")
            await asyncio.sleep(LOOK_SECONDS)
            self.look_after()
            run = RunDetail.model_validate_json((await self.ask("GET", f"/v1/runs/{run.id}")).content)

    async def wreak(self, plan: Plan, kills: int) -> None:
        """Carry the plan out again and again until so many processes were killed, and once more to its end."""
        striking = asyncio.create_task(self.strike_until(kills))
        try:
            while not striking.done():
                await self.carry_out(plan)
        finally:
            striking.cancel()
            await asyncio.gather(striking, return_exceptions=True)
        striking.result()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def coordinator(number: int, folder: Path, database: str) -> Victim:
    """A coordinator; all of one folder share its blobs."""
    return Victim(Order(kind="coordinator", name=f"coordinator-{number}", home=folder, database=database, port=free_port()))


def agent(home: Home) -> Victim:
    """An agent that was enrolled."""
    return Victim(Order(kind="agent", name=home.name, home=home.folder))


def link_to(coordinators: Sequence[Victim], seed: int) -> Link:
    """The way of the agents to the coordinators: most connections fail sooner or later."""
    fate = Fate(random.Random(f"{seed}/fate"), share=0.9, longest=1 << 20)
    return Link([("127.0.0.1", victim.order.port) for victim in coordinators], fate, random.Random(f"{seed}/link"))
