"""What an answer of the coordinator means: a message, or the error that the coordinator raised."""

from __future__ import annotations

import re
from typing import TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from protocol import VERSION, errors
from protocol.messages import Problem

Body = TypeVar("Body", bound=BaseModel)
NAMED = re.compile(r'</problems/([a-z-]+)>; rel="type"')  # all that an answer to HEAD, which has no body, says of its reason
BY_STATUS = {
    401: errors.Unauthenticated,
    403: errors.Forbidden,
    404: errors.NotFound,
    408: errors.StalledBody,
    413: errors.TooLarge,
}


def refusal(response: httpx.Response) -> errors.HLoRAError:
    """The error that an answer stands for. Answers that are no problem, such as a proxy's, are judged by their status."""
    after = seconds_after(response)
    facts: dict[str, object] = {} if after is None else {"retry_after": after}
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        if named := NAMED.match(response.headers.get("Link", "")):
            return errors.by_slug(named[1])("", **facts)
        return _strange(response)(
            f"{response.request.url} answered {response.status_code} without a reason; is the address right?", **facts
        )
    told = {name: fact for name, fact in (problem.model_extra or {}).items() if name not in ("self", "detail")}
    return errors.by_slug(problem.type.rpartition("/")[2])(problem.detail, **{**told, **facts, "retryable": problem.retryable})


def _strange(response: httpx.Response) -> type[errors.HLoRAError]:
    if response.status_code >= 500 or response.status_code == 429:
        return errors.Unavailable
    return BY_STATUS.get(response.status_code, errors.HLoRAError)


def seconds_after(response: httpx.Response) -> float | None:
    """The seconds of `Retry-After`, if it is there as a number."""
    text = response.headers.get("Retry-After", "")
    return float(text) if text.replace(".", "", 1).isdigit() else None


def read(response: httpx.Response, kind: type[Body]) -> Body:
    """An answer's body as a message. Raises OutdatedAgent if it is another one than this agent knows."""
    try:
        return kind.model_validate_json(response.content)
    except ValidationError as error:
        raise errors.OutdatedAgent(
            f"this agent ({VERSION}) does not understand the answer of {response.request.url} ({error.error_count()} differences "
            f"from {kind.__name__}); update the agent, or check the address"
        ) from None
