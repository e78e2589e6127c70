"""What agents call: enrol, profile, poll for work, renew, give back, send a result. Slices travel next door."""

from __future__ import annotations

import re
import time
from typing import Annotated

from fastapi import APIRouter, Header, Response

from coordinator import clients, errands, jobs
from coordinator.errands import Answering, Renewing
from coordinator.jobs import Holder
from coordinator.problems import documented
from coordinator.routes.bodies import Bounded
from coordinator.routes.requests import COMMON, READ, Device, Id, Newcomer, Parts
from protocol import VERSION, errors
from protocol.crash import Point
from protocol.messages import ClientSelf, Enrol, Enrolled, GiveBack, Job, Profile, Progress, Renewal, Result, ResultReceipt

router = APIRouter(prefix="/v1", tags=["agents"], route_class=Bounded)
HELD = (errors.NotFound, errors.StaleLease, errors.JobOver)


@router.post("/clients", status_code=201, responses=documented(*READ, errors.InvalidProfile, errors.EnrolmentOver, errors.NameTaken))
def enrol(body: Enrol, caller: Newcomer, parts: Parts) -> Enrolled:
    """Redeem an enrolment token with a name and a profile; the credential is told this once."""
    with parts.database.write() as session:
        return clients.enrol(session, caller.id, body, parts.database.clock(session))


@router.get("/clients/me", responses=documented(*COMMON))
def whoami(caller: Device, parts: Parts) -> ClientSelf:
    """What the coordinator knows of the calling client."""
    with parts.database.read() as session:
        return clients.itself(session, caller.client)


@router.put("/clients/me/profile", responses=documented(*READ, errors.InvalidProfile))
def set_profile(body: Profile, caller: Device, parts: Parts) -> ClientSelf:
    """Replace the profile. A run that this device refused is offered to it again."""
    with parts.database.write() as session:
        answer = clients.set_profile(session, caller.client, body, parts.database.clock(session))
    parts.bell.ring_conductor()
    return answer


@router.post(
    "/jobs/next",
    response_model=Job,
    responses={
        200: {"description": "a job under a fresh lease; the one that the client holds already, if the last answer was lost"},
        204: {"description": "nothing to do; ask again after `Retry-After` seconds"},
        **documented(*COMMON, errors.OutdatedAgent),
    },
)
async def next_job(
    caller: Device,
    parts: Parts,
    prefer: Annotated[str | None, Header(max_length=200, description="`wait=20`: wait for work so many seconds")] = None,
    hlora_version: Annotated[str | None, Header(max_length=40, description="the agent's version")] = None,
) -> Response:
    """Long poll for work."""
    _check_version(hlora_version)
    with parts.bell.listen(caller.client) as ear:
        seconds = _wait(prefer, clients.pace(parts.settings.poll_seconds, parts.bell.crowd))
        until = time.monotonic() + seconds
        # Who was called between the look and the ear would wait in vain.
        called = caller.work or not seconds or parts.bell.rings != caller.rings
        if not called:
            parts.desk.note(caller.client)
        while True:
            job = await parts.desk.come(caller.client) if called else None
            if job is not None:
                return Response(job.model_dump_json(), media_type="application/json")
            called = await ear.rung(until - time.monotonic())
            if not called:
                return Response(status_code=204, headers={"Retry-After": "1"})


def _wait(prefer: str | None, longest: float) -> float:
    """Seconds that the client prefers to wait (RFC 7240), at most `longest`; 0 if it said nothing of it."""
    found = re.search(r"(?:^|[,;\s])wait\s*=\s*(\d{1,6})", prefer or "")
    return min(longest, float(found.group(1))) if found else 0.0


def _check_version(version: str | None) -> None:
    """Before 1.0 the second number is the one that breaks; an agent that names no version is taken at its word."""
    if version is None:
        return
    came = re.fullmatch(r"(\d{1,6})\.(\d{1,6})\.\S+", version)
    major, minor = (int(n) for n in VERSION.split(".")[:2])
    if came is None or (int(came[1]), int(came[2])) < (major, minor):
        raise errors.OutdatedAgent(f"this coordinator needs agents of version {major}.{minor} or newer, yours is {version}; upgrade it")


@router.post("/jobs/{job}/lease", responses=documented(*READ, *HELD))
async def renew(job: Id, body: Progress, caller: Device, parts: Parts) -> Renewal:
    """Prolong the lease and say how far the work is; the answer says whether to go on."""
    renewing = Renewing(Holder(caller.client, job, body.epoch), body)
    return await parts.desk.bring(errands.renew, caller.client, renewing, Point.lease_renewed)


@router.delete("/jobs/{job}/lease", status_code=204, responses=documented(*READ, *HELD))
def give_back(job: Id, body: GiveBack, caller: Device, parts: Parts) -> None:
    """Give the job back, with the reason."""
    with parts.database.write() as session:
        jobs.release(session, caller.client, job, body, parts.database.clock(session))
    parts.bell.ring_conductor()


@router.put(
    "/jobs/{job}/result",
    status_code=201,
    responses={
        200: {"model": ResultReceipt, "description": "the same result again"},
        **documented(*READ, *HELD, errors.DifferentResult, errors.InvalidResult),
    },
)
async def put_result(job: Id, body: Result, caller: Device, parts: Parts, response: Response) -> ResultReceipt:
    """Say how the job ended. Repeating the same result is answered like the first time."""
    body.check_metrics()
    answered = await parts.desk.bring(errands.answer, caller.client, Answering(Holder(caller.client, job, body.epoch), body))
    parts.bell.ring_conductor()
    response.status_code = 201 if answered.new else 200
    return answered.receipt
