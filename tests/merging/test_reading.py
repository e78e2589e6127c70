"""Reading slices piece by piece, from the store and from a file that nobody has checked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from coordinator.blobs import Blobs
from coordinator.reading import BLOCK, StoredFactors, open_file, open_slice
from protocol import errors
from protocol.compact import trained_parts
from protocol.contents import Label, read_header
from protocol.plan import Dtype, Float
from protocol.slices import Factors, Slice, pack
from tests.merging.small import LAYOUT
from tests.merging.test_truncation import rand


def make_slice(rank: int = 2) -> Slice:
    factors = {name: Factors(b=rand(n_out, rank, seed=1), a=rand(rank, n_in, seed=2)) for name, (n_out, n_in) in LAYOUT.modules.items()}
    return Slice(Label(rank=rank, scale=2.0, round=3), factors, {"head.bias": rand(3, seed=3), "head.weight": rand(3, 12, seed=4)})


@pytest.mark.parametrize("dtype", get_args(Float))
@pytest.mark.parametrize("rank", [1, 3])
def test_a_stored_slice_is_read_as_it_was_packed(dtype: Dtype, rank: int, tmp_path: Path) -> None:
    slice = make_slice(rank)
    data = pack(slice, LAYOUT, dtype)
    blobs = Blobs.open(tmp_path.as_uri())
    stored = open_slice(blobs, blobs.put(data).digest)
    (tmp_path / "spooled").write_bytes(data)
    with open_file(tmp_path / "spooled") as spooled:
        for reader in (stored, spooled):
            assert reader.header.label == slice.label
            for name, factors in slice.factors.items():
                found = reader.factors(name)
                assert torch.equal(found.b, factors.b.to(found.b.dtype))
                assert torch.equal(found.a, factors.a.to(found.a.dtype))
            assert torch.equal(reader.full("head.bias"), slice.full["head.bias"].to(reader.full("head.bias").dtype))


def test_what_the_slice_does_not_hold_is_mismatched(tmp_path: Path) -> None:
    blobs = Blobs.open(tmp_path.as_uri())
    reader = open_slice(blobs, blobs.put(pack(make_slice(), LAYOUT, Dtype.float32)).digest)
    with pytest.raises(errors.MismatchedSlice, match=r"block\.k"):
        reader.factors("block.k")
    with pytest.raises(errors.MismatchedSlice, match="full/tail"):
        reader.full("tail")


def test_stored_factors_know_their_rank_before_they_are_read(tmp_path: Path) -> None:
    blobs = Blobs.open(tmp_path.as_uri())
    ref = blobs.put(pack(make_slice(3), LAYOUT, Dtype.float32))
    stored = StoredFactors(open_slice(blobs, ref.digest), "block.q")
    blobs.delete(ref.digest)
    assert stored.rank == 3
    with pytest.raises(errors.NotFound):
        stored.load()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_stored_factors_that_are_no_numbers_are_refused_by_name(bad: float, tmp_path: Path) -> None:
    slice = make_slice()
    slice.factors["block.v"].a[1, 1] = bad
    blobs = Blobs.open(tmp_path.as_uri())
    reader = open_slice(blobs, blobs.put(pack(slice, LAYOUT, Dtype.float32)).digest)
    StoredFactors(reader, "block.q").load()
    with pytest.raises(errors.NonFiniteSlice, match=r"factors/block\.v/a"):
        StoredFactors(reader, "block.v").load()


@pytest.mark.parametrize("data", [b"", b"short", bytes(8), (100).to_bytes(8, "little") + b"{}", (2**63).to_bytes(8, "little") + bytes(100)])
def test_bytes_that_are_no_slice_are_malformed_wherever_they_lie(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "spooled"
    path.write_bytes(data)
    with pytest.raises(errors.MalformedSlice), open_file(path):
        pass
    blobs = Blobs.open(tmp_path.as_uri())
    with pytest.raises(errors.MalformedSlice):
        open_slice(blobs, blobs.put(data).digest)


def test_a_header_that_is_longer_than_an_honest_one_is_not_even_read(tmp_path: Path) -> None:
    path = tmp_path / "spooled"
    path.write_bytes(pack(make_slice(), LAYOUT, Dtype.float32))
    with pytest.raises(errors.MalformedSlice, match="at most 92"), open_file(path, largest_header=100):
        pass


def test_a_slice_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(errors.NotFound):
        open_slice(Blobs.open(tmp_path.as_uri()), f"sha256:{1:064}")


def test_slices_of_one_shape_share_one_table_in_memory(tmp_path: Path) -> None:
    blobs, slice = Blobs.open(tmp_path.as_uri()), make_slice()
    labels = [slice.label.model_copy(update={"round": number}) for number in (3, 4)]
    first, second = (open_slice(blobs, blobs.put(pack(replace(slice, label=label), LAYOUT, Dtype.float32)).digest) for label in labels)
    assert (first.header.label, second.header.label) == tuple(labels)
    assert first.header.entries is second.header.entries


def test_a_slice_that_was_cut_short_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    blobs = Blobs.open(tmp_path.as_uri())
    ref = blobs.put(pack(make_slice(), LAYOUT, Dtype.float32))
    reader = open_slice(blobs, ref.digest)
    file = tmp_path / ref.digest.replace(":", "/")
    with file.open("rb+") as opened:
        opened.truncate(ref.bytes // 2)
    with pytest.raises(errors.TruncatedBody):
        reader.full("head.weight")


def test_int8_entries_in_any_place_are_read(tmp_path: Path) -> None:
    """Neighbours come in one read; tensors that somebody wrote in another order come one by one, with the same numbers."""
    start = make_slice(3)
    data = b"".join(trained_parts(make_slice(3), start, LAYOUT, Dtype.int8))
    blobs = Blobs.open(tmp_path.as_uri())
    expected = open_slice(blobs, blobs.put(data).digest).trained_factors("block.v", lambda: start.factors["block.v"])
    header = read_header(data, len(data))
    table: dict[str, object] = {"__metadata__": {"hlora": header.label.model_dump_json(exclude_none=True)}}
    body = b""
    for name, entry in sorted(header.entries.items(), key=lambda item: item[0][::-1]):  # all of a, all of b, all scales
        table[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [len(body), len(body) + entry.stop - entry.start]}
        body += data[entry.start : entry.stop]
    text = json.dumps(table).encode()
    shuffled = open_slice(blobs, blobs.put(len(text).to_bytes(8, "little") + text + body).digest)
    found = shuffled.trained_factors("block.v", lambda: start.factors["block.v"])
    assert torch.equal(found.a, expected.a)
    assert torch.equal(found.b, expected.b)


@pytest.mark.parametrize("uploads", [Dtype.float32, Dtype.bfloat16, Dtype.int8])
def test_a_tensor_kept_whole_comes_in_blocks_with_what_it_was(uploads: Dtype, tmp_path: Path) -> None:
    """Blocks are of numbers, for those of the two slices may have different sizes; the last one is what is left."""
    layout = LAYOUT.model_copy(update={"full": {"head.weight": (3, 100_000)}})
    start, new = (Slice(make_slice().label, make_slice().factors, {"head.weight": rand(3, 100_000, seed=seed)}) for seed in (5, 6))
    blobs = Blobs.open(tmp_path.as_uri())
    given = open_slice(blobs, blobs.put(pack(start, layout, Dtype.float16)).digest)
    old = given.full("head.weight")
    sent = b"".join(trained_parts(new, Slice(start.label, start.factors, {"head.weight": old}), layout, uploads))
    (tmp_path / "spooled").write_bytes(sent)
    with open_file(tmp_path / "spooled") as spooled:
        blocks = [(x.clone(), x0.clone()) for x, x0 in spooled.full_blocks("head.weight", given)]
        whole = spooled.trained_full("head.weight", lambda: old)
    assert [len(x) for x, _ in blocks] == ([300_000] if uploads is Dtype.int8 else [BLOCK] * (300_000 // BLOCK) + [300_000 % BLOCK])
    assert torch.equal(torch.cat([x for x, _ in blocks]), whole.reshape(-1))
    assert torch.equal(torch.cat([x0 for _, x0 in blocks]), old.reshape(-1))
