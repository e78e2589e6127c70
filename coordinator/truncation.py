"""The three ways from a sum to its leading singular triplets, and the rule that chooses among them.

exact    Gram matrices of the stack in float64             the rule where the stack is narrow, and the last resort
quick    the same in float32, with a proof beside it        where it is at least ADVANTAGE times as quick
folded   one dense matrix, whatever the number of terms    where the stacked rank reaches the matrix's smaller side
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coordinator import spectrum
from coordinator.sums import Sum
from protocol import errors
from protocol.slices import Factors

BLOCK = 512  # directions that are folded into a dense sum at a time
LARGE = 1 << 30  # multiplications from which a dense sum's blocks are multiplied in float32, and added up in float64
NARROW = 128  # a stack up to here is done exactly before anything else has begun
ADVANTAGE = 4.0  # times by the estimate below, which flatters the quick method: an exact result is worth some seconds
NOISE = 2e-8  # of an energy that is summed from float32 Gram matrices, relative; measured: below 1e-8
OPERATOR_NOISE = 4 * torch.finfo(torch.float32).eps  # the same of their largest eigenvalue
LIFT = 4e-6  # of a float32 Gram matrix, so that nearly dependent rows have a Cholesky factor; it only raises eigenvalues
FLOAT32_SQUARES = (1e-30, 1e30)  # squares within these bounds keep their digits in float32


@dataclass(frozen=True)
class Singular:
    """Leading singular triplets with ‖W‖²_F, and the most that as many squared singular values can sum to."""

    u: Tensor  # (n_out, k)
    squares: Tensor  # (k,) squared singular values, falling, float64
    vt: Tensor  # (k, n_in)
    total: float
    most: float


@dataclass(frozen=True)
class Stack:
    """W = Σ b diag(c) a with everything in memory: b (n_out, r), a (r, n_in), c the weights of all directions in turn."""

    parts: Sequence[Factors]
    c: Tensor  # (R,) float64

    @property
    def rank(self) -> int:
        return len(self.c)


def quicker(shape: tuple[int, int], stacked: int, rank: int) -> bool:
    """Whether the quick method is worth trying: seconds of both on one core, by rates measured on a Zen 4 core.

    float64: Gram 37 GFLOP/s, decomposition 0.43 ns R³, products 35; float32: 76 (products 75 and 90 within the cache).
    """
    sides, width = sum(shape), rank + spectrum.EXTRA
    slow = sides * stacked**2 / 37e9 + stacked**3 * 0.43e-9 + 2 * sides * stacked * rank / 35e9
    fast = sides * stacked**2 / 76e9 + 5 * stacked**3 / 90e9 + (12 * stacked**2 + 3 * sides * stacked) * width / 75e9
    return stacked > max(NARROW, 2 * width) and slow > ADVANTAGE * fast


def collapsed(w: Sum) -> Stack:
    """The terms in memory; those that repeat the first one's leading directions are folded into its weights.

    The slices that clients were given are cut from the adapter, so where they travel in float32 they are its directions up
    to a factor and float32's rounding, which is what the adapter itself was rounded to. Then they cost nothing.
    """
    first = w.terms[0]
    parts, weights = [first.load(w.shape)], [first.weights().clone()]
    for term in w.terms[1:]:
        part, c = term.load(w.shape), term.weights()
        multiples = _nested(part, parts[0])
        if multiples is None:
            parts.append(part)
            weights.append(c)
        else:
            weights[0][: part.rank] += c * multiples
    if len(parts) > 1:
        parts[0], weights[0] = _counting(parts[0], weights[0], largest=max(float(c.abs().max()) for c in weights))
    return Stack(parts, torch.cat(weights))


def _counting(part: Factors, c: Tensor, largest: float) -> tuple[Factors, Tensor]:
    """The directions that have numbers and a weight: folded weights may cancel, and leave rounding."""
    live = (c.abs() > 16 * spectrum.EPSILON * largest) & ((part.b != 0).any(dim=0) | (part.a != 0).any(dim=1))
    return (part, c) if bool(live.all()) else (Factors(b=part.b[:, live], a=part.a[live]), c[live])


def _nested(part: Factors, whole: Factors) -> Tensor | None:
    """m with b diag(1) a = b′ diag(m) a′ for the leading directions b′, a′ of the whole, (r,) float64; none if there is none."""
    r = part.rank
    if r > whole.rank or any(x.dtype != torch.float32 for x in (part.a, part.b, whole.a, whole.b)):
        return None
    if (left := _multiples(part.b, whole.b[:, :r])) is None:
        return None
    live = left != 0  # a direction with nothing in b adds nothing, whatever fresh row stands in a
    right = _multiples(part.a[live].T, whole.a[:r][live].T)
    if right is None or not bool(torch.isfinite(part.a).all()):
        return None
    found = torch.zeros(r, dtype=torch.float64)
    found[live] = left[live] * right
    return found


def _multiples(x: Tensor, y: Tensor) -> Tensor | None:
    """m with x = y diag(m) to float32's rounding; none if there is none. x, y: (n, r)."""
    at = y.abs().argmax(dim=0, keepdim=True)
    largest = y.gather(0, at).double()
    m = torch.where(largest == 0, 0.0, x.gather(0, at).double() / largest)
    hair = 2 * torch.finfo(torch.float32).eps
    for rows in (slice(0, 16), slice(16, None)):  # a trained slice is told from the first few
        if not bool(((x[rows] - m * y[rows]).abs() <= hair * x[rows].abs()).all()):
            return None
    return m.squeeze(0)


