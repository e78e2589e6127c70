"""What a file's number format costs: by how much it may differ from the part of the adapter that it stands for."""

from __future__ import annotations

import torch
from torch import Tensor

from protocol.checks import change_energy
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
    squares = _squares(b, dim=0)
    split = (sent_b * b).sum(dim=0).double() / torch.where(squares > 0, squares, 1.0)  # λ; another is right too, but less sharp
    split = torch.where(split > 0, split, 1.0)
    sent_a = torch.where((_squares(sent_b, dim=0) == 0)[:, None], a, sent_a)  # beside zeros it may be anything
    off_b, off_a = _squares(sent_b - b * split.float(), dim=0).sqrt(), _squares(sent_a - a / split.float()[:, None], dim=1).sqrt()
    long_b, long_a = squares.sqrt() * split, _squares(a, dim=1).sqrt() / split
    error = (off_b * long_a).norm() + (long_b * off_a).norm() + (off_b * off_a).sum()
    whole = (long_b * long_a).norm()
    return float(HAIR * error / whole) if whole > 0 else 0.0


def share_in_any_gauge(adapter: Factors, slice: Factors, scale: float) -> float:
    """‖s b' a' − b a‖_F as a share of ‖b a‖_F over the slice's directions, for factors of any form; cost (n_out + n_in) r²."""
    meant = adapter.leading(slice.rank)
    whole = change_energy(meant, 1.0, meant.leading(0), 1.0)
    return (change_energy(slice, scale, meant, 1.0) / whole) ** 0.5 if whole > 0 else 0.0


def _squares(x: Tensor, dim: int) -> Tensor:
    """The squared lengths of columns (0) or rows (1), (r,) float64; a tenth of `vector_norm`'s time for columns."""
    return x.double().square_().sum(dim=dim)
