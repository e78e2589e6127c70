"""Composition root: settings become a connected client, a profile, a running loop."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
import torch
from pydantic import SecretStr, TypeAdapter, ValidationError

from agent import data, identity, machine, policy
from agent.client import Client
from agent.connection import PATIENT, Retry
from agent.identity import Identity
from agent.policy import Policy
from agent.settings import Settings
from protocol import crash, errors
from protocol.messages import Dataset, Enrol, Profile
from protocol.strict import Name

log = structlog.get_logger("agent")


def configure(settings: Settings) -> None:
    """Set up logs and threads, once per process."""
    renderer = structlog.processors.JSONRenderer() if settings.log == "json" else structlog.dev.ConsoleRenderer(colors=False)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.crash_at is not None:
        crash.arm(settings.crash_at)


def connect(settings: Settings, url: str, credential: SecretStr | None = None, retry: Retry = PATIENT) -> Client:
    """A client of the coordinator there, by the way that the settings allow. Raises InsecureTransport."""
    return Client(url, credential, insecure=settings.insecure, ca_file=settings.ca_file, proxy=settings.proxy, retry=retry)


def profile(home: Path, allowed: Policy) -> Profile:
    """What this machine can do and has, as far as its owner offers it. Data sets that cannot be read are left out, and logged.

    Raises InvalidProfile where all of it together is more than a coordinator takes.
    """
    catalogue = data.load(home)
    datasets: dict[str, Dataset] = {}
    for alias in catalogue.sources:
        if allowed.data is not None and alias not in allowed.data:
            continue
        try:
            datasets[alias] = catalogue.describe(alias)
        except errors.DataRefusal as error:
            log.warning("dataset-left-out", data=alias, detail=error.detail)
    found = machine.profile(allowed, datasets)
    found.check_extent()
    return found


async def enrol(settings: Settings, url: str, name: str, token: SecretStr) -> Identity:
    """Redeem an enrolment token and keep the credential.

    Raises Unauthenticated, EnrolmentOver, NameTaken, InsecureTransport, and InvalidRequest for what cannot be a name.
    """
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise errors.InvalidRequest(f"{name[:80]!r} cannot be a machine's name: 1 to 64 letters, digits, . _ - or blanks can") from None
    async with connect(settings, url) as client:
        found = profile(settings.folder, policy.load(settings.folder))
        enrolled = await client.enrol(token, Enrol(name=name, profile=found, key=identity.key(settings.folder, url, name)))
    who = Identity(url=url, id=enrolled.id, name=name, credential=enrolled.credential)
    identity.save(who, settings.folder)
    return who


async def run(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT; the job in hand is then given back. Raises what asking again cannot mend.

    Also Conflict, where another agent is at work in the same home folder.
    """
    # Model libraries take seconds to import; enrolling and looking around need none.
    from agent.checkpoints import Checkpoints
    from agent.loop import Loop
    from agent.training import Trainer

    home = settings.folder
    who, allowed = identity.load(home), policy.load(home)
    with _alone(home):
        async with connect(settings, who.url, SecretStr(who.credential)) as client:
            trainer = Trainer(data.load(home), allowed, checkpoints=Checkpoints(home / "work", settings.checkpoint_seconds))
            loop = Loop(client, trainer, allowed, home, settings.wait_seconds)
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, loop.stopping.set)
            log.info("agent-started", client=who.name, coordinator=who.url)
            await loop.run(await asyncio.to_thread(profile, home, allowed))
            log.info("agent-stopped")


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Keep other agents from a home folder while the block lasts: two would take each other's work for their own."""
    try:
        held = (home / "agent.lock").open("a")
    except OSError as error:
        raise errors.InvalidRequest(f"{home} cannot be written to ({error.strerror}): an agent keeps its work there; mend it") from None
    with held as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when the process ends, however it ends
        except BlockingIOError:
            raise errors.Conflict(f"another agent is at work in {home}; stop it first, or enrol a second one with its own --home") from None
        yield
