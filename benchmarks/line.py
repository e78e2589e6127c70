"""One agent's connection, as lean as it can be: thousands of them in one process shall not be what is measured."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from protocol import errors


@dataclass(frozen=True)
class Answer:
    """An answer, and when it was there."""

    status: int
    headers: dict[str, str]  # names in small letters
    body: bytes
    at: float  # of time.time()


class Line:
    """HTTP/1.1 over one connection that is kept, and made again where the other side has closed it."""

    def __init__(self, host: str, port: int, secret: str) -> None:
        self._place, self._secret = (host, port), secret
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
        """One request; its headers' names with _ for -. Raises Unavailable where no answer comes, twice."""
        lines = [f"{method} {path} HTTP/1.1", "Host: coordinator", f"Authorization: Bearer {self._secret}", f"Content-Length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        head = "\r\n".join([*lines, "", ""]).encode()
        for _ in range(2):  # a connection that was kept may have been closed meanwhile
            try:
                return await self._once(head, body)
            except (OSError, asyncio.IncompleteReadError):
                self.close()
        raise errors.Unavailable(f"{method} {path} was not answered")

    async def _once(self, head: bytes, body: bytes) -> Answer:
        if self._streams is None or self._streams[0].at_eof():
            self._streams = await asyncio.open_connection(*self._place)
        reader, writer = self._streams
        writer.write(head)
        writer.write(body)
        await writer.drain()
        first, *rest = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        at = time.time()
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest if line)}
        length = int(headers.get("content-length", "0"))
        return Answer(int(first.split(" ", 2)[1]), headers, await reader.readexactly(length) if length else b"", at)
