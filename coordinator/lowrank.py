"""The algebra that strategies share: a sum's best approximation of a rank, and its cut into slices.

While the ranks of a sum's terms add up to less than the matrix's smaller side, the matrix is never formed; all that is
decided is decided on Gram matrices of the stacked factors, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coordinator.sums import Sum
from protocol import errors
from protocol.plan import Split
from protocol.slices import Factors

EPSILON = torch.finfo(torch.float64).eps
CHUNK = 256  # columns of the stack that are widened to float64 at a time
BLOCK = 512  # directions that are folded into a dense sum at a time


@dataclass(frozen=True)
class Truncation:
    """The best approximation of a sum by at most a given rank, b = U√S and a = √S Vᵀ, with its certificate.

    k directions are held, fewer than were asked for where W has no more. The largest |entry| of each left vector is
    positive (the first of equals), so that equal sums give equal factors.
    """

    b: Tensor  # (n_out, k) float32
    a: Tensor  # (k, n_in) float32
    s: Tensor  # (k,) float64, singular values, falling
    total: float  # ‖W‖²_F
    stacked_rank: int

    def kept(self, rank: int) -> float:
        """The share of ‖W‖²_F in the leading directions: 1 − ‖W − W_rank‖² / ‖W‖²; 1 where W is zero."""
        return min(1.0, float(self.s[:rank].square().sum()) / self.total) if self.total > 0 else 1.0

    def padded(self, rank: int) -> Factors:
        """The factors with zero directions up to that rank."""
        return pad(Factors(b=self.b, a=self.a), rank)


def truncate(w: Sum, rank: int) -> Truncation:
    """The best approximation of a sum by at most that rank, with exactly computed energies.

    Below a stacked rank R of the smaller side: Gram matrices of the stack, cost (n_out + n_in) R² + R³, scratch 6 R²
    float64. From there on: the terms are folded into one dense float64 matrix, whatever their number.
    Raises NoContributions for an empty sum, MismatchedSlice for factors of other shapes, NonFiniteSlice for NaN,
    infinity, or a result that float32 cannot hold.
    """
    if not w.terms:
        raise errors.NoContributions("a sum needs at least one term")
    method: Callable[[Sum, int], _Singular] = _factored if w.rank < min(w.shape) else _folded
    found = method(w, rank)
    u, vt = _signed(found.u, found.vt)
    roots = found.squares.pow(0.25)
    b, a = (u * roots).float(), (roots[:, None] * vt).float()
    if not bool(torch.isfinite(b).all() and torch.isfinite(a).all()):
        raise errors.NonFiniteSlice("the merged factors are larger than float32 can hold")
    total = found.total if len(roots) else 0.0
    return Truncation(b=b, a=a, s=found.squares.sqrt(), total=total, stacked_rank=w.rank)


@dataclass(frozen=True)
class _Singular:
    """Leading singular triplets, float64, with ‖W‖²_F."""

    u: Tensor  # (n_out, k)
    squares: Tensor  # (k,) squared singular values, falling
    vt: Tensor  # (k, n_in)
    total: float


def _factored(w: Sum, rank: int) -> _Singular:
    """Singular triplets from the R × R Gram matrices of the stack.

    With B = [b₁ …], A = [a₁; …], C = diag(w) and A Aᵀ = L Lᵀ:  S = Lᵀ C BᵀB C L  has the squared singular values of
    W = B C A as eigenvalues λ with vectors v, and  U = B (C L v / √λ),  Vᵀ = (vᵀ Lᵀ C BᵀB C / λ) A.  The weights stand on
    the R × R side and not as roots in the factors, because they may be negative.
    """
    parts = [term.load(w.shape) for term in w.terms]
    c = torch.cat([term.weights() for term in w.terms])  # (R,)
    gram_a = _gram([part.a for part in parts])
    gram_b = c[:, None] * _gram([part.b.T for part in parts]) * c
    floor = _finite(float((gram_a.diagonal() * gram_b.diagonal()).sum()))
    root = _root(gram_a)  # (R, k)
    t = root.T @ gram_b  # (k, R)
    squares, v = _leading(t @ root, rank, floor)
    m = c[:, None] * (root @ v) / squares.sqrt()  # (R, r): U = B m
    n = (v.T @ t) / squares[:, None]  # (r, R): Vᵀ = n A
    u = torch.zeros(w.shape[0], len(squares), dtype=torch.float64)
    vt = torch.zeros(len(squares), w.shape[1], dtype=torch.float64)
    start = 0
    for part in parts:
        here = slice(start, start + part.rank)
        u.addmm_(part.b.double(), m[here])
        vt.addmm_(n[:, here], part.a.double())
        start += part.rank
    return _Singular(u=u, squares=squares, vt=vt, total=float((gram_a * gram_b).sum()))


def _folded(w: Sum, rank: int) -> _Singular:
    """Singular triplets of the dense sum, from the Gram matrix of its smaller side; one block of terms in memory."""
    dense = torch.zeros(w.shape, dtype=torch.float64)
    floor = 0.0
    block: list[tuple[Tensor, Tensor]] = []
    for number, term in enumerate(w.terms, start=1):
        part, c = term.load(w.shape), term.weights()
        b, a = part.b.double() * c, part.a.double()
        floor += _finite(float((b.square().sum(dim=0) * a.square().sum(dim=1)).sum()))
        block.append((b, a))
        if number == len(w.terms) or sum(len(a) for _, a in block) >= BLOCK:
            dense.addmm_(torch.cat([b for b, _ in block], dim=1), torch.cat([a for _, a in block], dim=0))
            block.clear()
    wide = w.shape[0] <= w.shape[1]
    side = dense if wide else dense.T  # its rows are the smaller side
    squares, v = _leading(side @ side.T, rank, floor)
    other = (v / squares.sqrt()).T @ side
    u, vt = (v, other) if wide else (other.T, v.T)
    return _Singular(u=u, squares=squares, vt=vt, total=float(dense.square().sum()))


def _gram(parts: Sequence[Tensor]) -> Tensor:
    """X Xᵀ of the stacked rows of the parts, (R, R) float64; the stack is widened one chunk of columns at a time."""
    size = sum(len(part) for part in parts)
    width = parts[0].shape[1]
    gram = torch.zeros(size, size, dtype=torch.float64)
    bands = [slice(start, min(start + -(-size // 4), size)) for start in range(0, size, max(1, -(-size // 4)))]
    for start in range(0, width, CHUNK):
        x = torch.cat([part[:, start : start + CHUNK].double() for part in parts])
        for band in bands:  # only the upper triangle, in four bands
            gram[band, band.start :].addmm_(x[band], x[band.start :].T)
    return gram.triu() + gram.triu(1).T


def _root(gram: Tensor) -> Tensor:
    """L with L Lᵀ = gram, (R, k): Cholesky, or eigenvectors where rows depend on each other, as slices of one matrix do.

    Scaled to a unit diagonal first, so that neither method sees how large the single rows are. Only L Lᵀ is used of L and
    never its inverse, so nearly dependent rows do no harm: both methods give L Lᵀ to rounding.
    """
    t = gram.diagonal().sqrt()
    inverse = torch.where(t > 0, 1 / t, 0.0)
    correlation = inverse[:, None] * gram * inverse
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(correlation)
    if not int(failed):
        return t[:, None] * lower
    values: Tensor
    vectors: Tensor
    values, vectors = torch.linalg.eigh(correlation)
    live = values > _tolerance(len(gram)) * values[-1]
    return t[:, None] * (vectors[:, live] * values[live].sqrt())


def _leading(gram: Tensor, rank: int, floor: float) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues, falling, and their vectors in columns, as far as they stand out of rounding.

    `floor` is the sum of the terms' own energies: where terms cancel, rounding is as large as they were, not as W is.
    """
    values, vectors = torch.linalg.eigh(gram)  # looks at one triangle, so rounding need not be symmetric
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    live = values > _tolerance(len(gram)) * max(float(values[0]), floor)
    return values[live], vectors[:, live]


