"""Whether this machine could work, point by point, and what to mend where it could not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import psutil
from pydantic import SecretStr

from agent import app, data, identity, machine, policy
from agent.connection import ONCE
from agent.data import Catalogue
from agent.policy import Policy
from agent.settings import Settings
from modelling import checkpoint
from protocol import errors
from protocol.plan import Model
from protocol.states import ClientState


@dataclass(frozen=True)
class Finding:
    """One point that was looked at."""

    point: str
    ok: bool
    detail: str  # what is there; or what is wrong, and what to do

    def line(self) -> str:
        """The finding for a person."""
        return f"{'ok' if self.ok else 'failed':7} {self.point:12} {self.detail}"

    def facts(self) -> dict[str, object]:
        """The finding for a program."""
        return asdict(self)


async def examine(settings: Settings, models: Sequence[str]) -> list[Finding]:
    """Look at everything that a job needs; nothing is changed anywhere."""
    home = settings.folder
    findings = [_look("policy", partial(_policy, home))]
    allowed = policy.load(home) if findings[-1].ok else Policy()
    findings += [_look("device", partial(_device, allowed)), _look("memory", partial(_memory, allowed))]
    findings.append(_look("data", partial(_data, home, allowed)))
    catalogue = data.load(home) if findings[-1].ok else Catalogue()
    findings += [_look("data", partial(_dataset, catalogue, alias)) for alias in catalogue.sources]
    findings += [_look("model", partial(_model, model, allowed)) for model in models]
    findings.append(_look("identity", partial(_identity, home)))
    if findings[-1].ok:
        findings.append(await _coordinator(settings))
    return findings


def _look(point: str, question: Callable[[], str]) -> Finding:
    try:
        return Finding(point, True, question())
    except errors.HLoRAError as error:
        return Finding(point, False, error.detail)


def _policy(home: Path) -> str:
    policy.load(home)
    return str(home / policy.FILE) if (home / policy.FILE).exists() else f"no {policy.FILE} in {home}: everything is allowed"


def _device(allowed: Policy) -> str:
    place = machine.device(allowed.device)
    known = machine.precisions(place)
    speed = machine.training_flops(place, known[-1])
    return f"{place}, {', '.join(known)}, {speed / 1e9:.1f} GFLOP/s in a trial step"


def _memory(allowed: Policy) -> str:
    place = machine.device(allowed.device)
    offered, free = allowed.offered(machine.memory_bytes(place)), psutil.virtual_memory().available
    found = f"{offered / 2**30:.1f} GiB offered, {free / 2**30:.1f} GiB of the machine's memory free now"
    if place == "cpu" and free < offered / 2:
        raise errors.MemoryRefusal(f"{found}: close other programs, or offer less with memory_share or memory_bytes in {policy.FILE}")
    return found


def _data(home: Path, allowed: Policy) -> str:
    catalogue = data.load(home)
    if not catalogue.sources:
        raise errors.DataRefusal(f"there are no data sets; describe some in {home / data.FILE}")
    if strange := sorted(set(allowed.data or ()) - catalogue.sources.keys()):
        raise errors.DataRefusal(f"data in {policy.FILE} names {', '.join(strange)}, which {data.FILE} does not describe; mend one of them")
    count = len(catalogue.sources)
    return f"{count} data set{'s' * (count > 1)} in {home / data.FILE}"


def _dataset(catalogue: Catalogue, alias: str) -> str:
    found = app.described(catalogue, alias)
    return f"{alias}: {found.train} rows to train on, {found.held_out} held out, columns {', '.join(found.columns)}"


def _model(name: str, allowed: Policy) -> str:
    allowed.check_model(name)
    place = checkpoint.folder(Model(id=name))
    size = sum(file.stat().st_size for file in place.glob("*.safetensors"))
    offered = allowed.offered(machine.memory_bytes(machine.device(allowed.device)))
    if size > offered:
        raise errors.MemoryRefusal(f"{name} takes {size / 2**30:.1f} GiB; {offered / 2**30:.1f} GiB are offered")
    return f"{name}: {size / 2**20:.0f} MiB in {place}, {checkpoint.fingerprint(place)}"


def _identity(home: Path) -> str:
    who = identity.load(home)
    file = home / identity.FILE
    if file.stat().st_mode & 0o077:
        raise errors.InsecureTransport(f"{file} can be read by others; chmod 600 {file}")
    return f"{who.name} ({who.id}) at {who.url}"


async def _coordinator(settings: Settings) -> Finding:
    who = identity.load(settings.folder)
    try:
        async with app.connect(settings, who.url, SecretStr(who.credential), ONCE) as client:
            itself = await client.me()
    except errors.HLoRAError as error:
        return Finding("coordinator", False, error.detail)
    if itself.state is not ClientState.active:
        return Finding("coordinator", False, f"this client is {itself.state}; ask the operator to reinstate it")
    return Finding("coordinator", True, f"{who.url} knows this client as {itself.name}")
