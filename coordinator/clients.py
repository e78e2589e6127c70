"""Clients: how a machine becomes one, what it can do, whether it is there, and what operators change of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import datetime, timedelta

from sqlalchemy import bindparam, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from coordinator import access, events, paging
from coordinator.tables import Client, Enrolment, Job
from protocol import errors
from protocol.messages import ClientSelf, Enrol, Enrolled, Profile
from protocol.states import ClientState, JobKind
from protocol.views import ClientChange, ClientChanged, ClientView, EnrolmentMade, EnrolmentRequest, EnrolmentView, Page, RankView

LATELY = timedelta(minutes=10)  # longer than any poll waits: who was not seen since is no part of the fleet now
POLLS_PER_SECOND = 50.0  # that a fleet shall ask at most: the larger it is, the longer its polls may wait


def make_enrolment(session: Session, request: EnrolmentRequest, now: datetime) -> EnrolmentMade:
    """A new enrolment token; the secret is told only here."""
    secret = access.new_secret(access.Kind.enrolment)
    row = Enrolment(
        id=access.new_id("enrolment"),
        digest=access.digest(secret),
        uses_left=request.uses,
        expires_at=now + timedelta(seconds=request.seconds),
        revoked=False,
        labels=request.labels,
        created_at=now,
    )
    session.add(row)
    return EnrolmentMade(**_enrolment_view(row).model_dump(), token=secret)


def list_enrolments(session: Session, cursor: str | None, limit: int) -> Page[EnrolmentView]:
    """Enrolment tokens, newest first, without their secrets."""
    return paging.page(session, select(Enrolment), Enrolment.created_at, Enrolment.id, cursor, limit, _enrolment_view)


def revoke_enrolment(session: Session, id: str) -> None:
    """Void an enrolment token; machines that enrolled with it stay. Raises NotFound."""
    row = session.get(Enrolment, id)
    if row is None:
        raise errors.NotFound(f"there is no enrolment {id}")
    row.revoked = True


def enrol(session: Session, enrolment_id: str, request: Enrol, now: datetime) -> Enrolled:
    """Make a client, and take one use from the enrolment token in the same statement that checks it.

    Who asks again with the key of a client that this token made gets its answer again. Raises InvalidProfile, EnrolmentOver, NameTaken.
    """
    request.profile.check_extent()
    secret = request.key or access.new_secret(access.Kind.client)
    session.get_one(Enrolment, enrolment_id, with_for_update=True)  # whoever asks twice at once is answered twice the same
    again = (Client.enrolment_id == enrolment_id, Client.name == request.name, Client.digest == access.digest(secret))
    if (id := session.scalar(select(Client.id).where(*again))) is not None:
        return Enrolled(id=id, credential=secret)
    usable = (Enrolment.id == enrolment_id, Enrolment.uses_left > 0, Enrolment.expires_at > now, Enrolment.revoked.is_(False))
    labels = session.scalar(update(Enrolment).where(*usable).values(uses_left=Enrolment.uses_left - 1).returning(Enrolment.labels))
    if labels is None:
        raise errors.EnrolmentOver("this enrolment token is expired, used up or revoked; ask an operator for a new one")
    client = Client(
        id=access.new_id("client"),
        name=request.name,
        digest=access.digest(secret),
        labels=labels,
        profile=request.profile.model_dump(mode="json"),
        profiled_at=now,
        last_seen=now,
        enrolled_at=now,
        enrolment_id=enrolment_id,
    )
    session.add(client)
    try:
        session.flush()
    except IntegrityError:
        raise errors.NameTaken(f"a client named {request.name} exists already; enrol under another name", name=request.name) from None
    events.record(session, now, "client-enrolled", client=request.name)
    return Enrolled(id=client.id, credential=secret)


def get(session: Session, id: str) -> Client:
    """A client's row. Raises NotFound."""
    client = session.get(Client, id)
    if client is None:
        raise errors.NotFound(f"there is no client {id}")
    return client


def _mine(session: Session, id: str) -> Client:
    """A client's row, until the transaction ends nobody else's: a rejection does not undo a revocation. Raises NotFound."""
    client = get(session, id)
    session.refresh(client, with_for_update={"key_share": True})
    return client


def itself(session: Session, id: str) -> ClientSelf:
    """What a client may know of itself."""
    client = get(session, id)
    return ClientSelf(id=client.id, name=client.name, state=ClientState(client.state), profile=Profile.model_validate(client.profile))


def set_profile(session: Session, id: str, profile: Profile, now: datetime) -> ClientSelf:
    """Replace a client's profile. A device that refused a run is asked again after this. Raises InvalidProfile."""
    profile.check_extent()
    client = get(session, id)
    client.profile = profile.model_dump(mode="json")
    client.profiled_at = client.last_seen = now
    return itself(session, id)


def all_seen(session: Session, ids: Collection[str], now: datetime) -> None:
    """Note that these clients are there."""
    if ids:
        session.connection().execute(_SEEN, {"ids": list(ids), "now": now})


