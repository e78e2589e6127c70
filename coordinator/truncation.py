"""From a stack to its leading singular triplets by Gram matrices, and the rule that says in which precision.

exact    Gram matrices in float64, all of what is left out proved to be within EXACT of the least, or a full decomposition; none
         where directions cancel so far that they hide it
quick    Gram matrices in float32, what is left out proved to be within HAIR of the least; none where that cannot be proved
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coordinator import spectrum, symmetric
from coordinator.stacks import Stack
from protocol import errors

HAIR = 0.01  # what the quick methods leave out is at most so much more than the least that can be left out
EXACT = 1e-8  # the error of what is kept exceeds the least by at most this share of ‖W‖
SEEN = 1e-9  # no share of ‖W‖² as large as this may be lost in the rounding of directions that cancel
NARROW = 128  # a stack up to here is done exactly before anything else has begun
ADVANTAGE = 1.2  # times by the estimate below: an exact result is worth a little
NOISE = 2e-8  # of what is left out by float32 Gram matrices, as a share of the whole; measured: below 1e-8
OPERATOR_NOISE = 4 * torch.finfo(torch.float32).eps  # the same of their largest eigenvalue
LIFT = 4e-6  # of a float32 Gram matrix, so that nearly dependent rows have a Cholesky factor; it only raises eigenvalues
DEPENDENT = 0.01  # of what columns of length one have of their own
FLOAT32_SQUARES = (1e-30, 1e30)  # squares within these bounds keep their digits in float32


@dataclass(frozen=True)
class Singular:
    """Leading singular triplets with ‖W‖²_F, and the most that as many squared singular values can sum to."""

    b: Tensor  # (n_out, k), U√S
    a: Tensor  # (k, n_in), √S Vᵀ
    squares: Tensor  # (k,) squared singular values, falling, float64
    total: float
    most: float


def quicker(shape: tuple[int, int], stacked: int, rank: int) -> bool:
    """Whether the quick method is worth trying."""
    slow, fast, _folded = seconds(shape, stacked, rank)
    return stacked > max(NARROW, 2 * (rank + spectrum.EXTRA)) and slow > ADVANTAGE * fast


def wide(shape: tuple[int, int], stacked: int, rank: int) -> bool:
    """Whether one dense matrix is less work than the Gram matrices of a stack; it always is from the smaller side on."""
    slow, fast, folded = seconds(shape, stacked, rank)
    return stacked >= min(shape) or (stacked > NARROW and folded < (fast if quicker(shape, stacked, rank) else slow))


def seconds(shape: tuple[int, int], stacked: int, rank: int) -> tuple[float, float, float]:
    """What the exact, the quick and the folded method take on one core, by a fit to times measured on an Intel Xeon.

    The terms are the Gram matrices, their decomposition, and the steps of the iteration with the result.
    """
    sides, area, width = sum(shape), shape[0] * shape[1], rank + spectrum.EXTRA
    slow = sides * stacked**2 / 53e9 + stacked**3 / 13e9 + stacked**2 * (width + rank) / 1.6e9 + 0.009
    fast = sides * stacked**2 / 109e9 + stacked**3 / 25e9 + stacked**2 * width / 2.4e9 + 0.006
    folded = area * stacked / 40e9 + area * min(shape) / 83e9 + area * width / 3e9 + 0.008
    return slow, fast, folded


def scratch(shape: tuple[int, int], stacked: int) -> int:
    """Bytes: the stack in float32, and what the exact method makes of it."""
    return 4 * sum(shape) * stacked + 48 * stacked**2


@dataclass(frozen=True)
class _Grams:
    """The Gram matrices of a stack, the weights in that of b: they may be negative, so they are no roots in the factors."""

    a: Tensor  # A Aᵀ, (R, R)
    b: Tensor  # diag(c) Bᵀ B diag(c), (R, R)
    total: float  # ‖W‖²_F
    floor: float  # the sum of the directions' own energies: where they cancel, rounding is as large as they were

    @classmethod
    def of(cls, stack: Stack, dtype: torch.dtype) -> _Grams:
        a, b = symmetric.gram(stack.a, dtype), symmetric.gram(stack.b.T, dtype)
        c = stack.c.to(dtype)
        b.mul_(c[:, None]).mul_(c)
        floor = float(a.diagonal().double().dot(b.diagonal().double()))
        return cls(a, b, float((a * b).sum(dtype=torch.float64)), floor)


def exact(stack: Stack, rank: int) -> Singular | None:
    """Singular triplets from the R × R Gram matrices of the stack in float64; scratch 6 R² float64.

    With A Aᵀ = L Lᵀ, C = diag(c):  S = Lᵀ C BᵀB C L  has the squared singular values of W = B C A as eigenvalues. None where the
    directions cancel so far that their rounding, which is as large as they are, would hide what they leave.
    """
    grams = _Grams.of(stack, torch.float64)
    finite(grams.floor)
    if symmetric.tolerance(stack.rank) * grams.floor > SEEN * grams.total:
        return None
    root = symmetric.root(grams.a)  # (R, k)
    core, hint = symmetric.sandwich(root, grams.b), _mean(stack, root, rank)
    found = leading(core, rank, grams.total, grams.floor, hint)
    return _triplets(stack, grams, root @ found.vectors, found.most)


def quick(stack: Stack, rank: int) -> Singular | None:
    """Singular triplets within a hair of the best, or none where float32 cannot prove it; scratch 6 R² float32.

    A float32 Gram matrix resolves no singular value below some 3·10⁻⁴ of the largest, nor energies below NOISE of the whole:
    what needs more is left to the exact method.
    """
    grams = _Grams.of(stack, torch.float32)
    own = torch.stack([grams.a.diagonal(), grams.b.diagonal()])
    if not within_float32(own) or (root := symmetric.cholesky(grams.a, LIFT)) is None:
        return None
    core = symmetric.sandwich(root, grams.b)
    blur = NOISE * max(grams.total, grams.floor)
    noise = OPERATOR_NOISE * max(grams.floor, float(core.norm()))
    allowed, hint = a_hair(grams.total, blur), _mean(stack, root, rank)
    near = spectrum.certified(core, rank, width=rank + spectrum.EXTRA, noise=noise, allowed=allowed, hint=hint)
    if near is None:
        return None
    found = _triplets(stack, grams, root @ near.vectors[:, :rank], near.most)
    found = replace(found, most=found.most + blur)
    kept = float(found.squares.sum())
    return found if found.most - kept <= a_hair(grams.total)(kept) else None


def _mean(stack: Stack, root: Tensor, rank: int) -> Tensor:
    """The weighted mean of the clients' a, its first directions in the root's basis, (k, rank): what W's own mostly resemble."""
    live = (stack.places < rank).nonzero().squeeze(1)
    weights = torch.zeros(stack.rank, rank, dtype=root.dtype)
    weights[live, stack.places[live]] = (stack.c / torch.linalg.vector_norm(stack.c))[live].to(root.dtype)
    return root.T @ weights


