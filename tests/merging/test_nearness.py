"""How far two files are apart, by their products and not by their bytes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from coordinator.blobs import Blobs
from coordinator.merge import first_adapter
from coordinator.nearness import TOLERANCE, allowed, apart
from coordinator.reading import SliceReader, open_slice
from protocol.messages import BlobRef
from protocol.plan import Dtype
from protocol.slices import Factors, Slice, pack
from tests.merging.rounds import merge, second_round
from tests.merging.small import LAYOUT, make_plan, read


def kept(blobs: Blobs, slice: Slice) -> SliceReader:
    return opened(blobs, blobs.put(pack(slice, LAYOUT, Dtype.float32)))


def opened(blobs: Blobs, ref: BlobRef) -> SliceReader:
    return open_slice(blobs, ref.digest)


@pytest.fixture
def slice(blobs: Blobs) -> Slice:
    """One that a second round published."""
    _, task = second_round(blobs, make_plan())
    return read(blobs, merge(task, blobs).slices[4])


def test_factors_of_equal_products_are_not_apart_whatever_their_gauge_and_scale(slice: Slice, blobs: Blobs) -> None:
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))
    turned = {name: Factors(b=f.b @ turn / 2, a=turn.T @ f.a) for name, f in slice.factors.items()}
    other = replace(slice, factors=turned, label=slice.label.model_copy(update={"scale": 2 * slice.label.scale}))
    assert apart(kept(blobs, slice), kept(blobs, other)) < 1e-6


@pytest.mark.parametrize("share", [1e-5, 0.5])
def test_the_module_or_tensor_that_is_furthest_counts(slice: Slice, blobs: Blobs, share: float) -> None:
    f = slice.factors["block.v"]
    module = replace(slice, factors={**slice.factors, "block.v": Factors(b=f.b * (1 + share), a=f.a)})
    tensor = replace(slice, full={**slice.full, "head.weight": slice.full["head.weight"] * (1 + share)})
    for other in (module, tensor):
        assert apart(kept(blobs, slice), kept(blobs, other)) == pytest.approx(share, rel=0.01)


def test_nothing_is_as_near_as_can_be_to_nothing_and_infinitely_far_from_anything(slice: Slice, blobs: Blobs) -> None:
    nothing = opened(blobs, first_adapter(make_plan(), blobs).slices[4])
    assert apart(nothing, nothing) == 0.0
    assert apart(nothing, kept(blobs, slice)) == math.inf


def test_files_of_other_shapes_are_infinitely_far(slice: Slice, blobs: Blobs) -> None:
    fewer = replace(
        slice, factors={name: f.of([0, 1]) for name, f in slice.factors.items()}, label=slice.label.model_copy(update={"rank": 2})
    )
    assert apart(kept(blobs, slice), kept(blobs, fewer)) == math.inf


def test_what_is_rounded_on_its_way_may_be_apart_by_that_rounding() -> None:
    assert allowed(Dtype.float32) == TOLERANCE
    assert allowed(Dtype.bfloat16) == 2 * torch.finfo(torch.bfloat16).eps
