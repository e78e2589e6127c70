"""A bucket in this process: as much of S3 over HTTP as the blob store asks for.

It checks no signature. Objects are whole or not there at all, as with the real one.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 2  # objects per page of a list: few, so that tests see several


@dataclass
class Bucket:
    """What lies in a bucket, by key; and uploads in several parts that are not complete."""

    url: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=count)
    asked: list[str] = field(default_factory=list)  # method, key and range of what was read
    together: threading.Barrier | None = None  # so many are read at the same moment, or none
    signed: list[Mapping[str, str]] = field(default_factory=list)  # headers of what came to signed addresses, names in small letters
    closed: bool = False  # signed addresses are good no more
    cuts: Iterator[int] = field(default_factory=lambda: iter(()))  # after how many bytes each answer to them breaks off


def settings(bucket: Bucket) -> dict[str, str]:
    """The environment in which the store finds the bucket."""
    account = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing", "AWS_REGION": "us-east-1"}
    return {"AWS_ENDPOINT": bucket.url, "AWS_ALLOW_HTTP": "true", "NO_PROXY": "127.0.0.1", **account}


@contextmanager
def bucket() -> Iterator[Bucket]:
    """A bucket that is served while the block lasts, at its `url`, under the name `bucket`."""
    found = Bucket()

    class Handler(_Handler):
        bucket = found

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    bucket: Bucket
    protocol_version = "HTTP/1.1"
    cut: int | None = None  # bytes of this answer's body

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""

    def _asked(self) -> tuple[str, dict[str, str], bytes]:
        """The key, the query and the body."""
        found = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(found.query, keep_blank_values=True).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return unquote(found.path).removeprefix("/bucket").lstrip("/"), query, body

    def _answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: self.cut])
        if self.cut is not None:
            self.close_connection = True

    def _may_pass(self) -> bool:
        """Whether a signed address is good; who came to it is noted."""
        self.bucket.signed.append({name.lower(): value for name, value in self.headers.items()})
        return not self.bucket.closed

    def do_PUT(self) -> None:
        key, query, body = self._asked()
        if "X-Amz-Signature" in query and not self._may_pass():
            self._answer(403)
            return
        if "uploadId" in query:
            self.bucket.uploads[query["uploadId"]][int(query["partNumber"])] = body
        else:
            self.bucket.objects[key] = body
        self._answer(200, ETag=_etag(body))

    def do_POST(self) -> None:
        key, query, body = self._asked()
        if "delete" in query:
            names = re.findall(r"<Key>([^<]*)</Key>", body.decode())
            for name in names:
                self.bucket.objects.pop(name, None)
            gone = "".join(f"<Deleted><Key>{name}</Key></Deleted>" for name in names)
            self._answer(200, f"<DeleteResult>{gone}</DeleteResult>".encode())
        elif "uploads" in query:
            number = str(next(self.bucket.numbers))
            self.bucket.uploads[number] = {}
            self._answer(200, f"<InitiateMultipartUploadResult><UploadId>{number}</UploadId></InitiateMultipartUploadResult>".encode())
        else:
            parts = self.bucket.uploads.pop(query["uploadId"])
            self.bucket.objects[key] = b"".join(parts[number] for number in sorted(parts))
            self._answer(200, b'<CompleteMultipartUploadResult><ETag>"whole"</ETag></CompleteMultipartUploadResult>')

    def do_GET(self) -> None:
        key, query, _ = self._asked()
        self.cut = next(self.bucket.cuts, None) if "X-Amz-Signature" in query else None
        if "list-type" in query:
            return self._list(query)
        if "X-Amz-Signature" in query and not self._may_pass():
            return self._answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        self.bucket.asked.append(f"{self.command} {key} {self.headers.get('Range', '')}")
        if self.bucket.together is not None:
            self.bucket.together.wait(timeout=30)
        if key not in self.bucket.objects:
            return self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        data = self.bucket.objects[key]
        about = {"ETag": _etag(data), "Last_Modified": formatdate(usegmt=True)}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self._answer(200, data, **about)
        start, stop = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
        if start >= len(data):
            return self._answer(416)
        return self._answer(206, data[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{len(data)}", **about)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _list(self, query: dict[str, str]) -> None:
        """A page of keys, beginning behind the token that the page before gave; all of them were put just now."""
        now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        after = query.get("continuation-token", "")
        keys = sorted(key for key in self.bucket.objects if key.startswith(query.get("prefix", "")) and key > after)
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.bucket.objects[key])}</Size>"
            f"<LastModified>{now}</LastModified><ETag>{_etag(self.bucket.objects[key])}</ETag></Contents>"
            for key in keys[:PAGE]
        )
        more = f"<NextContinuationToken>{escape(keys[PAGE - 1])}</NextContinuationToken>" if keys[PAGE:] else ""
        self._answer(
            200, f"<ListBucketResult><IsTruncated>{str(bool(more)).lower()}</IsTruncated>{more}{entries}</ListBucketResult>".encode()
        )


def _etag(data: bytes) -> str:
    return f'"{md5(data, usedforsecurity=False).hexdigest()}"'