def leading(matrix: Tensor, rank: int, total: float, floor: float, hint: Tensor | None = None) -> spectrum.Leading:
    """The largest eigenvalues of a float64 Gram matrix: proved to be nearly exact where few of many are wanted, else exact.

    Those that do not stand out of rounding are left out. `floor` is the sum of the directions' own energies: where they
    cancel, rounding is as large as they were, not as W is.
    """
    width, found = rank + spectrum.EXTRA, None
    if len(matrix) >= 4 * width:
        noise = symmetric.tolerance(len(matrix)) * max(floor, float(matrix.norm()))
        near = spectrum.certified(matrix, rank, width=width, noise=noise, allowed=_nothing(total), hint=hint)
        found = near and spectrum.Leading(near.values[:rank], near.vectors[:, :rank], near.most)
    found = found or spectrum.exact(matrix, rank)
    largest = float(found.values[0]) if len(found.values) else 0.0
    live = found.values > symmetric.tolerance(len(matrix)) * max(largest, floor)
    return spectrum.Leading(found.values[live], found.vectors[:, live], found.most)


def _triplets(stack: Stack, grams: _Grams, x: Tensor, most: float) -> Singular:
    """The singular triplets of W projected on the columns of B C x, for x (R, k).

    Their squared singular values are the eigenvalues λ of the pencil (Nᵀ AAᵀ N, xᵀ N) with N = C BᵀB C x, whose vectors
    v give  U = B (C x v)  and  Vᵀ = (vᵀ Nᵀ / √λ) A:  the projection is W's own, whatever the columns are.
    """
    x = x.double()
    n = product(grams.b, x)
    values, v = pencil(n.T @ product(grams.a, n), x.T @ n)
    x, n = x @ (v * values.pow(0.25)), n @ (v / values.pow(0.25))
    dtype = torch.float32 if grams.a.dtype == torch.float32 or _coarse(stack, grams, x, n, values) else torch.float64
    b = product(stack.b, (stack.c[:, None] * x).to(dtype)).to(stack.b.dtype)
    a = product(stack.a.T, n.to(dtype)).T.to(stack.a.dtype)
    return Singular(b, a, values, grams.total, max(most, float(values.sum())))


