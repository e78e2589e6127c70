"""The coordinator as an operator sees it: one method per route; a problem becomes the error that the coordinator raised.

Nothing is repeated here: an operator is told at once, and `runs create` has its idempotency key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeVar

import httpx
from pydantic import BaseModel, SecretStr, TypeAdapter, ValidationError

from admin.download import Download
from protocol import VERSION, errors
from protocol.addresses import check_transport, loopback, trusting
from protocol.messages import Problem
from protocol.plan import Plan
from protocol.views import (
    ClientChange,
    ClientChanged,
    ClientView,
    Description,
    EnrolmentMade,
    EnrolmentRequest,
    EnrolmentView,
    Health,
    Page,
    QuarantineView,
    RoundSummary,
    RoundView,
    RunDetail,
    RunView,
    TokenMade,
    TokenRequest,
    TokenView,
)

T = TypeVar("T")
Row = TypeVar("Row", bound=BaseModel)
TIMEOUT = httpx.Timeout(60.0, connect=10.0)
PAGE = 200  # rows asked for at a time


class Client:
    """One connection to one coordinator; `transport` is the network unless another is given."""

    def __init__(
        self,
        url: str,
        token: SecretStr | None = None,
        *,
        insecure: bool = False,
        ca_file: Path | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Raises InsecureTransport if the token could be read on the way, unless that is allowed."""
        check_transport(url, travelling="token", allowing=None if insecure else "HLORA_INSECURE")
        self._url = url
        headers = {"Hlora-Version": VERSION} | ({"Authorization": f"Bearer {token.get_secret_value()}"} if token else {})
        verify = True if ca_file is None else trusting(ca_file, variable="HLORA_CA_FILE")
        # A proxy that the environment names is for other machines, even where it forgets to say so.
        own = loopback(httpx.URL(url).host)
        self._http = httpx.Client(base_url=url, headers=headers, verify=verify, timeout=TIMEOUT, transport=transport, trust_env=not own)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.close()

    def health(self) -> Health:
        """Whether coordinator, database and blob store answer."""
        return self._get("/readyz", Health)

    def create_run(self, plan: Plan, key: str | None = None) -> RunDetail:
        """Start a run; with the same key again, the run that the first request made."""
        return self._send("POST", "/v1/runs", RunDetail, body=plan, headers={"Idempotency-Key": key} if key else None)

    def runs(self) -> Iterator[RunView]:
        """All runs, newest first."""
        return self._pages("/v1/runs", Page[RunView])

    def run(self, run: str) -> RunDetail:
        """A run with its plan."""
        return self._get(f"/v1/runs/{run}", RunDetail)

    def change_run(self, run: str, verb: Literal["pause", "resume", "stop"]) -> RunView:
        """Pause, resume or stop a run."""
        return self._send("POST", f"/v1/runs/{run}/{verb}", RunView)

    def rounds(self, run: str) -> Iterator[RoundSummary]:
        """A run's rounds with all their attempts, oldest first."""
        return self._pages(f"/v1/runs/{run}/rounds", Page[RoundSummary])

    def round(self, run: str, number: int, attempt: int | None = None) -> RoundView:
        """One attempt at a round, whole; by default the last one."""
        return self._get(f"/v1/runs/{run}/rounds/{number}", RoundView, attempt=attempt)

    @contextmanager
    def adapter(self, run: str, **wanted: float | None) -> Iterator[Download]:
        """A published adapter as a PEFT folder in a zip archive; wanted: round, rank, kept, uniform."""
        with self._stream(f"/v1/runs/{run}/adapter", _given(**wanted)) as response:
            length = response.headers.get("Content-Length")
            yield Download(int(length) if length else None, response.iter_bytes())

    def clients(self) -> Iterator[ClientView]:
        """All clients, newest first."""
        return self._pages("/v1/clients", Page[ClientView])

    def client(self, client: str) -> ClientView:
        """One client."""
        return self._get(f"/v1/clients/{client}", ClientView)

    def change_client(self, client: str, change: ClientChange) -> ClientChanged:
        """Set labels, pause, reinstate, revoke, or rotate the credential."""
        return self._send("PATCH", f"/v1/clients/{client}", ClientChanged, body=change)

    def quarantine(self, run: str | None = None, client: str | None = None) -> Iterator[QuarantineView]:
        """Contributions that were set apart, newest first; of a run, of a client, or all."""
        return self._pages("/v1/quarantine", Page[QuarantineView], run=run, client=client)

    def quarantined(self, contribution: str) -> QuarantineView:
        """One contribution that was set apart."""
        return self._get(f"/v1/quarantine/{contribution}", QuarantineView)

    def quarantined_slice(self, contribution: str) -> Iterator[bytes]:
        """The bytes of a contribution that was set apart, piece by piece."""
        with self._stream(f"/v1/quarantine/{contribution}/slice") as response:
            yield from response.iter_bytes()

    def delete_quarantined(self, contribution: str) -> None:
        """Forget a contribution that was set apart."""
        self._answer("DELETE", f"/v1/quarantine/{contribution}")

    def make_enrolment(self, request: EnrolmentRequest) -> EnrolmentMade:
        """Make an enrolment token."""
        return self._send("POST", "/v1/enrolments", EnrolmentMade, body=request)

    def enrolments(self) -> Iterator[EnrolmentView]:
        """Enrolment tokens, newest first, without the tokens."""
        return self._pages("/v1/enrolments", Page[EnrolmentView])

    def revoke_enrolment(self, enrolment: str) -> None:
        """Void an enrolment token."""
        self._answer("DELETE", f"/v1/enrolments/{enrolment}")

    def make_token(self, request: TokenRequest) -> TokenMade:
        """Make an operator's token."""
        return self._send("POST", "/v1/tokens", TokenMade, body=request)

    def tokens(self) -> Iterator[TokenView]:
        """Operators' tokens, newest first, without the tokens."""
        return self._pages("/v1/tokens", Page[TokenView])

    def revoke_token(self, token: str) -> None:
        """Void an operator's token."""
        self._answer("DELETE", f"/v1/tokens/{token}")

    def strategies(self) -> list[Description]:
        """The strategies that a plan may name."""
        return self._get("/v1/strategies", list[Description])

    def rank_policies(self) -> list[Description]:
        """The rank policies that a plan may name."""
        return self._get("/v1/rank-policies", list[Description])

    def _get(self, path: str, kind: type[T], **parameters: int | str | None) -> T:
        return _read(self._answer("GET", path, params=_given(**parameters)), kind)

    def _send(self, method: str, path: str, kind: type[T], *, body: BaseModel | None = None, headers: Mapping[str, str] | None = None) -> T:
        content = body.model_dump_json() if body else None
        return _read(self._answer(method, path, content=content, headers={"Content-Type": "application/json", **(headers or {})}), kind)

    def _pages(self, path: str, kind: type[Page[Row]], **parameters: str | None) -> Iterator[Row]:
        cursor: str | None = None
        while True:
            page = self._get(path, kind, cursor=cursor, limit=PAGE, **parameters)
            yield from page.items
            cursor = page.next
            if cursor is None:
                return

    def _answer(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, float | str] | None = None,
        content: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        with self._reaching():
            response = self._http.request(method, path, params=params, content=content, headers=headers)
        if not response.is_success:
            raise _refusal(response)
        return response

    @contextmanager
    def _stream(self, path: str, params: Mapping[str, float | str] | None = None) -> Iterator[httpx.Response]:
        with self._reaching(), self._http.stream("GET", path, params=params) as response:
            if not response.is_success:
                response.read()
                raise _refusal(response)
            yield response

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            raise errors.Unavailable(f"{self._url} does not answer ({reason}); is the coordinator running, is HLORA_URL right?") from None


def _given(**parameters: float | str | None) -> dict[str, float | str]:
    return {name: value for name, value in parameters.items() if value is not None}


def _refusal(response: httpx.Response) -> errors.HLoRAError:
    """The error that an answer stands for; one that is no problem, such as a proxy's, is judged by its status."""
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        kind = errors.Unavailable if response.status_code in (429, 502, 503, 504) else errors.HLoRAError
        return kind(f"{response.request.url} answered {response.status_code} without a reason; is HLORA_URL the coordinator's address?")
    told = {name: fact for name, fact in (problem.model_extra or {}).items() if name not in ("self", "detail")}
    return errors.by_slug(problem.type.rpartition("/")[2])(problem.detail, **told)


def _read(response: httpx.Response, kind: type[T]) -> T:
    try:
        return TypeAdapter(kind).validate_json(response.content)
    except ValidationError:
        raise errors.HLoRAError(
            f"this command ({VERSION}) does not understand the answer of {response.request.url}; it and the coordinator have other "
            "versions, or HLORA_URL is another service's"
        ) from None
