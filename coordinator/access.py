"""Who is calling: secrets, and what each kind of them may do.

A secret is 256 random bits behind a prefix that names its kind. Only its SHA-256 is stored, so a stolen database opens
no door, and looking a digest up takes the same time whatever the caller guessed.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from coordinator import paging
from coordinator.tables import Client, Enrolment, Token
from protocol import errors
from protocol.states import ClientState, Role
from protocol.views import Page, TokenMade, TokenRequest, TokenView


class Kind(StrEnum):
    """The kinds of credentials; the values are what their secrets begin with."""

    admin = "hla"
    viewer = "hlv"
    enrolment = "hle"
    client = "hlc"


@dataclass(frozen=True)
class Caller:
    """Whose credential a request carries."""

    kind: Kind
    id: str
    name: str


def new_id(kind: str) -> str:
    """An identifier that tells what it names and nothing else."""
    return f"{kind}-{secrets.token_hex(8)}"


def new_secret(kind: Kind) -> str:
    """A fresh secret of a kind."""
    return f"{kind.value}_{secrets.token_urlsafe(32)}"


def digest(secret: str) -> str:
    """What is stored of a secret."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def identify(session: Session, secret: str | None, allowed: Collection[Kind]) -> Caller:
    """The caller behind a secret.

    Raises Unauthenticated where there is none, nobody issued it, or it was revoked; Forbidden where its kind is not allowed.
    """
    if not secret:
        raise errors.Unauthenticated("send a credential as `Authorization: Bearer …`")
    caller = _find(session, secret)
    if caller is None:
        raise errors.Unauthenticated("nobody issued this credential, or it was revoked")
    if caller.kind not in allowed:
        wanted = " or ".join(kind.name for kind in allowed)
        article = "an" if caller.kind.name[0] in "ae" else "a"
        raise errors.Forbidden(f"this is for {wanted} credentials; yours is {article} {caller.kind.name} credential", role=caller.kind.name)
    return caller


_CLIENT = select(Client.id, Client.name).where(Client.digest == bindparam("digest"), Client.state != ClientState.revoked)


def _find(session: Session, secret: str) -> Caller | None:
    stored = digest(secret)
    match secret.partition("_")[0]:
        case Kind.client:
            client = session.connection().execute(_CLIENT, {"digest": stored}).first()
            return None if client is None else Caller(Kind.client, client.id, client.name)
        case Kind.enrolment:
            enrolment = session.scalar(select(Enrolment).where(Enrolment.digest == stored))
            return None if enrolment is None else Caller(Kind.enrolment, enrolment.id, enrolment.id)
        case Kind.admin | Kind.viewer:
            token = session.scalar(select(Token).where(Token.digest == stored, Token.revoked.is_(False)))
            return None if token is None else Caller(Kind.admin if token.role == Role.admin else Kind.viewer, token.id, token.name)
    return None


def make_token(session: Session, request: TokenRequest, now: datetime) -> TokenMade:
    """A new operator's token; the secret is told only here."""
    secret = new_secret(Kind.admin if request.role is Role.admin else Kind.viewer)
    token = Token(id=new_id("token"), name=request.name, role=request.role, digest=digest(secret), created_at=now, revoked=False)
    session.add(token)
    return TokenMade(**_view(token).model_dump(), token=secret)


def list_tokens(session: Session, cursor: str | None, limit: int) -> Page[TokenView]:
    """Operators' tokens, newest first, without their secrets."""
    return paging.page(session, select(Token), Token.created_at, Token.id, cursor, limit, _view)


def revoke_token(session: Session, id: str) -> None:
    """Void a token at once. Raises NotFound."""
    token = session.get(Token, id)
    if token is None:
        raise errors.NotFound(f"there is no token {id}")
    token.revoked = True


def stands(session: Session, token: str) -> bool:
    """Whether an operator's token was not revoked since."""
    return session.scalar(select(Token.id).where(Token.id == token, Token.revoked.is_(False))) is not None


def _view(token: Token) -> TokenView:
    return TokenView(id=token.id, name=token.name, role=Role(token.role), created_at=token.created_at, revoked=token.revoked)