def exact(stack: Stack, rank: int) -> Singular:
    """Singular triplets from the R × R Gram matrices of the stack in float64; scratch 6 R² float64.

    With B = [b₁ …], A = [a₁; …], C = diag(c) and A Aᵀ = L Lᵀ:  S = Lᵀ C BᵀB C L  has the squared singular values of
    W = B C A as eigenvalues λ with vectors v, and  U = B (C L v / √λ),  Vᵀ = (vᵀ Lᵀ C BᵀB C / λ) A.  The weights stand on
    the R × R side and not as roots in the factors, because they may be negative.
    """
    c = stack.c
    gram_a = spectrum.gram([part.a for part in stack.parts], torch.float64)
    gram_b = c[:, None] * spectrum.gram([part.b.T for part in stack.parts], torch.float64) * c
    floor = finite(float((gram_a.diagonal() * gram_b.diagonal()).sum()))
    root = spectrum.root(gram_a)  # (R, k)
    t = root.T @ gram_b  # (k, R)
    found = _above(spectrum.exact(t @ root, rank), floor, stack.rank)
    m = c[:, None] * (root @ found.vectors) / found.values.sqrt()  # (R, r): U = B m
    n = (found.vectors.T @ t) / found.values[:, None]  # (r, R): Vᵀ = n A
    u = torch.zeros(len(stack.parts[0].b), len(found.values), dtype=torch.float64)
    vt = torch.zeros(len(found.values), stack.parts[0].a.shape[1], dtype=torch.float64)
    start = 0
    for part in stack.parts:
        here = slice(start, start + part.rank)
        u.addmm_(part.b.double(), m[here])
        vt.addmm_(n[:, here], part.a.double())
        start += part.rank
    return Singular(u, found.values, vt, float((gram_a * gram_b).sum()), found.most)


def quick(stack: Stack, rank: int) -> Singular | None:
    """Singular triplets within a hair of the best, or none where float32 cannot prove it; scratch 5 R² float32.

    The directions are found on the float32 Gram matrices, by subspace iteration; then W is projected on them, so that the
    triplets and what they hold are those of W itself. A float32 Gram matrix resolves no singular value below some 3·10⁻⁴
    of the largest, nor energies below NOISE of the whole: what needs more is left to the exact method.
    """
    b = torch.cat([part.b.float() for part in stack.parts], dim=1)
    a = torch.cat([part.a.float() for part in stack.parts])
    high = stack.c.float()
    low = (stack.c - high).float()
    # In two parts: a weight that is rounded once for all of a direction's numbers shifts every energy the same way.
    a = (a * high[:, None]).addcmul_(a, low[:, None])
    gram_a, gram_b = spectrum.gram([a], torch.float32), spectrum.gram([b.T], torch.float32)
    own = torch.stack([gram_a.diagonal(), gram_b.diagonal()]).double()
    if not bool(((own > FLOAT32_SQUARES[0]) & (own < FLOAT32_SQUARES[1])).all()) or (root := spectrum.cholesky(gram_a, LIFT)) is None:
        return None
    total, floor = float((gram_a.double() * gram_b.double()).sum()), float(own.prod(dim=0).sum())
    core = root.T @ (gram_b @ root)
    found = spectrum.certified(core, rank, OPERATOR_NOISE * max(floor, float(core.norm())))
    if found is None:
        return None
    q = _orthonormal(b @ (root @ found.vectors))  # (n_out, s)
    projected = (q.T @ b) @ a  # (s, n_in)
    inner = spectrum.exact(spectrum.gram([projected], torch.float64), rank)
    if not spectrum.within_a_hair(float(inner.values.sum()), found.most + NOISE * max(total, floor), total):
        return None
    turn = inner.vectors.float()
    vt = (turn.T @ projected) / inner.values.sqrt().float()[:, None]
    return Singular(q @ turn, inner.values, vt, total, max(found.most, float(inner.values.sum())))


