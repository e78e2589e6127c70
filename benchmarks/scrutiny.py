"""What must hold of every slice, whoever made it: it is refused with a reason that can be told, or it is what the job asked for."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch

from benchmarks.damage import COMPACT, EXPECTED, LARGEST, LAYOUT, SIZES, given
from coordinator import problems
from coordinator.reading import SliceReader, open_file
from protocol import errors
from protocol.checks import check_change, check_finite, check_full, check_header
from protocol.contents import read_header
from protocol.slices import Factors, decode, unpack

LONGEST_REASON = 2000  # characters; it is stored with the job


def examine(data: bytes, file: Path) -> type[errors.InvalidSlice] | None:
    """The refusal of a slice that nobody has checked, or none where it may count; the file is where it lies meanwhile.

    Raises AssertionError where a promise does not hold. Any other exception is a defect as well.
    """
    file.write_bytes(data)
    try:
        with open_file(file, LARGEST) as trained:
            assert int.from_bytes(data[:8], "little") <= LARGEST - 8, "a header beyond the limit was read"
            _holds_together(trained, data)
            _counts(trained)
    except errors.InvalidSlice as refusal:
        _can_be_told(refusal)
        _unpacked(data)
        return type(refusal)
    assert len(data) <= LARGEST, "a slice that counts is longer than any"
    _unpacked(data)
    return None


def _holds_together(trained: SliceReader, data: bytes) -> None:
    header, end = trained.header, 8 + int.from_bytes(data[:8], "little")
    for name, entry in sorted(header.entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        assert entry.start == end, f"{name} leaves a gap, or overlaps"
        assert entry.stop - entry.start == math.prod(entry.shape) * SIZES[entry.dtype], f"{name} has another size than its shape"
        assert decode(trained.read(entry.start, entry.stop), entry).shape == entry.shape, f"{name} has another shape"
        end = entry.stop
    assert end == header.length == len(data), "the ranges do not end with the file"
    assert read_header(data, len(data)) == header, "the same bytes were read in two ways"


def _counts(trained: SliceReader) -> None:
    """All that is asked of a slice before it counts."""
    expected = COMPACT if any(entry.dtype == "I8" for entry in trained.header.entries.values()) else EXPECTED
    check_header(trained.header, expected)

    def sent(module: str) -> Factors:
        factors = trained.trained_factors(module, partial(given, module))
        check_finite(module, factors.a)
        check_finite(module, factors.b)
        return factors

    for name, shape in LAYOUT.full.items():
        old = torch.zeros(shape)
        new = trained.trained_full(name, partial(torch.zeros, shape))
        assert math.isfinite(check_full(name, [(new.reshape(-1), old.reshape(-1))], expected.wire)), "a change without a norm would count"
    assert math.isfinite(check_change(sent, given, expected)), "a change without a norm would count"


def _can_be_told(refusal: errors.InvalidSlice) -> None:
    """By HTTP, and by a database, which takes no half characters and no NUL."""
    assert problems.answer(refusal).status_code == 422, "an invalid slice is answered with 422"
    reason = str(refusal)
    assert reason.isprintable(), f"the reason cannot be stored, or not be read: {reason!a}"
    assert len(reason) <= LONGEST_REASON, f"the reason has {len(reason)} characters"


def _unpacked(data: bytes) -> None:
    """Who unpacks it without these checks is refused as well, or gets a slice."""
    try:
        unpack(data)
    except errors.InvalidSlice:
        return
