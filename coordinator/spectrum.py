"""Leading eigenvalues of positive semidefinite matrices: all of them, or just as many as are wanted, with a proof.

Gram matrices are all that is decomposed here: of stacked factors, or of a dense matrix's smaller side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from coordinator import symmetric

EXTRA = 32  # directions that a proof follows beyond those that are wanted
STEPS = 3  # multiplications before the first look at the certificate
DEGREE = 3  # of the polynomials that correct what a look has found
LOOKS = 4
GAPS, TRIES = 16, 4  # of bounds, each easier to hold and harder to prove than the one before
HINT = 10.0  # how many times as long as what is drawn at random a direction is that the start was given

Allowed = Callable[[float], float]  # by how much the most that can be kept may exceed what is kept


@dataclass(frozen=True)
class Leading:
    """Eigenvalues, falling, with their vectors in columns, and the most that so many eigenvalues can sum to."""

    values: Tensor  # (k,) float64
    vectors: Tensor  # (n, k)
    most: float


def exact(matrix: Tensor, rank: int) -> Leading:
    """The largest eigenvalues, of a full decomposition; cost about n³ · 0.2 ns."""
    values, vectors = torch.linalg.eigh(matrix)  # looks at one triangle, so rounding need not be symmetric
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    return Leading(values, vectors, most=float(values.sum()))


def certified(matrix: Tensor, rank: int, *, width: int, noise: float, allowed: Allowed, hint: Tensor | None = None) -> Leading | None:
    """Followed directions that are proved to hold nearly what the largest eigenvalues hold; none where that cannot be proved.

    So many directions by subspace iteration in float32, from what they are thought to resemble; then looks at them in the
    matrix's own dtype, with corrections in float32 between them, and the proof. Cost about n² width per multiplication and n³ / 3
    for the proof. `noise` is how far the matrix, as an operator, may be from the true one; eigenvalues closer together than that
    are not told apart. hint: (n, ≤ width).
    """
    unit = float(matrix.diagonal().sum()) if matrix.dtype == torch.float64 else 1.0
    if not (unit > 0 and rank > 0 and width <= len(matrix)):
        return None
    rough = matrix if matrix.dtype == torch.float32 else (matrix / unit).float()
    z = start(rough, width, hint)
    for _ in range(STEPS):
        z = orthonormal(rough @ z)
    y = z.to(matrix.dtype)
    for _ in range(LOOKS):
        values, w, y = _ritz(matrix, y)
        g = w - y * values.to(y.dtype)
        found = bound(values, g, rank, noise=noise, allowed=allowed)
        if found and _below(found[0] - noise, matrix, y, values):
            return Leading(values, y, most=found[1])
        y = orthonormal(y + _missed(rough, y.float(), (values / unit).float(), (g / unit).float(), rank))
    return None


def bound(values: Tensor, g: Tensor, rank: int, *, noise: float, allowed: Allowed) -> tuple[float, float] | None:
    """A bound μ for all that is not followed, and the most that the `rank` largest eigenvalues then sum to; none if that is too much.

    values: the followed eigenvalues, (k,) float64, falling; g: what the matrix makes of their vectors beyond themselves, (n, k).
    In the basis [z, rest], M = [[Θ, Gᵀ], [G, Z]]. Where Z < μ, an eigenvalue λ > μ of M is at most the same one of
    [[Θ, Gᵀ], [G, μ]], which is one of Θ + GᵀG / (λ − μ), and this falls with λ: above a level t > μ none is larger than that of
    Θ + GᵀG / (t − μ). The highest μ is the easiest to prove: t is as far above the last that is wanted as half of what is
    allowed reaches, so that spectra that hardly fall are proved too, and t − μ as small as the rest of it lets it be.
    Source: Weyl's monotonicity, Haynsworth's inertia and Ky Fan's sum (Horn and Johnson, Matrix Analysis, chapters 4 and 7).
    """
    kept, coupled = float(values[:rank].sum()), (g.T @ g).double()
    if not (room := allowed(kept)) > 0:
        return None
    level = float(values[rank - 1]) + room / (2 * rank)
    gaps = level * torch.arange(-GAPS, 0).div(2).exp2().double()
    gaps = gaps[torch.minimum(gaps / 2, level - gaps) > noise, None]
    least = (values + coupled.diagonal() / gaps).topk(rank).values.clamp(min=level).sum(dim=1)  # no eigenvalues sum to less
    for gap in gaps[least - kept <= room, 0][:TRIES]:
        highest = torch.linalg.eigvalsh(values.diag() + coupled / gap)[-rank:]
        if (most := float(highest.clamp(min=level).sum())) - kept <= room:
            return level - float(gap), most
    return None


def start(like: Tensor, width: int, hint: Tensor | None = None) -> Tensor:
    """Where an iteration starts, (n, width) for a matrix of n rows: directions as given, with a little of everything beside them."""
    found = _drawn(len(like), width).to(like)
    if hint is None:
        return found
    lengths = torch.linalg.vector_norm(hint, dim=0)
    given = torch.where(lengths > 0, hint * (HINT * len(like) ** 0.5 / lengths), 0.0).to(like)
    return found + torch.nn.functional.pad(given, (0, width - given.shape[1]))


@lru_cache(maxsize=8)
def _drawn(size: int, width: int) -> Tensor:
    """Numbers at random, (size, width) float32; drawn by the processor, the same for every device."""
    return torch.randn(size, width, generator=torch.Generator().manual_seed(0), device="cpu")


def orthonormal(x: Tensor) -> Tensor:
    """An orthonormal basis of the columns' span."""
    found: Tensor = torch.linalg.qr(x).Q
    return found


def _ritz(matrix: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (k,) float64, falling, M y and the vectors y (n, k) of M within the span of orthonormal z (n, k)."""
    w = matrix @ z
    values, turn = torch.linalg.eigh((z.T @ w).double())
    turn = turn.flip(1).to(z.dtype)
    return values.flip(0), w @ turn, z @ turn


def _missed(matrix: Tensor, y: Tensor, values: Tensor, g: Tensor, rank: int) -> Tensor:
    """What the followed directions lack of invariant ones, to first order: x with (θ − Z) x = G, (n, k).

    In the basis [y, rest], M = [[Θ, Gᵀ], [G, Z]], and y + x is invariant where x Θ = G + Z x − x Gᵀ x. Chebyshev's iteration for
    each column at once: what Z holds is taken to lie below the last value that is followed. Those that are not wanted are
    treated as the last that is: they are there to stand aside.
    Source: Sleijpen and van der Vorst 1996 (the correction); Saad, Iterative Methods for Sparse Linear Systems, algorithm 12.1.
    """
    half = values[-1].clamp(min=torch.finfo(values.dtype).eps * values[0]) / 2
    theta = values.clamp(min=max(values[rank - 1], 2 * half))
    sigma = theta / half - 1
    rho, rest, step = 1 / sigma, g, g / (theta - half)
    x = step.clone()
    for _ in range(DEGREE):
        image = matrix @ step
        rest = rest - theta * step + image - y @ (y.T @ image)
        rho, before = 1 / (2 * sigma - rho), rho
        step = rho * before * step + 2 * rho / half * rest
        x += step
    return x


def _below(mu: float, matrix: Tensor, z: Tensor, values: Tensor) -> bool:
    """Whether M − zΘzᵀ < μ, by a Cholesky factor of the difference. Then Z is below μ too: outside of z both are the same."""
    rest = symmetric.lowered(matrix, z * values.to(z.dtype), z)
    rest.neg_().diagonal().add_(mu)
    return symmetric.factor(rest) is not None
