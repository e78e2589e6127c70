"""The algebra that strategies share: a sum's best approximation of a rank, and its cut into slices.

While the ranks of a sum's terms add up to clearly less than the matrix's smaller side, the matrix is never formed: what is
decided is decided on Gram matrices of the stacked factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coordinator import memory, truncation
from coordinator.folding import folded, scratch
from coordinator.stacks import stacked
from coordinator.sums import Sum
from protocol import errors
from protocol.plan import Split
from protocol.slices import Factors


@dataclass(frozen=True)
class Truncation:
    """The best approximation of a sum by at most a given rank, b = U√S and a = √S Vᵀ, with its certificate.

    k directions are held, fewer than were asked for where W has no more. The largest |entry| of each left vector is
    positive (the first of equals); which directions stand for equal singular values follows from the order of the terms, which is that of
    their contents, so that the same contributions give the same factors. Energies are those before b and a were rounded to
    float32, which adds some 10⁻⁷ ‖W‖ to the error: it is seen where little more is left out.
    """

    b: Tensor  # (n_out, k) float32
    a: Tensor  # (k, n_in) float32
    s: Tensor  # (k,) float64, singular values, falling
    total: float  # ‖W‖²_F; 0 where it is nothing but rounding
    stacked_rank: int
    short: float  # the share of ‖W‖²_F by which the best of this rank may hold more; 0 where this is the best

    def kept(self, rank: int) -> float:
        """The share of ‖W‖²_F in the leading directions: 1 − ‖W − W_rank‖² / ‖W‖²; 1 where W is zero."""
        return min(1.0, float(self.s[:rank].square().sum()) / self.total) if self.total > 0 else 1.0

    def padded(self, rank: int) -> Factors:
        """The factors with zero directions up to that rank."""
        return pad(Factors(b=self.b, a=self.a), rank)


def truncate(w: Sum, rank: int) -> Truncation:
    """The best approximation of a sum by at most that rank, with energies from its own Gram matrices.

    Which method is tried first follows from shape, stacked rank and rank alone (see `truncation`). A shortened one counts only
    with the proof that what it leaves out is within 1 % of the least that can be left out; otherwise the exact one is used, and
    where directions cancel so far that their Gram matrices would not see what they leave, or are so many that these would take more
    memory, the dense sum.
    Raises NoContributions for an empty sum, MismatchedSlice for factors of other shapes, NonFiniteSlice for NaN,
    infinity, or a result that float32 cannot hold.
    """
    if not w.terms:
        raise errors.NoContributions("a sum needs at least one term")
    return written(_singular(w, rank), w.rank)


def _singular(w: Sum, rank: int) -> truncation.Singular:
    if truncation.wide(w.shape, w.rank, rank):
        return folded(w, rank)
    size = truncation.scratch(w.shape, w.rank)
    with memory.SHARED.taken(size):
        stack = stacked(w)
        found = truncation.quick(stack, rank) if truncation.quicker(w.shape, stack.rank, rank) else None
        if found is None and size <= max(memory.LIMIT, scratch(w.shape)):
            found = truncation.exact(stack, rank)
    return found or folded(w, rank)


def held(w: Sum, found: Truncation, total: float, ranks: Sequence[int]) -> dict[int, float]:
    """1 − ‖W − K_r‖² / ‖W‖² for the leading r directions of another matrix K, which need not be W's own; total: ‖W‖²_F.

    Negative where K_r is farther from W than nothing is, as averages of factors in unlike gauges may be.
    ‖W − K_r‖² = ‖W‖² − Σ (2 ⟨W, uᵢ σᵢ vᵢᵀ⟩ − σᵢ²), the products from factors alone. Cost D R r.
    """
    inner = torch.zeros(len(found.s), dtype=torch.float64)
    b, a = found.b.double(), found.a.double()
    for term in w.terms:
        part = term.load(w.shape)
        inner += ((b.T @ part.b.double()) * (a @ part.a.double().T)) @ term.weights()
    gained = 2 * inner - found.s.square()
    return {rank: min(1.0, float(gained[:rank].sum()) / total) if total > 0 else 1.0 for rank in ranks}


def written(found: truncation.Singular, stacked_rank: int) -> Truncation:
    """Singular triplets as they are published. Raises NonFiniteSlice where float32 cannot hold them."""
    b, a = found.b.float(), found.a.float()
    if not (_finite(b) and _finite(a)):
        raise errors.NonFiniteSlice("the merged factors are larger than float32 can hold")
    b, a = _signed(b, a)
    total = found.total if len(found.squares) else 0.0
    short = max(0.0, found.most - float(found.squares.sum())) / total if total > 0 else 0.0
    return Truncation(b=b, a=a, s=found.squares.sqrt(), total=total, stacked_rank=stacked_rank, short=short)


def _finite(x: Tensor) -> bool:
    return not x.numel() or (math.isfinite(float(x.amax())) and math.isfinite(float(x.amin())))


def _signed(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    if not b.shape[1]:
        return b, a
    signs = b.amax(dim=0) + b.amin(dim=0)  # of the larger of both; many times quicker than to ask where it is
    if bool((tied := signs == 0).any()):
        first = b[:, tied].abs().argmax(dim=0, keepdim=True)
        signs[tied] = b[:, tied].gather(0, first).squeeze(0)
    signs = torch.where(signs < 0, -1.0, 1.0)
    return b * signs, signs[:, None] * a


def pad(factors: Factors, rank: int) -> Factors:
    """The factors with zero directions up to that rank."""
    if (missing := rank - factors.rank) <= 0:
        return factors
    b = torch.nn.functional.pad(factors.b, (0, missing))
    a = torch.nn.functional.pad(factors.a, (0, 0, 0, missing))
    return Factors(b=b, a=a)


def cut(adapter: Factors, rank: int, scale: float, split: Split | None, fresh: Tensor, dtype: torch.dtype) -> Factors:
    """The slice of that rank: s · b @ a is the adapter's leading part, in the dtype in which it travels.

    adapter: b = U√S, a = √S Vᵀ with S falling (zero directions last), or without a split any b and a, of which a stays as it
    is and b is divided by the scale; fresh: (≥ rank, n_in), the rows that a direction
    begins with where the adapter has none. There b is zero, so the product is still the adapter's, and the pair learns:
    a pair of which both sides are zero has no gradient, for ever.
    """
    whole = pad(adapter, rank)
    b, a = whole.b[:, :rank], whole.a[:rank]
    left, right = (x.to(b.dtype) for x in _split(b, a, scale, split))
    b, a = (b * left).to(dtype), (right[:, None] * a).to(dtype)
    if bool((dead := _zero(b.T) & _zero(a)).any()):
        a = torch.where(dead[:, None], fresh[:rank].to(a), a)
    return Factors(b=b, a=a)


def _zero(x: Tensor) -> Tensor:
    """Which rows are nothing but zeros."""
    return (x.amax(dim=1) == 0) & (x.amin(dim=1) == 0)


def _split(b: Tensor, a: Tensor, scale: float, split: Split | None) -> tuple[Tensor, Tensor]:
    """Factors for the columns of b and the rows of a, (r,) each, float64; their products are 1 / scale."""
    match split:
        case Split.balanced:
            root = torch.full((len(a),), scale**-0.5, dtype=torch.float64)
            return root, root
        case Split.left:
            norm = _lengths(a.T)
            return norm / scale, 1 / norm
        case Split.right:
            norm = _lengths(b)
            return 1 / norm, norm / scale
        case None:
            return torch.full((len(a),), 1 / scale, dtype=torch.float64), torch.ones(len(a), dtype=torch.float64)


def _lengths(x: Tensor) -> Tensor:
    """The columns' lengths, one where a column is zero."""
    found = torch.linalg.vector_norm(x, dim=0, dtype=torch.float64)
    return torch.where(found > 0, found, 1.0)
