"""How far two files of one slice are apart, where they were not computed alike: by what they mean, not by their bytes.

Another device adds in another order, so the last digits differ, and with them the signs of directions and the turn among those
of equal singular values. The products of b and a hardly do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from coordinator.reading import SliceReader
from protocol.checks import change_energy
from protocol.contents import Header
from protocol.plan import Dtype
from protocol.slices import TORCH_DTYPES, Factors

TOLERANCE = 1e-4  # of a product's norm; measured between sums in other orders: 4e-6, for spectra that hardly fall


def allowed(wire: Dtype) -> float:
    """How far files of numbers of that type may be apart: both were rounded, and not alike."""
    return max(TOLERANCE, 2 * torch.finfo(TORCH_DTYPES[wire]).eps)


def apart(one: SliceReader, other: SliceReader) -> float:
    """The largest ‖x − y‖ / ‖x‖ of two files' updates s b a and fully trained tensors; infinite where they do not hold the same.

    One module is in memory at a time, and no product is formed. Differences below 10⁻⁸ are not resolved.
    """
    if _shapes(one.header) != _shapes(other.header):
        return math.inf
    return max(_distances(one, other), default=0.0)


def _shapes(header: Header) -> dict[str, object]:
    return {name: (entry.dtype, entry.shape) for name, entry in header.entries.items()}


def _distances(one: SliceReader, other: SliceReader) -> Iterator[float]:
    scale, other_scale = one.header.label.scale, other.header.label.scale
    for name in one.header.entries:
        match name.split("/"):
            case ["factors", module, "b"]:
                x, y = one.factors(module), other.factors(module)
                nothing = Factors(b=x.b[:, :0], a=x.a[:0])
                yield _share(change_energy(x, scale, y, other_scale), change_energy(x, scale, nothing, 0.0))
            case ["full", tensor]:
                t, u = one.full(tensor).double(), other.full(tensor).double()
                yield _share(float((t - u).square().sum()), float(t.square().sum()))


def _share(energy: float, whole: float) -> float:
    """The root of their quotient; any difference from nothing is infinitely large."""
    return math.sqrt(energy / whole) if whole > 0 else math.inf if energy > 0 else 0.0
