"""Blobs: one family of laws, over a folder and over an object store."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.blobs import Blobs, file_digest
from protocol import errors
from protocol.slices import digest
from tests.merging import buckets

NOBODY = f"sha256:{0:064}"


@pytest.fixture(params=["file", "memory", "s3"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Blobs]:
    match request.param:
        case "file":
            yield Blobs.open(tmp_path.as_uri() + "/blobs")
        case "memory":
            yield Blobs.open(f"memory://{request.node.nodeid}")
        case _:
            with buckets.bucket() as bucket:
                for name, value in buckets.settings(bucket).items():
                    monkeypatch.setenv(name, value)
                yield Blobs.open(f"s3://bucket/{bucket.url[-5:]}")  # a store is opened once per process and URL


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=5000), cuts=st.tuples(st.integers(0, 5000), st.integers(0, 5000)), size=st.integers(1, 6000))
def test_what_was_put_is_read_whole_in_ranges_and_in_chunks(blobs: Blobs, data: bytes, cuts: tuple[int, int], size: int) -> None:
    ref = blobs.put(data)
    assert ref.digest == digest(data)
    assert ref.bytes == len(data) == blobs.size(ref.digest)
    assert blobs.read(ref.digest) == data
    start, stop = sorted(min(x, len(data)) for x in cuts)
    assert blobs.read_range(ref.digest, start, stop) == data[start:stop]
    assert b"".join(blobs.chunks(ref.digest, start, stop, size)) == data[start:stop]
    assert b"".join(blobs.chunks(ref.digest, start)) == data[start:]


def test_a_file_is_put_under_the_digest_of_its_bytes(blobs: Blobs, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    path = tmp_path / "spooled"
    path.write_bytes(data)
    ref = blobs.put_file(path)
    assert ref.digest == file_digest(path) == digest(data)
    assert blobs.put_file(path, ref.digest) == ref == blobs.put(data)
    assert blobs.read(ref.digest) == data
    assert path.exists()


def test_a_file_on_the_same_disk_becomes_the_blob_without_being_copied(tmp_path: Path) -> None:
    blobs, path = Blobs.open((tmp_path / "blobs").as_uri()), tmp_path / "spooled"
    path.write_bytes(b"once")

    ref = blobs.put_file(path)

    assert (tmp_path / "blobs" / ref.digest.replace(":", "/")).samefile(path)
    path.unlink()
    assert blobs.read(ref.digest) == b"once"


def test_a_file_on_another_disk_is_copied(tmp_path: Path) -> None:
    places = [place for place in (Path("/dev/shm"), Path("/var/tmp"), Path.home()) if place.is_dir()]
    other = next((place for place in places if place.stat().st_dev != tmp_path.stat().st_dev and os.access(place, os.W_OK)), None)
    if other is None:
        pytest.skip(f"none of {places} is on another disk than {tmp_path}")
    blobs = Blobs.open(tmp_path.as_uri())
    with tempfile.NamedTemporaryFile(dir=other) as file:
        file.write(b"twice")
        file.flush()
        ref = blobs.put_file(Path(file.name))

    assert blobs.read(ref.digest) == b"twice"
    assert list((tmp_path / "staging").iterdir()) == []


def test_large_blobs_come_in_several_chunks(tmp_path: Path) -> None:
    blobs = Blobs.open(tmp_path.as_uri())
    ref = blobs.put(bytes(2_500_000))
    assert [len(chunk) for chunk in blobs.chunks(ref.digest, size=1_000_000)] == [1_000_000, 1_000_000, 500_000]


def test_writing_twice_is_writing_once(blobs: Blobs) -> None:
    assert blobs.put(b"twice") == blobs.put(b"twice")
    assert [found.digest for found in blobs.digests()] == [digest(b"twice")]


def test_the_list_says_how_large_and_how_old_blobs_are(blobs: Blobs) -> None:
    refs = {blobs.put(data) for data in (b"one", b"three")}
    found = list(blobs.digests())
    assert {(x.digest, x.bytes) for x in found} == {(ref.digest, ref.bytes) for ref in refs}
    assert all(abs(datetime.now(UTC) - x.modified) < timedelta(minutes=1) for x in found)


def test_a_blob_put_again_is_young_again(tmp_path: Path) -> None:
    blobs = Blobs.open(tmp_path.as_uri())
    ref = blobs.put(b"old")
    os.utime(tmp_path / "sha256" / ref.digest.removeprefix("sha256:"), (0, 0))
    blobs.put(b"old")
    assert next(blobs.digests()).modified > datetime.now(UTC) - timedelta(minutes=1)


def test_those_that_are_missing_are_told_of_many(blobs: Blobs) -> None:
    here = [blobs.put(bytes([number])).digest for number in range(20)]
    assert blobs.missing([*here, NOBODY]) == {NOBODY}
    assert blobs.missing([]) == set()


def test_an_unknown_blob_is_not_found(blobs: Blobs) -> None:
    assert not blobs.exists(NOBODY)
    for ask in (blobs.read, blobs.size, blobs.chunks, lambda name: blobs.read_range(name, 0, 1)):
        with pytest.raises(errors.NotFound, match=NOBODY):
            ask(NOBODY)


@pytest.mark.parametrize(
    "name",
    ["", "sha256:", "sha256:" + "0" * 63, "sha256:" + "A" * 64, "sha256:../../../etc/passwd", f"{NOBODY}/..", f"{NOBODY}\n", "0" * 64],
)
def test_what_is_no_digest_never_reaches_the_store(blobs: Blobs, name: str) -> None:
    assert not blobs.exists(name)
    blobs.delete(name)
    with pytest.raises(errors.NotFound):
        blobs.read(name)


def test_what_only_begins_with_a_blobs_name_is_not_the_blob(blobs: Blobs) -> None:
    ref = blobs.put(b"named")
    assert blobs.exists(ref.digest)
    assert not any(blobs.exists(name) for name in (f"{ref.digest}0", f"{ref.digest}/..", f"{ref.digest}\n", f" {ref.digest}"))


def test_a_range_beyond_the_end_is_refused(blobs: Blobs) -> None:
    ref = blobs.put(b"short")
    with pytest.raises(errors.TruncatedBody, match="ends at 5"):
        blobs.read_range(ref.digest, 3, 9)
    assert b"".join(blobs.chunks(ref.digest, 3, 9)) == b"rt"
    assert blobs.read_range(ref.digest, 5, 5) == b""


def test_a_deleted_blob_is_gone_and_deleting_it_again_does_nothing(blobs: Blobs) -> None:
    ref = blobs.put(b"gone")
    blobs.delete(ref.digest)
    blobs.delete(ref.digest)
    assert not blobs.exists(ref.digest)
    assert list(blobs.digests()) == []


def test_blobs_travel_as_their_url(blobs: Blobs) -> None:
    ref = blobs.put(b"here")
    assert pickle.loads(pickle.dumps(blobs)).read(ref.digest) == b"here"
    assert Blobs.open(blobs.url).read(ref.digest) == b"here"


def test_many_threads_may_put_the_same_bytes(blobs: Blobs) -> None:
    data = [os.urandom(100_000)] * 16
    with ThreadPoolExecutor(8) as pool:
        refs = set(pool.map(blobs.put, data))
    assert len(refs) == 1
    assert blobs.read(refs.pop().digest) == data[0]


def test_a_folder_holds_nothing_but_whole_blobs(tmp_path: Path) -> None:
    blobs = Blobs.open(tmp_path.as_uri())
    ref = blobs.put(b"whole")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files == [tmp_path / "sha256" / ref.digest.removeprefix("sha256:")]


def test_a_put_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    blobs = Blobs.open(tmp_path.as_uri())
    with pytest.raises(errors.Unavailable, match="blob store"):
        blobs.put_file(tmp_path, NOBODY)  # a folder cannot be read
    assert not blobs.exists(NOBODY)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_strangers_in_the_folder_are_not_listed(tmp_path: Path) -> None:
    blobs = Blobs.open(tmp_path.as_uri())
    (tmp_path / "sha256" / "notes.txt").write_text("mine")
    assert list(blobs.digests()) == []


def test_a_folder_with_blanks_in_its_name_can_be_a_store(tmp_path: Path) -> None:
    folder = tmp_path / "two words"
    Blobs.open(folder.as_uri()).put(b"x")
    assert (folder / "sha256").is_dir()


def test_stores_of_other_names_are_other_stores() -> None:
    ref = Blobs.open("memory://one-name").put(b"x")
    assert not Blobs.open("memory://another-name").exists(ref.digest)


def test_a_bucket_can_be_named() -> None:
    assert Blobs.open("s3://bucket/prefix").url == "s3://bucket/prefix"


@pytest.mark.parametrize("url", ["", "/var/blobs", "file://", "file://relative/path", "memory://", "s3://", "ftp://host/x", "http://["])
def test_any_other_url_is_refused_with_those_that_are_taken(url: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="file:///FOLDER, s3://BUCKET/PREFIX or memory://NAME"):
        Blobs.open(url)