def _tolerance(size: int) -> float:
    """Smallest squared singular value that counts, relative to the largest: what float32 resolves, or a float64 Gram."""
    return max(float(torch.finfo(torch.float32).eps) ** 2, size * EPSILON)


def _finite(number: float) -> float:
    if number != number or number == float("inf"):
        raise errors.NonFiniteSlice("factors that enter the sum hold NaN or infinity, or are too large to be squared")
    return number


def _signed(u: Tensor, vt: Tensor) -> tuple[Tensor, Tensor]:
    if not u.shape[1]:
        return u, vt
    largest = u.gather(0, u.abs().argmax(dim=0, keepdim=True)).squeeze(0)  # argmax gives the first of equals
    signs = torch.where(largest < 0, -1.0, 1.0).double()
    return u * signs, signs[:, None] * vt


def pad(factors: Factors, rank: int) -> Factors:
    """The factors with zero directions up to that rank."""
    missing = max(0, rank - factors.rank)
    b = torch.nn.functional.pad(factors.b, (0, missing))
    a = torch.nn.functional.pad(factors.a, (0, 0, 0, missing))
    return Factors(b=b, a=a)


def cut(adapter: Factors, rank: int, scale: float, split: Split, fresh: Tensor, dtype: torch.dtype) -> Factors:
    """The slice of that rank: s · b @ a is the adapter's leading part, in the dtype in which it travels.

    adapter: b = U√S, a = √S Vᵀ with S falling (zero directions last); fresh: (≥ rank, n_in), the rows that a direction
    begins with where the adapter has none. There b is zero, so the product is still the adapter's, and the pair learns:
    a pair of which both sides are zero has no gradient, for ever.
    """
    whole = pad(adapter, rank)
    b, a = whole.b[:, :rank].double(), whole.a[:rank].double()
    left, right = _split(b, a, scale, split)
    b, a = (b * left).to(dtype), (right[:, None] * a).to(dtype)
    dead = ~((b != 0).any(dim=0) | (a != 0).any(dim=1))
    return Factors(b=b, a=torch.where(dead[:, None], fresh[:rank].to(dtype), a))


def _split(b: Tensor, a: Tensor, scale: float, split: Split) -> tuple[Tensor, Tensor]:
    """Factors for the columns of b and the rows of a, (r,) each; their products are 1 / scale."""
    norm_b, norm_a = b.norm(dim=0), a.norm(dim=1)
    norm_b, norm_a = torch.where(norm_b > 0, norm_b, 1.0), torch.where(norm_a > 0, norm_a, 1.0)
    match split:
        case Split.balanced:
            return torch.full_like(norm_b, scale**-0.5), torch.full_like(norm_a, scale**-0.5)
        case Split.left:
            return norm_a / scale, 1 / norm_a
        case Split.right:
            return 1 / norm_b, norm_b / scale