def _orthonormal(y: Tensor) -> Tensor:
    """An orthonormal basis of the columns of y, which are nearly orthogonal: float32, from a float64 Gram matrix."""
    inner = spectrum.gram([y.T], torch.float64)
    t = inner.diagonal().rsqrt()
    values, vectors = torch.linalg.eigh(t[:, None] * inner * t)
    basis: Tensor = y @ (t[:, None] * vectors / values.sqrt()).float()
    return basis


def folded(w: Sum, rank: int) -> Singular:
    """Singular triplets of the dense sum, from the Gram matrix of its smaller side; one block of terms in memory.

    Blocks of large sums are multiplied in float32: what that adds to the error is some 10⁻⁸ of ‖W‖, as rounding the result does.
    """
    dense = torch.zeros(w.shape, dtype=torch.float64)
    large = w.rank * w.shape[0] * w.shape[1] >= LARGE
    floor = 0.0
    block: list[tuple[Tensor, Tensor]] = []
    for number, term in enumerate(w.terms, start=1):
        part, c = term.load(w.shape), term.weights()
        b, a = part.b.double() * c, part.a.double()
        own = finite(float((b.square().sum(dim=0) * a.square().sum(dim=1)).sum()))
        floor += own
        large = large and FLOAT32_SQUARES[0] < own < FLOAT32_SQUARES[1]
        block.append((b, a))
        if number == len(w.terms) or sum(len(a) for _, a in block) >= BLOCK:
            _add(
                dense, torch.cat([b for b, _ in block], dim=1), torch.cat([a for _, a in block]), torch.float32 if large else torch.float64
            )
            block.clear()
    wide = w.shape[0] <= w.shape[1]
    side = dense if wide else dense.T  # its rows are the smaller side
    found = _leading(spectrum.gram([side], torch.float64), rank, floor)
    v = found.vectors
    other = (v / found.values.sqrt()).T @ side
    u, vt = (v, other) if wide else (other.T, v.T)
    return Singular(u, found.values, vt, float(dense.square().sum()), found.most)


def _add(dense: Tensor, b: Tensor, a: Tensor, dtype: torch.dtype) -> None:
    """dense += b a, multiplied in that dtype, some rows at a time."""
    right = a.to(dtype)
    for start in range(0, len(b), BLOCK):
        rows = slice(start, start + BLOCK)
        dense[rows] += b[rows].to(dtype) @ right


def _leading(gram: Tensor, rank: int, floor: float) -> spectrum.Leading:
    """The largest eigenvalues: with a proof where few of many are wanted, otherwise of a full decomposition."""
    if len(gram) >= 4 * (rank + spectrum.EXTRA):
        noise = spectrum.tolerance(len(gram)) * max(floor, float(gram.norm()))
        if (found := spectrum.certified(gram, rank, noise)) is not None:
            return _above(spectrum.Leading(found.values[:rank], found.vectors[:, :rank], found.most), floor, len(gram))
    return _above(spectrum.exact(gram, rank), floor, len(gram))


def _above(found: spectrum.Leading, floor: float, size: int) -> spectrum.Leading:
    """The eigenvalues that stand out of rounding.

    `floor` is the sum of the terms' own energies: where terms cancel, rounding is as large as they were, not as W is.
    """
    largest = float(found.values[0]) if len(found.values) else 0.0
    live = found.values > spectrum.tolerance(size) * max(largest, floor)
    return spectrum.Leading(found.values[live], found.vectors[:, live], found.most)


def finite(number: float) -> float:
    """The number itself. Raises NonFiniteSlice for NaN and infinity."""
    if number != number or number == float("inf"):
        raise errors.NonFiniteSlice("factors that enter the sum hold NaN or infinity, or are too large to be squared")
    return number
