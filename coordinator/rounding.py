"""What a slice's number format costs: by how much it may differ from the part of the adapter that it stands for."""

from __future__ import annotations

import torch
from torch import Tensor

from protocol.slices import Factors

HAIR = 1.01  # for directions that are orthogonal to float32 alone, and for this arithmetic, which is float32 too


def share(adapter: Factors, slice: Factors, scale: float) -> float:
    """The most that ‖s b' a' − W_r‖_F can be, as a share of ‖W_r‖_F; 0 where W_r is zero.

    adapter: b = U√S (n_out, ≥ r), a = √S Vᵀ (≥ r, n_in); slice: b' (n_out, r), a' (r, n_in), as they travel. With b' = b λ + β
    and a' = λ⁻¹ a + α for some diagonal λ, s b' a' − W_r = β λ⁻¹ a + b λ α + β α. As the columns of b and the rows of a are
    orthogonal, the norms of the first two are √Σ ‖βᵢ‖²‖aᵢ‖²/λᵢ² and √Σ ‖bᵢ‖²‖αᵢ‖²λᵢ²; that of the third is at most Σ ‖βᵢ‖‖αᵢ‖.
    Cost (n_out + n_in) r.
    """
    r = slice.rank
    b, a = adapter.b[:, :r], adapter.a[:r]
    sent_b, sent_a = scale * slice.b.float(), slice.a.float()
    squares = _lengths(b.T).square()
    split = (sent_b * b).sum(dim=0).double() / torch.where(squares > 0, squares, 1.0)  # λ; another is right too, but less sharp
    split = torch.where(split > 0, split, 1.0)
    sent_a = torch.where((sent_b == 0).all(dim=0)[:, None], a, sent_a)  # beside zeros it may be anything
    off_b, off_a = _lengths((sent_b - b * split.float()).T), _lengths(sent_a - a / split.float()[:, None])
    long_b, long_a = squares.sqrt() * split, _lengths(a) / split
    error = (off_b * long_a).norm() + (long_b * off_a).norm() + (off_b * off_a).sum()
    whole = (long_b * long_a).norm()
    return float(HAIR * error / whole) if whole > 0 else 0.0


def _lengths(rows: Tensor) -> Tensor:
    """The rows' lengths, (r,) float64."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return lengths
