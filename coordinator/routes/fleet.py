"""What operators call for the machines that take part, and for their own tokens."""

from __future__ import annotations

from fastapi import APIRouter

from coordinator import access, clients
from coordinator.problems import documented
from coordinator.routes.bodies import Bounded
from coordinator.routes.requests import ADMINS, COMMON, READ, READERS, Cursor, Id, Limit, Parts
from protocol import errors
from protocol.views import (
    ClientChange,
    ClientChanged,
    ClientView,
    EnrolmentMade,
    EnrolmentRequest,
    EnrolmentView,
    Page,
    TokenMade,
    TokenRequest,
    TokenView,
)

reading = APIRouter(prefix="/v1", tags=["fleet"], dependencies=READERS)
changing = APIRouter(prefix="/v1", tags=["fleet"], dependencies=ADMINS, route_class=Bounded)
GONE = documented(*COMMON, errors.NotFound)


@reading.get("/clients", responses=documented(*COMMON))
def list_clients(parts: Parts, cursor: Cursor = None, limit: Limit = 100) -> Page[ClientView]:
    """Clients, newest first."""
    with parts.database.read() as session:
        now = parts.database.clock(session)
        return clients.list_views(session, cursor, limit, now, clients.pace_now(session, parts.settings.poll_seconds, now))


@reading.get("/clients/{client}", responses=GONE)
def show_client(client: Id, parts: Parts) -> ClientView:
    """A client: state, profile, last rank and why."""
    with parts.database.read() as session:
        now = parts.database.clock(session)
        return clients.view(session, clients.get(session, client), now, clients.pace_now(session, parts.settings.poll_seconds, now))


@changing.patch("/clients/{client}", responses=documented(*READ, errors.NotFound, errors.Conflict))
def change_client(client: Id, body: ClientChange, parts: Parts) -> ClientChanged:
    """Set labels, pause, reinstate, revoke, or rotate the credential (the new one is told this once)."""
    with parts.database.write() as session:
        now = parts.database.clock(session)
        credential = clients.change(session, client, body, now)
        session.flush()
        pace = clients.pace_now(session, parts.settings.poll_seconds, now)
        answer = clients.changed(session, client, credential, now, pace)
    parts.bell.ring_conductor()
    return answer


@changing.post("/enrolments", status_code=201, responses=documented(*READ))
def make_enrolment(body: EnrolmentRequest, parts: Parts) -> EnrolmentMade:
    """Make an enrolment token; it is told this once."""
    with parts.database.write() as session:
        return clients.make_enrolment(session, body, parts.database.clock(session))


@reading.get("/enrolments", responses=documented(*COMMON))
def list_enrolments(parts: Parts, cursor: Cursor = None, limit: Limit = 100) -> Page[EnrolmentView]:
    """Enrolment tokens, newest first, without the tokens."""
    with parts.database.read() as session:
        return clients.list_enrolments(session, cursor, limit)


@changing.delete("/enrolments/{enrolment}", status_code=204, responses=GONE)
def revoke_enrolment(enrolment: Id, parts: Parts) -> None:
    """Void an enrolment token; machines that enrolled with it stay."""
    with parts.database.write() as session:
        clients.revoke_enrolment(session, enrolment)


@changing.post("/tokens", status_code=201, responses=documented(*READ))
def make_token(body: TokenRequest, parts: Parts) -> TokenMade:
    """Make an operator's token; it is told this once."""
    with parts.database.write() as session:
        return access.make_token(session, body, parts.database.clock(session))


@changing.get("/tokens", responses=documented(*COMMON))
def list_tokens(parts: Parts, cursor: Cursor = None, limit: Limit = 100) -> Page[TokenView]:
    """Operators' tokens, newest first, without the tokens."""
    with parts.database.read() as session:
        return access.list_tokens(session, cursor, limit)


@changing.delete("/tokens/{token}", status_code=204, responses=GONE)
def revoke_token(token: Id, parts: Parts) -> None:
    """Void an operator's token at once."""
    with parts.database.write() as session:
        access.revoke_token(session, token)
