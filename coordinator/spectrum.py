"""Leading eigenvalues of positive semidefinite matrices: all of them, or just as many as are wanted, with a proof.

Gram matrices are all that is decomposed here: of stacked factors, or of a dense matrix's smaller side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = torch.finfo(torch.float64).eps
CHUNK = 256  # columns of the stack that are widened at a time
HAIR = 0.01  # what a shortened method leaves out is at most so much more than the best of its rank leaves out
EXTRA = 24  # directions that are followed beyond those that are wanted
STEPS = 3  # multiplications between two looks at the certificate
LOOKS = 4


@dataclass(frozen=True)
class Leading:
    """Eigenvalues, falling, with their vectors in columns, and the most that so many eigenvalues can sum to."""

    values: Tensor  # (k,) float64
    vectors: Tensor  # (n, k)
    most: float


def gram(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """X Xᵀ of the stacked rows of the parts, (R, R) of that dtype; the stack is widened one chunk of columns at a time."""
    size = sum(len(part) for part in parts)
    width = parts[0].shape[1]
    found = torch.zeros(size, size, dtype=dtype)
    bands = [slice(start, min(start + -(-size // 4), size)) for start in range(0, size, max(1, -(-size // 4)))]
    for start in range(0, width, CHUNK):
        x = torch.cat([part[:, start : start + CHUNK].to(dtype) for part in parts])
        for band in bands:  # only the upper triangle, in four bands
            found[band, band.start :].addmm_(x[band], x[band.start :].T)
    return found.triu() + found.triu(1).T


def cholesky(matrix: Tensor, lift: float = 0.0) -> Tensor | None:
    """L with L Lᵀ = matrix + lift · its diagonal; none if there is none.

    Through a unit diagonal, so that it does not matter how large single rows are.
    """
    t, correlation = _scaled(matrix)
    correlation.diagonal().add_(lift)
    lower, failed = torch.linalg.cholesky_ex(correlation)
    return None if int(failed) else t[:, None] * lower


def root(matrix: Tensor) -> Tensor:
    """L with L Lᵀ = matrix, (n, k): Cholesky, or eigenvectors where rows depend on each other, as slices of one matrix do.

    Only L Lᵀ is used of L and never its inverse, so nearly dependent rows do no harm: both give L Lᵀ to rounding.
    """
    if (lower := cholesky(matrix)) is not None:
        return lower
    t, correlation = _scaled(matrix)
    values, vectors = torch.linalg.eigh(correlation)
    live = values > tolerance(len(matrix)) * values[-1]
    found: Tensor = t[:, None] * (vectors[:, live] * values[live].sqrt())
    return found


def _scaled(matrix: Tensor) -> tuple[Tensor, Tensor]:
    t = matrix.diagonal().sqrt()
    inverse = torch.where(t > 0, 1 / t, 0.0)
    return t, inverse[:, None] * matrix * inverse


def tolerance(size: int) -> float:
    """Smallest squared singular value that counts, relative to the largest: what float32 resolves, or a float64 Gram."""
    return max(float(torch.finfo(torch.float32).eps) ** 2, size * EPSILON)


def exact(matrix: Tensor, rank: int) -> Leading:
    """The largest eigenvalues, of a full decomposition; cost about n³ · 0.4 ns."""
    values, vectors = torch.linalg.eigh(matrix)  # looks at one triangle, so rounding need not be symmetric
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    return Leading(values, vectors, most=float(values.sum()))


def certified(matrix: Tensor, rank: int, noise: float) -> Leading | None:
    """Followed directions that are proved to hold nearly what the largest eigenvalues hold; none where that cannot be proved.

    Rank + EXTRA directions by subspace iteration from a seeded start; cost about n² (rank + EXTRA) per step and n³ / 3 per
    proof. What they leave out of the trace is at most 1 + HAIR times what the best of their rank leave out. `noise` is how
    far the matrix, as an operator, may be from the true one; eigenvalues closer together than that are not told apart.
    """
    width = min(len(matrix), rank + EXTRA)
    start = torch.randn(len(matrix), width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = start.to(matrix.dtype)
    total = float(matrix.diagonal().double().sum())
    for _ in range(LOOKS):
        for _ in range(STEPS):
            z, _r = torch.linalg.qr(matrix @ z)
        w = matrix @ z
        values, turn = torch.linalg.eigh((z.T @ w).double())
        values, turn = values.flip(0), turn.flip(1).to(matrix.dtype)
        z, w = z @ turn, w @ turn
        most = _most(matrix, values, z, w, rank, noise)
        if within_a_hair(float(values[:rank].sum()), most, total):
            return Leading(values, z, most)
    return None


def within_a_hair(kept: float, most: float, total: float) -> bool:
    """Whether what is left out is at most 1 + HAIR times what any choice would leave out."""
    return most - kept <= HAIR * (total - most)


def _most(matrix: Tensor, values: Tensor, z: Tensor, w: Tensor, rank: int, noise: float) -> float:
    """The most that the `rank` largest eigenvalues can sum to, given orthonormal z with zᵀ M z = diag(values), w = M z.

    In the basis [z, rest], M = [[Θ, Gᵀ], [G, Z]], and where Z < μ this is at most [[Θ, Gᵀ], [G, μ]], whose eigenvalues but μ are
    those of [[Θ, Rᵀ], [R, μ]] with G = Q R. That Z < μ < θ_rank is proved by a Cholesky factor of μ − Z; infinite where there
    is none.
    Source: Weyl's monotonicity and Ky Fan's sum (Horn and Johnson, Matrix Analysis, chapter 4).
    """
    theta = float(values[rank - 1])
    mu = (theta + float(values[-1])) / 2
    if not theta - mu > noise:
        return float("inf")
    scales = values.to(matrix.dtype)
    g = w - z * scales
    rest = matrix - z @ (scales[:, None] * z.T + g.T) - g @ z.T  # (1 − zzᵀ) M (1 − zzᵀ)
    rest.neg_().diagonal().add_(mu)
    if int(torch.linalg.cholesky_ex(rest).info):
        return float("inf")
    r = torch.linalg.qr(g.double(), mode="r").R
    bordered = torch.cat([torch.cat([values.diag(), r.T], dim=1), torch.cat([r, mu * torch.eye(len(r), dtype=torch.float64)], dim=1)])
    return float(torch.linalg.eigvalsh(bordered)[-rank:].sum())
