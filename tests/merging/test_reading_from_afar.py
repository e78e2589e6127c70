"""Reading from an object store: one request for what lies side by side, several at a time, and the same bytes as from a folder."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from coordinator.blobs import Blobs
from coordinator.merge import first_adapter, merge_round
from coordinator.reading import AHEAD, TrainedFactors, ahead, learn, open_slice
from protocol import errors
from protocol.compact import trained_parts
from protocol.contents import Label
from protocol.plan import Dtype
from protocol.slices import Factors, Slice, pack
from tests.merging import buckets
from tests.merging.buckets import Bucket
from tests.merging.rounds import second_round
from tests.merging.small import LAYOUT, make_plan
from tests.merging.test_reading import make_slice
from tests.merging.test_truncation import rand


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with buckets.bucket() as found:
        for name, value in buckets.settings(found).items():
            monkeypatch.setenv(name, value)
        yield found


@pytest.fixture
def far(bucket: Bucket) -> Blobs:
    return Blobs.open(f"s3://bucket/far-{bucket.url[-5:]}")  # a store is opened once per process and URL


@pytest.mark.parametrize("dtype", Dtype)
def test_a_header_is_one_request_and_so_is_a_module(dtype: Dtype, far: Blobs, bucket: Bucket) -> None:
    start = make_slice()
    ref = far.put(b"".join(trained_parts(make_slice(), start, LAYOUT, dtype)))

    reader = open_slice(far, ref.digest)
    assert [asked.split()[0] for asked in bucket.asked] == ["GET"]
    bucket.asked.clear()
    reader.trained_factors("block.v", lambda: start.factors["block.v"])

    (asked,) = bucket.asked
    mine = [entry for name, entry in reader.header.entries.items() if name.startswith("factors/block.v/")]
    assert asked.endswith(f"bytes={min(e.start for e in mine)}-{max(e.stop for e in mine) - 1}")


def test_a_header_beyond_the_first_request_is_read_with_a_second(far: Blobs, bucket: Bucket) -> None:
    names = {f"layer.{number}.{'x' * 60}": (2, 3) for number in range(400)}
    layout = LAYOUT.model_copy(update={"modules": names, "full": {}})
    factors = {name: Factors(b=rand(2, 1, seed=1), a=rand(1, 3, seed=2)) for name in names}
    ref = far.put(pack(Slice(Label(rank=1, scale=1.0, round=0), factors), layout, Dtype.float32))

    reader = open_slice(far, ref.digest)

    assert len(bucket.asked) == 2
    assert torch.equal(reader.factors(next(iter(names))).a, rand(1, 3, seed=2))


def test_contributions_are_read_at_the_same_moment(far: Blobs, bucket: Bucket) -> None:
    """The bucket answers three requests together, or none: one reader after the other would wait for ever."""
    slices = [make_slice(rank) for rank in (1, 2, 3)]
    digests = [far.put(pack(slice, LAYOUT, Dtype.float32)).digest for slice in slices]
    bucket.together = threading.Barrier(3)
    learn(far, digests)
    stored = [TrainedFactors(open_slice(far, digest), "block.q", slices[0].factors.__getitem__) for digest in digests]  # type: ignore[arg-type]  # not asked for

    with ahead(far, stored) as ready:
        for _ in range(2):  # a merge that goes through them twice
            for slice, factors in zip(slices, ready, strict=True):
                assert factors.rank == slice.label.rank
                assert torch.equal(factors.load().b, slice.factors["block.q"].b)


def test_what_cannot_be_read_is_said_where_it_is_asked_for(far: Blobs) -> None:
    refs = [far.put(pack(make_slice(rank), LAYOUT, Dtype.float32)) for rank in (1, 2)]
    stored = [TrainedFactors(open_slice(far, ref.digest), "block.q", dict) for ref in refs]  # type: ignore[arg-type]  # not asked for
    far.delete(refs[1].digest)
    with ahead(far, stored) as ready:
        ready[0].load()
        with pytest.raises(errors.NotFound):
            ready[1].load()


def test_no_more_is_read_ahead_than_a_few(far: Blobs, bucket: Bucket) -> None:
    digests = [far.put(pack(make_slice(1 + number % 3), LAYOUT, Dtype.float32)).digest for number in range(3)]
    stored = [TrainedFactors(open_slice(far, digests[n % 3]), "block.q", dict) for n in range(4 * AHEAD)]  # type: ignore[arg-type]  # not asked for
    bucket.asked.clear()
    with ahead(far, stored) as ready:
        ready[0].load()
    assert 1 <= len(bucket.asked) <= AHEAD


@pytest.mark.parametrize("strategy", ["delta", "hetlora", "rotating"])
def test_a_round_from_a_bucket_publishes_the_bytes_of_one_from_a_folder(strategy: str, far: Blobs, tmp_path: Path) -> None:
    plan = make_plan(strategy, uploads=Dtype.int8)
    found = []
    for blobs in (far, Blobs.open(tmp_path.as_uri())):
        _, task = second_round(blobs, plan)
        with ThreadPoolExecutor(2) as executor:
            found.append(merge_round(task, executor, blobs))
    assert found[0] == found[1]
    assert found[0].adapter != first_adapter(plan, far).adapter
