"""The coordinator as the agent sees it: one method per route; a problem becomes the error that the coordinator raised.

Every request but enrolment may be repeated and is, after a failure that may pass, with growing random pauses.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import ipaddress
import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import httpx
from pydantic import BaseModel, SecretStr

from agent.answers import read, refusal, seconds_after
from protocol import VERSION, errors
from protocol.messages import (
    BlobRef,
    ClientSelf,
    Enrol,
    Enrolled,
    GiveBack,
    Job,
    Profile,
    Progress,
    Renewal,
    Result,
    ResultReceipt,
    SliceReceipt,
)

T = TypeVar("T")
BLOCK = 1 << 20  # bytes of a file read or written at a time
CHECKING_SECONDS = 300.0  # the coordinator checks and stores a whole slice before it answers


@dataclass(frozen=True)
class Retry:
    """How often a request is tried, and how long to wait in between: a random time below base · 2ⁿ, at most longest."""

    attempts: int = 6
    base_seconds: float = 0.5
    longest_seconds: float = 30.0


PATIENT = Retry()
ONCE = Retry(attempts=1)
BRIEF = Retry(attempts=2)  # for what is worth little later


def check_transport(url: str, *, insecure: bool) -> None:
    """Raises InsecureTransport if a credential sent there could be read on the way, unless that is allowed.

    Raises InvalidRequest for what is no address.
    """
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL:
        address = httpx.URL()
    if address.scheme not in ("http", "https") or not address.host:
        raise errors.InvalidRequest(f"{url!r} is no address of a coordinator, such as https://hlora.example.org or http://127.0.0.1:8080")
    if address.scheme == "https" or insecure or _loopback(address.host):
        return
    raise errors.InsecureTransport(
        f"{url} is not HTTPS, so the credential would travel in the clear; use https, or allow it with HLORA_AGENT_INSECURE=1"
    )


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Client:
    """One connection to one coordinator. Network and time are whatever it is built with."""

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
        check_transport(url, insecure=insecure)
        self.url = url
        self._credential = credential
        self._retry = retry
        self._sleep = sleep
        self._chance = chance or random.Random()
        self._http = httpx.AsyncClient(
            base_url=url,
            transport=transport,
            verify=True if ca_file is None else ssl.create_default_context(cafile=ca_file),
            proxy=proxy,
            trust_env=False,
            headers={"Hlora-Version": VERSION},
            timeout=httpx.Timeout(30.0, connect=10.0),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._http.aclose()

    async def enrol(self, token: SecretStr, enrol: Enrol) -> Enrolled:
        """Redeem an enrolment token. Tried once: a second try would use the token up again."""
        response = await self._send("POST", "/v1/clients", body=enrol, credential=token, retry=ONCE)
        return read(response, Enrolled)

    async def me(self) -> ClientSelf:
        """What the coordinator knows of this client."""
        return read(await self._send("GET", "/v1/clients/me"), ClientSelf)

    async def put_profile(self, profile: Profile) -> ClientSelf:
        """Replace the profile."""
        return read(await self._send("PUT", "/v1/clients/me/profile", body=profile), ClientSelf)

    async def next_job(self, wait_seconds: float) -> Job | float:
        """The next job; or, where there is none, the seconds after which to ask again."""
        headers = {"Prefer": f"wait={int(wait_seconds)}"}
        response = await self._send("POST", "/v1/jobs/next", headers=headers, patience=wait_seconds + 30.0)
        return seconds_after(response) or 0.0 if response.status_code == 204 else read(response, Job)

    async def blob(self, ref: BlobRef, file: Path) -> None:
        """Fetch immutable bytes into a file, which is there only when it is whole and its digest is right."""

        async def once() -> None:
            part = file.with_name(file.name + ".part")
            async with self._http.stream("GET", f"/v1/blobs/{ref.digest}", headers=self._headers()) as response:
                if not response.is_success:
                    await response.aread()
                    raise refusal(response)
                await _receive(response, ref, part)
            part.replace(file)

        await self._repeat(once, self._retry)

    async def renew(self, job: str, progress: Progress) -> Renewal:
        """Keep the lease, and say how far the work is."""
        return read(await self._send("POST", f"/v1/jobs/{job}/lease", body=progress, retry=BRIEF), Renewal)

    async def give_back(self, job: str, given: GiveBack) -> None:
        """Give the job back, with the reason."""
        await self._send("DELETE", f"/v1/jobs/{job}/lease", body=given, retry=BRIEF)

    async def put_slice(self, job: str, epoch: int, ref: BlobRef, file: Path) -> SliceReceipt:
        """Send the trained slice."""
        code = base64.b64encode(bytes.fromhex(ref.digest.removeprefix("sha256:"))).decode()
        headers = {
            "Lease-Epoch": str(epoch),
            "Content-Length": str(ref.bytes),
            "Content-Type": "application/octet-stream",
            "Repr-Digest": f"sha-256=:{code}:",
        }
        response = await self._send("PUT", f"/v1/jobs/{job}/slice", headers=headers, file=file, patience=CHECKING_SECONDS)
        return read(response, SliceReceipt)

    async def put_result(self, job: str, result: Result) -> ResultReceipt:
        """Answer the job."""
        return read(await self._send("PUT", f"/v1/jobs/{job}/result", body=result), ResultReceipt)

    def _headers(self, credential: SecretStr | None = None) -> dict[str, str]:
        secret = credential or self._credential
        return {"Authorization": f"Bearer {secret.get_secret_value()}"} if secret else {}

    async def _send(
        self,
        method: str,
        path: str,
        *,
        body: BaseModel | None = None,
        file: Path | None = None,
        headers: dict[str, str] | None = None,
        credential: SecretStr | None = None,
        patience: float = 30.0,
        retry: Retry | None = None,
    ) -> httpx.Response:
        async def once() -> httpx.Response:
            response = await self._http.request(
                method,
                path,
                json=body.model_dump(mode="json") if body else None,
                content=_blocks(file) if file else None,
                headers={**self._headers(credential), **(headers or {})},
                timeout=httpx.Timeout(patience, connect=10.0),
            )
            if not response.is_success:
                raise refusal(response)
            return response

        return await self._repeat(once, retry or self._retry)

    async def _repeat(self, once: Callable[[], Awaitable[T]], retry: Retry) -> T:
        for attempt in range(1, retry.attempts + 1):
            try:
                return await once()
            except httpx.TransportError as error:
                failure: errors.HLoRAError = errors.Unavailable(
                    f"{self.url} does not answer ({type(error).__name__}: {error}); check the address, the network and the proxy"
                )
            except errors.HLoRAError as error:
                failure = error
            if attempt == retry.attempts or not failure.facts.get("retryable", failure.retryable):
                raise failure
            asked = failure.facts.get("retry_after")
            growing = self._chance.uniform(0, min(retry.longest_seconds, retry.base_seconds * 2**attempt))
            await self._sleep(max(growing, asked if isinstance(asked, float) else 0.0))
        raise AssertionError("a request is tried at least once")


async def _blocks(file: Path) -> AsyncIterator[bytes]:
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            yield block


async def _receive(response: httpx.Response, ref: BlobRef, part: Path) -> None:
    """Write a body to a file; raises DigestMismatch unless it is exactly what was announced."""
    seen, count = hashlib.sha256(), 0
    with part.open("wb") as stream:
        async for block in response.aiter_bytes(BLOCK):
            count += len(block)
            if count > ref.bytes:
                break
            seen.update(block)
            stream.write(block)
    if count != ref.bytes or f"sha256:{seen.hexdigest()}" != ref.digest:
        raise errors.DigestMismatch(f"{ref.digest} should have {ref.bytes} bytes; {count} came, or their digest is another")
