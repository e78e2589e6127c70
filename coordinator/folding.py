"""From a sum of any number of terms to its leading singular triplets by one dense matrix, which is all that is in memory.

Small sums are formed and decomposed in float64; large ones in float32, with the quick methods' proof beside the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from coordinator import memory, spectrum, symmetric, truncation
from coordinator.sums import Sum
from coordinator.truncation import Singular

BLOCK = 512  # directions that are multiplied at a time
CANCELLED = 0.01  # of the terms' own energies: sums that hold less are formed in float64
ROWS = 64  # that are widened at a time
LARGE = 1 << 28  # multiplications from which a sum is formed in float32


@dataclass(frozen=True)
class _Dense:
    """W / unit, formed."""

    matrix: Tensor  # (n_out, n_in)
    unit: float  # the largest of all weights
    floor: float  # the sum of the directions' own energies; NaN or infinite where the dtype cannot hold them


def folded(w: Sum, rank: int) -> Singular:
    """Singular triplets of the dense sum, from the Gram matrix of its smaller side; one block of terms in memory.

    What float32 adds to the error is some 10⁻⁷ of ‖W‖, as rounding the result does.
    """
    for dtype in (torch.float32, torch.float64):
        if dtype == torch.float32 and w.rank * w.shape[0] * w.shape[1] < LARGE:
            continue
        with memory.SHARED.taken(scratch(w.shape, dtype)):
            dense = _formed(w, dtype)
            if dtype == torch.float64 or _well_formed(dense):
                truncation.finite(dense.floor)
                return _decomposed(dense, rank)
    raise AssertionError("float64 decides")


def _well_formed(dense: _Dense) -> bool:
    """Whether float32 holds the terms, and they do not cancel so far that its rounding would be seen in what they leave."""
    length = float(torch.linalg.vector_norm(dense.matrix))
    return truncation.within_float32(torch.tensor([dense.floor])) and length**2 >= CANCELLED * dense.floor


def scratch(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> int:
    """Bytes: the dense matrix, its Gram matrix, and a block of terms."""
    return (shape[0] * shape[1] + min(shape) ** 2 + sum(shape) * BLOCK) * dtype.itemsize


def _formed(w: Sum, dtype: torch.dtype) -> _Dense:
    n_out, n_in = w.shape
    weights = [term.weights() for term in w.terms]
    unit = max((float(c.abs().max()) for c in weights if len(c)), default=0.0) or 1.0
    wide = max(BLOCK, max(len(c) for c in weights))
    found, b, a = torch.zeros(w.shape, dtype=dtype), torch.empty(n_out, wide, dtype=dtype), torch.empty(wide, n_in, dtype=dtype)
    floor, filled = 0.0, 0
    for term, c in zip(w.terms, weights, strict=True):
        part = term.load(w.shape)
        if filled + part.rank > wide:
            floor, filled = floor + _add(found, b[:, :filled], a[:filled]), 0
        here = slice(filled, filled + part.rank)
        # Divided by the largest, so that equal weights are rounded to nothing but one.
        torch.mul(part.b, (c / unit).to(dtype), out=b[:, here])
        a[here] = part.a
        filled += part.rank
    return _Dense(found, unit, floor + _add(found, b[:, :filled], a[:filled]))


def _add(found: Tensor, b: Tensor, a: Tensor) -> float:
    """found += b a; the sum of the directions' own energies."""
    found.addmm_(b, a)
    # torch takes ten times as long for the norms of columns
    return float(b.square().sum(dim=0).double().dot(a.square().sum(dim=1).double()))


def _decomposed(dense: _Dense, rank: int) -> Singular:
    wide = dense.matrix.shape[0] <= dense.matrix.shape[1]
    side = dense.matrix if wide else dense.matrix.T  # its rows are the smaller side
    width = rank + spectrum.EXTRA
    found = _followed(side, rank, width) if rank > 0 and len(side) >= 4 * width else None
    # A float64 sum's own rounding is far below that of a Gram matrix, which is in proportion to the sum and not to its terms.
    floor = dense.floor if side.dtype == torch.float32 else symmetric.EPSILON * dense.floor
    left, right, values, total, most = found or _full(side, rank, floor)
    b, a = (left, right) if wide else (right.T, left.T)
    root, square = dense.unit**0.5, dense.unit**2
    return Singular(b * root, a.contiguous() * root, values * square, total * square, most * square)


_Found = tuple[Tensor, Tensor, Tensor, float, float]  # U√S, √S Vᵀ, S², ‖W‖²_F, the most of S² in sum


def _followed(side: Tensor, rank: int, width: int) -> _Found | None:
    """Leading triplets by subspace iteration, proved to hold nearly as much as any; none where that cannot be proved.

    What the followed directions do not hold is subtracted before anything is squared, so that the proof sees what is left at its
    own scale: float32 resolves singular values to 10⁻⁶ of the largest.
    """
    z = spectrum.start(side, width)
    for _ in range(spectrum.LOOKS):
        for _ in range(spectrum.STEPS):
            z = spectrum.orthonormal(side @ spectrum.orthonormal(side.T @ z))
        seen = z.T @ side  # (width, long)
        values, turn = truncation.pencil(symmetric.gram(seen, torch.float64), symmetric.gram(z.T, torch.float64))
        turn = turn.to(side.dtype)
        z, seen = z @ turn, turn.T @ seen
        side.addmm_(z, seen, alpha=-1)  # what is left: (1 − zzᵀ) W
        total = float(values.sum()) + _energy(side)
        noise = 2 * torch.finfo(side.dtype).eps * float(values[0] * values[rank - 1]) ** 0.5
        bound = spectrum.bound(values, side @ seen.T, rank, noise=noise, allowed=truncation.a_hair(total))
        if bound and _below(bound[0] - noise, side):
            roots = values[:rank].pow(0.25).to(side.dtype)
            return z[:, :rank] * roots, seen[:rank] / roots[:, None], values[:rank], total, bound[1]
        side.addmm_(z, seen)
    return None


def _energy(x: Tensor) -> float:
    """‖x‖²_F, summed in float64."""
    return math.fsum(float(x[start : start + ROWS].double().square().sum()) for start in range(0, len(x), ROWS))


def _below(mu: float, left: Tensor) -> bool:
    """Whether all squared singular values of what is left are below μ."""
    gram = symmetric.gram(left, left.dtype)
    noise = truncation.OPERATOR_NOISE * float(gram.norm()) if left.dtype == torch.float32 else 0.0
    gram.neg_().diagonal().add_(mu - noise)
    return symmetric.factor(gram) is not None


def _full(side: Tensor, rank: int, floor: float) -> _Found:
    """Leading triplets of a full decomposition of the smaller side's Gram matrix, in float64."""
    total = _energy(side)
    found = truncation.leading(symmetric.gram(side, torch.float64), rank, total, floor)
    x = found.vectors
    seen = x.to(side.dtype).T @ side
    values, v = truncation.pencil(symmetric.gram(seen, torch.float64), symmetric.gram(x.T, torch.float64))
    v, roots = v.to(side.dtype), values.pow(0.25).to(side.dtype)
    return x.to(side.dtype) @ v * roots, (v.T @ seen) / roots[:, None], values, total, max(found.most, float(values.sum()))
