"""Symmetric matrices, of which half is enough: Gram matrices of long stacks, what stands between two factors, and their roots."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = torch.finfo(torch.float64).eps
CHUNK = 1 << 20  # bytes of a stack that are widened and multiplied at a time, so that they stay in the cache
LEAST = 256  # columns at a time all the same: fewer would be added to the whole product too often
BAND = 96  # columns, in which the lower triangle of a symmetric product is computed: nearly half of the arithmetic
PANEL = 500  # columns of a Cholesky factor that are found at a time; no power of two, whose rows share lines of the cache


def gram(x: Tensor, dtype: torch.dtype) -> Tensor:
    """X Xᵀ for x (r, n), (r, r) of that dtype; where x has another, it is widened one chunk of columns at a time."""
    size = len(x)
    found = torch.zeros(size, size, dtype=dtype)
    if x.dtype == dtype:
        _add_square(found, x)
        return _mirrored(found)
    columns = max(LEAST, CHUNK // (dtype.itemsize * max(1, size)))
    wide = torch.empty((size, columns) if x.stride(1) == 1 else (columns, size), dtype=dtype)
    wide = wide if x.stride(1) == 1 else wide.T
    for start in range(0, x.shape[1], columns):
        chunk = x[:, start : start + columns]
        _add_square(found, wide[:, : chunk.shape[1]].copy_(chunk))
    return _mirrored(found)


def _add_square(found: Tensor, x: Tensor) -> None:
    """found += X Xᵀ, its lower bands alone."""
    for band in _bands(len(found)):
        found[band.start :, band].addmm_(x[band.start :], x[band].T)


def sandwich(root: Tensor, inner: Tensor) -> Tensor:
    """Lᵀ M L for a symmetric M (n, n) and L (n, k), square ones lower triangular."""
    n, k = root.shape
    found = torch.empty(k, k, dtype=root.dtype)
    for band in _bands(k):
        live = slice(band.start if n == k else 0, n)
        found[band.start :, band] = root[live, band.start :].T @ (inner[live, live] @ root[live, band])
    return _mirrored(found)


def lowered(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """M − X Yᵀ, of which only the lower triangle is right: all that `factor` looks at. matrix: (n, n); left, right: (n, k)."""
    found = matrix.clone()
    for band in _bands(len(found)):
        found[band.start :, band].addmm_(left[band.start :], right[band].T, alpha=-1)
    return found


def _bands(size: int) -> list[slice]:
    step = max(BAND, -(-size // 8))
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _mirrored(lower: Tensor) -> Tensor:
    """The symmetric matrix of which the lower bands are given; in place."""
    for band in _bands(len(lower)):
        lower[band, band.stop :] = lower[band.stop :, band].T
    return lower


def cholesky(matrix: Tensor, lift: float = 0.0) -> Tensor | None:
    """L with L Lᵀ = matrix + lift · its diagonal; none if there is none.

    Through a unit diagonal, so that it does not matter how large single rows are.
    """
    t, correlation = _scaled(matrix)
    correlation.diagonal().add_(lift)
    lower = factor(correlation)
    return None if lower is None else lower.mul_(t[:, None])


def root(matrix: Tensor) -> Tensor:
    """L with L Lᵀ = matrix, (n, k): Cholesky, or eigenvectors where rows depend on each other, as slices of one matrix do.

    Only L Lᵀ is used of L and never its inverse, so nearly dependent rows do no harm: both give L Lᵀ to rounding. A square
    L is lower triangular.
    """
    if (lower := cholesky(matrix)) is not None:
        return lower
    t, correlation = _scaled(matrix)
    values, vectors = torch.linalg.eigh(correlation)
    live = values > tolerance(len(matrix)) * values[-1]
    live[0] = False  # there is no Cholesky factor: the least is nothing but rounding
    found: Tensor = t[:, None] * (vectors[:, live] * values[live].sqrt())
    return found


def _scaled(matrix: Tensor) -> tuple[Tensor, Tensor]:
    t = matrix.diagonal().sqrt()
    inverse = torch.where(t > 0, 1 / t, 0.0)
    return t, (inverse[:, None] * matrix).mul_(inverse)


def tolerance(size: int) -> float:
    """Smallest squared singular value that counts, relative to the largest: what float32 resolves, or a float64 Gram."""
    return max(float(torch.finfo(torch.float32).eps) ** 2, size * EPSILON)


def factor(matrix: Tensor) -> Tensor | None:
    """The lower triangular L with L Lᵀ = matrix, of which only the lower triangle is looked at and nothing stays; none if there is none.

    Found some columns at a time: a fourth of LAPACK's time from a thousand rows on.
    """
    size = len(matrix)
    for start in range(0, size, PANEL):
        stop = min(start + PANEL, size)
        lower: Tensor
        lower, failed = torch.linalg.cholesky_ex(matrix[start:stop, start:stop])
        if int(failed):
            return None
        if size <= PANEL:
            return lower
        matrix[start:stop, start:stop] = lower
        below = torch.linalg.solve_triangular(lower, matrix[stop:, start:stop].T, upper=False)  # (PANEL, rows below)
        matrix[stop:, start:stop] = below.T
        for band in _bands(size - stop):
            matrix[stop + band.start :, stop + band.start : stop + band.stop].addmm_(below[:, band.start :].T, below[:, band], alpha=-1)
    return matrix.tril_()
