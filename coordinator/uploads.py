"""A slice on its way in: spooled to disk while it is counted and hashed, then checked before it may count.

Nothing of it is believed: its length is bounded by what the job asked for, its header is read with limits, and its
numbers are looked at one tensor at a time.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from fastapi.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from coordinator.blobs import Blobs
from coordinator.jobs import Upload
from coordinator.reading import open_file, open_slice
from protocol import checks, errors


@dataclass(frozen=True)
class Spooled:
    """A body that came whole."""

    path: Path
    length: int
    digest: str


@asynccontextmanager
async def receive(
    stream: AsyncIterator[bytes], folder: Path, largest: int, announced: int | None, repr_digest: str | None
) -> AsyncIterator[Spooled]:
    """Spool a request's body; the file is gone when the block ends.

    Raises TooLarge as soon as more comes, or is announced, than an honest slice can have; TruncatedBody, DigestMismatch.
    """
    if announced is not None and announced > largest:
        raise errors.TooLarge(f"the body is announced with {announced} bytes; this job's slice has at most {largest}", largest=largest)
    wanted = _wanted(repr_digest)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="upload-") as file:
        hashed, length = hashlib.sha256(), 0
        try:
            async for chunk in stream:
                length += len(chunk)
                if length > largest:
                    raise errors.TooLarge(f"more than {largest} bytes came; this job's slice has no more", largest=largest)
                hashed.update(chunk)
                await run_in_threadpool(file.write, chunk)
        except ClientDisconnect:
            raise errors.TruncatedBody(f"the connection ended after {length} bytes; send the slice again") from None
        if announced is not None and length != announced:
            raise errors.TruncatedBody(f"{length} bytes came, {announced} were announced; send the slice again")
        if wanted is not None and hashed.digest() != wanted:
            raise errors.DigestMismatch(f"the bytes have SHA-256 {hashed.hexdigest()}, announced was {wanted.hex()}; send the slice again")
        await run_in_threadpool(file.flush)
        yield Spooled(path=Path(file.name), length=length, digest=f"sha256:{hashed.hexdigest()}")


def _wanted(repr_digest: str | None) -> bytes | None:
    """The SHA-256 that the sender announced (RFC 9530); other algorithms are passed over."""
    found = re.search(r"(?:^|,\s*)sha-256=:([A-Za-z0-9+/=]+):", repr_digest or "")
    if found is None:
        return None
    try:
        return base64.b64decode(found.group(1), validate=True)
    except binascii.Error:
        raise errors.InvalidRequest("Repr-Digest is not base64") from None


def check(spooled: Spooled, wanted: Upload, blobs: Blobs) -> float:
    """‖change‖_F of a slice that may count. Raises the kind of InvalidSlice that says why it may not."""
    with open_file(spooled.path, wanted.largest) as trained:
        checks.check_header(trained.header, wanted.expected)
        for module in wanted.expected.layout.modules:
            factors = trained.factors(module)
            checks.check_finite(f"factors/{module}/a", factors.a)
            checks.check_finite(f"factors/{module}/b", factors.b)
        for name in wanted.expected.layout.full:
            checks.check_finite(f"full/{name}", trained.full(name))
        norm = checks.check_change(trained.factors, open_slice(blobs, wanted.expected.base).factors, wanted.expected)
    if wanted.bound is not None and norm > wanted.bound:
        raise errors.ExcessiveChange(f"the change's norm is {norm:.6g}; the plan allows {wanted.bound:g}", norm=norm, bound=wanted.bound)
    return norm
