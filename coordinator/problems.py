"""Errors become RFC 9457 problems here, and nowhere else is a status of an error known."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError, OperationalError
from starlette.exceptions import HTTPException

from protocol import errors
from protocol.errors import HLoRAError
from protocol.messages import Problem

log = structlog.get_logger()
MEDIA_TYPE = "application/problem+json"
SCHEMAS = "#/components/schemas/"

# The nearest class of the tree counts: what is not named here has its parent's status.
STATUSES: Mapping[type[HLoRAError], HTTPStatus] = {
    HLoRAError: HTTPStatus.INTERNAL_SERVER_ERROR,
    errors.InvalidRequest: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.Unauthenticated: HTTPStatus.UNAUTHORIZED,
    errors.Forbidden: HTTPStatus.FORBIDDEN,
    errors.NotFound: HTTPStatus.NOT_FOUND,
    errors.MethodNotAllowed: HTTPStatus.METHOD_NOT_ALLOWED,
    errors.Conflict: HTTPStatus.CONFLICT,
    errors.Over: HTTPStatus.GONE,
    errors.OutdatedAgent: HTTPStatus.UPGRADE_REQUIRED,
    errors.TooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    errors.RangeNotSatisfiable: HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
    errors.TruncatedBody: HTTPStatus.BAD_REQUEST,
    errors.StalledBody: HTTPStatus.REQUEST_TIMEOUT,
    errors.InvalidSlice: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.UnmergeableRound: HTTPStatus.CONFLICT,
    errors.Unavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.InsufficientStorage: HTTPStatus.INSUFFICIENT_STORAGE,
    errors.Refusal: HTTPStatus.UNPROCESSABLE_ENTITY,
}
_HEADERS: Mapping[type[HLoRAError], Mapping[str, str]] = {
    errors.Unauthenticated: {"WWW-Authenticate": 'Bearer realm="hlora"'},
    errors.Unavailable: {"Retry-After": "2"},
    errors.StalledBody: {"Connection": "close"},  # the rest of the body may still come, for ever
}


def status(kind: type[HLoRAError]) -> HTTPStatus:
    """The HTTP status of an error's class."""
    return next(STATUSES[ancestor] for ancestor in kind.__mro__ if ancestor in STATUSES)


def problem(error: HLoRAError) -> Problem:
    """The problem that stands for an error on the wire."""
    kind = type(error)
    facts = {name: value for name, value in error.facts.items() if name not in Problem.model_fields}
    body = {"type": f"/problems/{kind.slug()}", "title": kind.title(), "status": status(kind), "detail": error.detail}
    return Problem.model_validate(body | {"retryable": kind.retryable} | facts)


def documented(*kinds: type[HLoRAError]) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's description of the problems that a route may answer with."""
    found: dict[int | str, dict[str, Any]] = {}
    for kind in kinds:
        entry = found.setdefault(int(status(kind)), {"description": "", "content": {MEDIA_TYPE: {"schema": {"$ref": f"{SCHEMAS}Problem"}}}})
        text = f"`{kind.slug()}`: {kind.title()}."
        entry["description"] = f"{entry['description']} {text}".strip()
    return dict(sorted(found.items(), key=lambda item: str(item[0])))


def binary(media_type: str) -> dict[str, Any]:
    """OpenAPI's description of a body of bytes."""
    return {media_type: {"schema": {"type": "string", "format": "binary"}}}


def answer(error: HLoRAError) -> JSONResponse:
    """The HTTP answer of an error."""
    headers = {name: value for kind, extra in _HEADERS.items() if isinstance(error, kind) for name, value in extra.items()}
    body = problem(error).model_dump(mode="json")
    headers["Link"] = f'<{body["type"]}>; rel="type"'  # all that an answer to HEAD, which has no body, can say
    return JSONResponse(body, status_code=int(status(type(error))), headers=headers, media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Make every refusal of the application a problem, whoever raised it, and describe problems in its OpenAPI document."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        document = plain()
        document["components"]["schemas"]["Problem"] = Problem.model_json_schema(ref_template=SCHEMAS + "{model}")
        return document

    app.openapi = described  # type: ignore[method-assign]  # FastAPI's own way to extend the document
    app.add_exception_handler(HLoRAError, _of_ours)
    app.add_exception_handler(RequestValidationError, _of_validation)
    app.add_exception_handler(HTTPException, _of_framework)
    app.add_exception_handler(OperationalError, _of_database)
    app.add_exception_handler(DataError, _of_data)
    app.add_exception_handler(Exception, _of_defect)


async def _of_ours(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HLoRAError)
    if isinstance(error, errors.Unavailable):  # nobody's fault who asked: the operator must know
        log.warning("unavailable", method=request.method, path=request.url.path, reason=str(error))
    return answer(error)


async def _of_validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = [
        {"where": ".".join(str(part) for part in fault["loc"][:12])[:300], "what": str(fault["msg"])[:500]} for fault in error.errors()[:20]
    ]
    first = found[0] if found else {"where": "body", "what": "is missing"}
    kind = errors.InvalidPlan if request.url.path == "/v1/runs" else errors.InvalidRequest
    return answer(kind(f"{first['where']}: {first['what']}", faults=found))


_FRAMEWORK: Mapping[int, type[HLoRAError]] = {404: errors.NotFound, 405: errors.MethodNotAllowed, 413: errors.TooLarge}


async def _of_framework(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, HLoRAError):  # the framework wraps what it met while it read the body
        return answer(error.__cause__)
    response = answer(_FRAMEWORK.get(error.status_code, errors.InvalidRequest)(f"{error.detail}; the routes are listed at /docs"))
    response.headers.update(error.headers or {})
    return response


async def _of_database(_: Request, error: Exception) -> JSONResponse:
    log.warning("database-unavailable", reason=str(error))
    if isinstance(error, OperationalError) and _is_full(error):
        return answer(errors.InsufficientStorage("the database's disk is full; try again when there is room"))
    return answer(errors.Unavailable("the database does not answer now; try again"))


def _is_full(error: OperationalError) -> bool:
    """Whether SQLite or PostgreSQL says that its disk is full."""
    return getattr(error.orig, "sqlite_errorname", None) == "SQLITE_FULL" or getattr(error.orig, "sqlstate", None) == "53100"


async def _of_data(_: Request, error: Exception) -> JSONResponse:
    log.info("value-refused-by-database", reason=type(error).__name__)
    return answer(errors.InvalidRequest("a value cannot be stored: it is out of range or holds a character that text may not have"))


async def _of_defect(request: Request, error: Exception) -> JSONResponse:
    log.error("defect", method=request.method, path=request.url.path, exc_info=error)
    return answer(errors.InternalError("the coordinator met a defect; its log has the trace"))