# Taken in the order of their ids: two that took them as the planner likes would wait for each other.
_THESE = select(Client.id).where(Client.id.in_(bindparam("ids", expanding=True))).order_by(Client.id).with_for_update(key_share=True)
_SEEN = update(Client).where(Client.id.in_(_THESE.correlate(None).scalar_subquery())).values(last_seen=bindparam("now"))


def pace(least: float, crowd: int) -> float:
    """Seconds that a poll may wait where so many clients wait."""
    return max(least, crowd / POLLS_PER_SECOND)


def crowd(clients: Iterable[Client], now: datetime) -> int:
    """How many of these clients are part of the fleet now, at whichever coordinator they wait."""
    return sum(client.last_seen is not None and now - client.last_seen <= LATELY for client in clients)


def pace_now(session: Session, least: float, now: datetime) -> float:
    """The longest time that a poll may wait now."""
    fleet = select(func.count()).where(Client.state == ClientState.active, Client.last_seen >= now - LATELY)
    return pace(least, session.scalar(fleet) or 0)


def available(client: Client, now: datetime, pace: float) -> bool:
    """Whether it was seen within twice the pace that polls are given, with some seconds for the way."""
    return (
        client.state == ClientState.active and client.last_seen is not None and now - client.last_seen <= timedelta(seconds=2 * pace + 10)
    )


def active(session: Session) -> list[Client]:
    """All clients that may be given work, in the order of their names."""
    return sorted(session.scalars(select(Client).where(Client.state == ClientState.active)), key=lambda client: client.name)


def count_rejection(session: Session, id: str, limit: int, reason: str, now: datetime) -> None:
    """Count a rejected contribution; after `limit` in a row the client is paused until an operator reinstates it."""
    client = _mine(session, id)
    client.rejections += 1
    if client.rejections >= limit and client.state == ClientState.active:
        client.state = ClientState.paused
        client.reason = f"{client.rejections} contributions in a row were rejected, the last because {reason}"
        events.record(session, now, "client-paused", client=client.name, reason=client.reason)


def clear_rejections(session: Session, ids: Collection[str]) -> None:
    """A good contribution of each of these clients ends the row of bad ones."""
    if ids:
        session.connection().execute(_CLEARED, {"ids": list(ids)})


_CLEARED = update(Client).where(Client.id.in_(_THESE.where(Client.rejections > 0).correlate(None).scalar_subquery())).values(rejections=0)


def change(session: Session, id: str, wanted: ClientChange, now: datetime) -> str | None:
    """Change labels or state, or rotate the credential; gives the new credential if there is one. Raises NotFound, Conflict."""
    client = _mine(session, id)
    if client.state == ClientState.revoked:
        raise errors.Conflict(f"client {client.name} is revoked for good; enrol the machine anew, under another name")
    if wanted.labels is not None:
        client.labels = wanted.labels
    if wanted.state is not None and wanted.state != client.state:
        client.state, client.rejections = wanted.state, 0
        client.reason = None if wanted.state is ClientState.active else "by an operator"
        events.record(session, now, f"client-{wanted.state}", client=client.name)
    if not wanted.rotate:
        return None
    secret = access.new_secret(access.Kind.client)
    client.digest = access.digest(secret)
    return secret


def changed(session: Session, id: str, credential: str | None, now: datetime, pace: float) -> ClientChanged:
    """The answer to a change."""
    return ClientChanged(client=view(session, get(session, id), now, pace), credential=credential)


def list_views(session: Session, cursor: str | None, limit: int, now: datetime, pace: float) -> Page[ClientView]:
    """Clients, newest first."""
    return paging.page(
        session, select(Client), Client.enrolled_at, Client.id, cursor, limit, lambda client: view(session, client, now, pace)
    )


def view(session: Session, client: Client, now: datetime, pace: float) -> ClientView:
    """A client as operators see it."""
    newest = select(Job.rank_view).where(Job.client_id == client.id, Job.kind == JobKind.train).order_by(Job.created_at.desc()).limit(1)
    rank = session.scalar(newest)
    return ClientView(
        id=client.id,
        name=client.name,
        state=ClientState(client.state),
        reason=client.reason,
        labels=client.labels,
        available=available(client, now, pace),
        last_seen=client.last_seen,
        enrolled_at=client.enrolled_at,
        rejections=client.rejections,
        rank=None if rank is None else RankView.model_validate(rank),
        profile=Profile.model_validate(client.profile),
    )


def counts(session: Session) -> dict[str, int]:
    """How many clients there are by state."""
    return {row.state: row.total for row in session.execute(select(Client.state, func.count().label("total")).group_by(Client.state))}


def _enrolment_view(row: Enrolment) -> EnrolmentView:
    return EnrolmentView(id=row.id, uses_left=row.uses_left, expires_at=row.expires_at, revoked=row.revoked, labels=row.labels)
