"""The coordinator as the agent sees it: one method per route; a problem becomes the error that the coordinator raised.

Every request may be repeated and is, after a failure that may pass, with growing random pauses.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
from pydantic import BaseModel, SecretStr

from agent.answers import read, seconds_after
from agent.connection import ANSWER_SECONDS, BRIEF, ONCE, Connection, Retry
from agent.downloads import Download, Moved, silent
from agent.transfers import PART, Upload
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


class Client(Connection):
    """The connection to one coordinator, with a method for each route."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def enrol(self, token: SecretStr, enrol: Enrol) -> Enrolled:
        """Redeem an enrolment token; without a key of our own once, for a second try would use the token up again."""
        response = await self._send("POST", "/v1/clients", body=enrol, credential=token, retry=BRIEF if enrol.key else ONCE)
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

    async def blob(self, ref: BlobRef, file: Path, moved: Moved = silent) -> int:
        """Fetch immutable bytes into a file, which is there only when it is whole and right; gives the bytes that travelled."""
        return await Download(self, ref, file, moved).run()

    async def renew(self, job: str, progress: Progress) -> Renewal:
        """Keep the lease, and say how far the work is."""
        return read(await self._send("POST", f"/v1/jobs/{job}/lease", body=progress, retry=BRIEF), Renewal)

    async def give_back(self, job: str, given: GiveBack) -> None:
        """Give the job back, with the reason."""
        await self._send("DELETE", f"/v1/jobs/{job}/lease", body=given, retry=BRIEF)

    async def put_slice(
        self, job: str, epoch: int, ref: BlobRef, file: Path, moved: Moved = silent, *, again: bool = False, part: int = PART
    ) -> SliceReceipt:
        """Send the trained slice, so many bytes first; `again` if some of it may be there already."""
        return await Upload(self, f"/v1/jobs/{job}/slice", epoch, ref, file, moved, again, part).run()

    async def put_result(self, job: str, result: Result) -> ResultReceipt:
        """Answer the job."""
        return read(await self._send("PUT", f"/v1/jobs/{job}/result", body=result), ResultReceipt)

    async def _send(
        self,
        method: str,
        path: str,
        *,
        body: BaseModel | None = None,
        headers: dict[str, str] | None = None,
        credential: SecretStr | None = None,
        patience: float = ANSWER_SECONDS,
        retry: Retry | None = None,
    ) -> httpx.Response:
        async def once() -> httpx.Response:
            return await self.once(method, path, body=body, headers=headers, credential=credential, patience=patience)

        return await self.repeat(once, retry)
