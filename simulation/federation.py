"""Many real agents and the real application in one process: time is ours, so results repeat.

Nothing stands between an agent's step and the database but an ASGI transport. What differs from a real federation is
chosen by whoever builds the parts: the network, the clock, and the machine's figures.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
from pydantic import SecretStr
from sqlalchemy.orm import Session

from agent.client import Client
from agent.holding import Step
from agent.loop import Loop
from agent.training import Train, Trainer
from coordinator import access, app, schema
from coordinator.context import Context
from coordinator.settings import Settings
from protocol.messages import Enrol, Enrolled
from protocol.plan import Plan
from protocol.states import Role, RunState
from protocol.views import EnrolmentMade, EnrolmentRequest, RoundView, RunDetail, TokenRequest
from simulation.device import Device

URL = "http://localhost"  # only a name: no packet leaves the process
TURN = timedelta(seconds=1)  # simulated time of one turn
LONGEST = timedelta(minutes=10)  # of one where nobody has had work for as long: what is due then comes so much later at most
EVERYBODY = 100  # turns after which every agent asks: a coordinator gives no work to whom it has not seen lately


@dataclass
class Time:
    """A clock that somebody moves."""

    now: datetime = datetime(2000, 1, 1, tzinfo=UTC)

    def __call__(self, _: Session) -> datetime:
        return self.now

    def pass_by(self, span: timedelta) -> None:
        self.now += span


@dataclass
class Federation:
    """A coordinator and its agents, ready to be swept over."""

    context: Context
    time: Time
    operator: httpx.AsyncClient
    loops: Mapping[str, Loop] = field(default_factory=dict)  # client id → its agent, in the order of their names
    turns: int = 0
    called: set[str] = field(default_factory=set)  # clients for whom the bell has rung since they were asked last

    def __post_init__(self) -> None:
        self.context.bell.pass_on(self.called.update)

    async def start(self, plan: Plan) -> str:
        """Make the run of a resolved plan; gives its id."""
        return RunDetail.model_validate_json(await self._call("POST", "/v1/runs", plan.model_dump_json())).id

    def turn(self, span: timedelta = TURN) -> None:
        """So much time passes, and the conductor does all that is due."""
        self.time.pass_by(span)
        while self.context.conductor.tick():
            pass

    async def ask(self) -> bool:
        """One question for work of every agent that was called, in the order of their names; gives whether anybody had some.

        Where nobody was called, and now and then anyway, everybody asks.
        """
        self.turns += 1
        asking = self.called.copy() if self.turns % EVERYBODY else set(self.loops)
        self.called.clear()
        steps = [await self.loops[client].step() for client in [client for client in self.loops if client in asking] or self.loops]
        return any(step is not Step.idle for step in steps)

    async def run(self, plan: Plan) -> AsyncIterator[RunDetail]:
        """Carry a plan out; gives the run after every turn of the conductor, until it is over."""
        id, span = await self.start(plan), TURN
        while True:
            self.turn(span)
            detail = await self.look(id)
            yield detail
            if detail.state is not RunState.running:
                return
            span = TURN if await self.ask() else min(2 * span, LONGEST)

    async def look(self, id: str) -> RunDetail:
        """Where a run stands."""
        return RunDetail.model_validate_json(await self._call("GET", f"/v1/runs/{id}"))

    async def round(self, id: str, number: int) -> RoundView:
        """One round, whole."""
        return RoundView.model_validate_json(await self._call("GET", f"/v1/runs/{id}/rounds/{number}"))

    async def rounds(self, id: str) -> list[RoundView]:
        """All published rounds, whole."""
        detail = await self.look(id)
        return [await self.round(id, number) for number in range(detail.round + 1)]

    async def adapter(self, id: str, rank: int) -> bytes:
        """The newest adapter as a zip archive of a PEFT folder."""
        return await self._call("GET", f"/v1/runs/{id}/adapter?rank={rank}")

    async def tensors(self, id: str, round: int, rank: int) -> bytes:
        """The tensors of a round's PEFT folder at that rank, as they stand in its file."""
        return await self._call("GET", f"/v1/runs/{id}/adapter/adapter_model.safetensors?round={round}&rank={rank}")

    async def _call(self, method: str, path: str, body: str | None = None) -> bytes:
        answer = await self.operator.request(method, path, content=body, headers={"Content-Type": "application/json"})
        answer.raise_for_status()
        return answer.content


@asynccontextmanager
async def federation(
    devices: Sequence[Device], folder: Path, *, train: Train | None = None, executor: str = "threads://"
) -> AsyncIterator[Federation]:
    """A federation of these devices with its files in a folder; `train`, if given, takes the place of each device's own training."""
    settings = Settings(data=folder, executor=executor, poll_seconds=300)
    schema.migrate(settings.database)
    time = Time()
    context = app.build(settings, clock=time)
    transport = httpx.ASGITransport(app=app.create_app(context))
    async with AsyncExitStack() as stack:
        stack.callback(context.close)
        operator = await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url=URL, headers=_operator(context)))
        found = Federation(context=context, time=time, operator=operator)
        loops: dict[str, Loop] = {}
        for device in sorted(devices, key=lambda device: device.name):
            enrolled = await _enrol(found, device, transport)
            client = await stack.enter_async_context(Client(URL, SecretStr(enrolled.credential), transport=transport))
            own = train or Trainer(device.catalogue, device.policy)
            work = folder / "agents" / device.name
            loop = Loop(client, device.trains(own), device.policy, work, wait_seconds=0, clock=_frozen, chance=random.Random(0))
            loops[enrolled.id] = loop
        found.loops = loops
        yield found


def _frozen() -> float:
    """No time passes while a slice travels: the link's figures are the machine's, not this process's."""
    return 0.0


def _operator(context: Context) -> dict[str, str]:
    with context.database.write() as session:
        made = access.make_token(session, TokenRequest(name="simulation", role=Role.admin), context.database.clock(session))
    return {"Authorization": f"Bearer {made.token}"}


async def _enrol(federation: Federation, device: Device, transport: httpx.ASGITransport) -> Enrolled:
    request = EnrolmentRequest(labels=device.machine.labels)
    enrolment = EnrolmentMade.model_validate_json(await federation._call("POST", "/v1/enrolments", request.model_dump_json()))
    async with Client(URL, transport=transport) as client:
        return await client.enrol(SecretStr(enrolment.token), Enrol(name=device.name, profile=device.profile()))
