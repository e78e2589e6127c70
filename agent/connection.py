"""Requests to one coordinator: sent with the credential, and repeated after a failure that may pass.

Knows no routes. What is repeated gives up after so many attempts in a row that brought nothing: as long as something
moves, a bad link is only a slow one.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
from pydantic import BaseModel, SecretStr

from agent.answers import refusal
from protocol import VERSION, errors
from protocol.addresses import check_transport, trusting

T = TypeVar("T")
ANSWER_SECONDS = 30.0  # for an ordinary answer, and for any block of bytes to move


@dataclass(frozen=True)
class Retry:
    """How many attempts in a row may fail, and how long to wait in between: a random time below base · 2ⁿ, at most longest."""

    attempts: int = 6
    base_seconds: float = 0.5
    longest_seconds: float = 30.0


PATIENT = Retry()
ONCE = Retry(attempts=1)
BRIEF = Retry(attempts=2)  # for what is worth little later


class Connection:
    """The way to one coordinator. Network and time are whatever it is built with."""

    def __init__(
        self,
        url: str,
        credential: SecretStr | None = None,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        insecure: bool = False,
        ca_file: Path | None = None,
        proxy: str | None = None,
        retry: Retry = PATIENT,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        chance: random.Random | None = None,
    ) -> None:
        self._allowing = None if insecure else "HLORA_AGENT_INSECURE"
        check_transport(url, travelling="credential", allowing=self._allowing)
        self.url = url
        self._credential = credential
        self._retry = retry
        self._sleep = sleep
        self._chance = chance or random.Random()
        self._http = httpx.AsyncClient(
            base_url=url,
            transport=transport,
            verify=True if ca_file is None else trusting(ca_file, variable="HLORA_AGENT_CA_FILE"),
            proxy=proxy,
            trust_env=False,
            headers={"Hlora-Version": VERSION},
            timeout=httpx.Timeout(ANSWER_SECONDS, connect=10.0),
        )

    async def close(self) -> None:
        """Let go of the network."""
        await self._http.aclose()

    def _headers(self, credential: SecretStr | None = None) -> dict[str, str]:
        secret = credential or self._credential
        return {"Authorization": f"Bearer {secret.get_secret_value()}"} if secret else {}

    async def once(
        self,
        method: str,
        path: str,
        *,
        body: BaseModel | None = None,
        content: AsyncIterator[bytes] | None = None,
        headers: dict[str, str] | None = None,
        credential: SecretStr | None = None,
        patience: float = ANSWER_SECONDS,
    ) -> httpx.Response:
        """One request, tried once; its answer may take `patience` seconds. Raises what was refused, and httpx's TransportError."""
        response = await self._http.request(
            method,
            path,
            json=body.model_dump(mode="json") if body else None,
            content=content,
            headers={**self._headers(credential), **(headers or {})},
            timeout=httpx.Timeout(ANSWER_SECONDS, read=patience, connect=10.0),
        )
        if not response.is_success:
            raise refusal(response)
        return response

    def stream(self, path: str, headers: dict[str, str]) -> AbstractAsyncContextManager[httpx.Response]:
        """A body that is read as it comes."""
        return self._http.stream("GET", path, headers={**self._headers(), **headers})

    @asynccontextmanager
    async def elsewhere(
        self,
        method: str,
        address: str,
        headers: dict[str, str],
        content: AsyncIterator[bytes] | None = None,
        patience: float = ANSWER_SECONDS,
    ) -> AsyncIterator[httpx.Response]:
        """What another host answers; our credential does not go there. Raises Unavailable, and never tells the address."""
        timeout = httpx.Timeout(ANSWER_SECONDS, read=patience, connect=10.0)
        try:
            check_transport(address, travelling="slice", allowing=self._allowing)
            async with self._http.stream(method, address, headers=headers, content=content, timeout=timeout) as response:
                if not response.is_success:
                    raise errors.Unavailable(f"the object store answered {response.status_code}; the coordinator is asked instead")
                yield response
        except (errors.InsecureTransport, errors.InvalidRequest):
            raise errors.Unavailable("the object store's address is not HTTPS; the coordinator is asked instead") from None
        except httpx.TransportError as error:
            raise errors.Unavailable(
                f"the object store does not answer ({type(error).__name__}); the coordinator is asked instead"
            ) from error

    async def repeat(self, once: Callable[[], Awaitable[T]], retry: Retry | None = None, moved: Callable[[], int] = lambda: 0) -> T:
        """The answer in the end. An attempt after which `moved` is larger than ever before does not count as failed.

        Raises the last failure when it cannot pass, or nothing has moved for too many attempts.
        """
        retry, attempt, furthest = retry or self._retry, 0, moved()
        while True:
            try:
                return await once()
            except httpx.TransportError as error:
                failure: errors.HLoRAError = errors.Unavailable(
                    f"{self.url} does not answer ({type(error).__name__}: {error}); check the address, the network and the proxy"
                )
            except errors.HLoRAError as error:
                failure = error
            attempt, furthest = (1 if moved() > furthest else attempt + 1), max(furthest, moved())
            if attempt >= retry.attempts or not may_pass(failure):
                raise failure
            asked = failure.facts.get("retry_after")
            growing = self._chance.uniform(0, min(retry.longest_seconds, retry.base_seconds * 2**attempt))
            await self._sleep(max(growing, asked if isinstance(asked, float) else 0.0))


def may_pass(failure: errors.HLoRAError) -> bool:
    """Whether the same request may succeed later."""
    return bool(failure.facts.get("retryable", failure.retryable))