def _coarse(stack: Stack, grams: _Grams, x: Tensor, n: Tensor, values: Tensor) -> bool:
    """Whether the last products may be formed in float32: its rounding adds less than EXACT · ‖W‖ to the error.

    What stands at random adds its square to the square of what is left out. It is as large as the summands, which may be larger
    than their sum, B C x or A ᵀn.
    """
    squares = torch.stack([grams.a.diagonal(), grams.b.diagonal()])
    if stack.b.dtype != torch.float32 or not within_float32(squares) or not within_float32(values):
        return False
    lengths = squares.sqrt()
    summands = (lengths[0] @ n.abs()).square() + (lengths[1] @ x.abs()).square()
    rounding = 8 * torch.finfo(torch.float32).eps ** 2 * float((values.sqrt() * summands).sum())
    return bool(rounding <= EXACT * (grams.total * max(0.0, grams.total - float(values.sum()))) ** 0.5)


def pencil(outer: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    """λ, falling, and v with outer v = inner v λ and vᵀ inner v = 1; outer, inner: (k, k) float64.

    Columns that depend on others are left out: those are rounding.
    """
    t = inner.diagonal().rsqrt()
    values, turn = torch.linalg.eigh(t[:, None] * inner * t)
    live = values > DEPENDENT
    white = t[:, None] * (turn[:, live] / values[live].sqrt())
    values, v = torch.linalg.eigh(white.T @ outer @ white)
    return values.flip(0), white @ v.flip(1)


def product(x: Tensor, y: Tensor) -> Tensor:
    """x y in y's dtype, for a long x (n, R), which is turned into that some rows at a time; it lies in memory as x does."""
    n, k = len(x), y.shape[1]
    found = torch.empty(n, k, dtype=y.dtype) if x.stride(1) == 1 else torch.empty(k, n, dtype=y.dtype).T
    rows = max(1, n if x.dtype == y.dtype else symmetric.CHUNK // (y.itemsize * max(1, len(y))))
    for start in range(0, n, rows):
        torch.mm(x[start : start + rows].to(y.dtype), y, out=found[start : start + rows])
    return found


def a_hair(total: float, blur: float = 0.0) -> spectrum.Allowed:
    """What is left out is at most 1 + HAIR times what any choice would leave out; energies are known to ± blur."""
    return lambda kept: HAIR / (1 + HAIR) * (total - kept) - blur


def _nothing(total: float) -> spectrum.Allowed:
    """‖W − W_kept‖ exceeds the least of all errors by at most EXACT · ‖W‖, and the squares by this."""
    return lambda kept: EXACT * (total * max(0.0, total - kept)) ** 0.5


def within_float32(squares: Tensor) -> bool:
    """Whether all of them keep their digits in float32."""
    least, largest = FLOAT32_SQUARES
    return bool(((squares > least) & (squares < largest)).all())


def finite(number: float) -> float:
    """The number itself. Raises NonFiniteSlice for NaN and infinity."""
    if number != number or number == float("inf"):
        raise errors.NonFiniteSlice("factors that enter the sum hold NaN or infinity, or are too large to be squared")
    return number
