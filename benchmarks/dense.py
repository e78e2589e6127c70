"""The dense form that published code runs, Σ p s b a and a full decomposition, and the truth in float64 beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from protocol.slices import Factors

Terms = Sequence[tuple[float, Factors]]  # weights and factors
Shape = tuple[int, int]


@dataclass
class Dense:
    """What the dense form takes; a decomposition takes as long whatever was summed, and is measured once for each shape."""

    decompositions: dict[Shape, float] = field(default_factory=dict)

    def seconds(self, terms: Terms, shape: Shape) -> float:
        """Processor seconds of one module, on one thread; reading the files is not counted."""
        began = time.process_time()
        mean = summed(terms, shape, torch.float32)
        formed = time.process_time() - began
        if shape not in self.decompositions:
            began = time.process_time()
            torch.linalg.svd(mean, full_matrices=False)
            self.decompositions[shape] = time.process_time() - began
        return formed + self.decompositions[shape]


def summed(terms: Terms, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Σ w b a, as published code forms it."""
    mean = torch.zeros(shape, dtype=dtype)
    for weight, factors in terms:
        mean += weight * (factors.b.to(dtype) @ factors.a.to(dtype))
    return mean


@dataclass(frozen=True)
class Truth:
    """Squared lengths in float64."""

    total: float  # ‖W‖²_F
    least: float  # of what the best approximation of that rank leaves out
    lost: float  # of what was left out

    @property
    def relative_excess(self) -> float:
        """(error − least error) / ‖W‖."""
        return float((self.lost**0.5 - self.least**0.5) / self.total**0.5)

    @property
    def error_ratio(self) -> float:
        """Error / least error."""
        return float((self.lost / self.least) ** 0.5)


def truth(terms: Terms, shape: Shape, found: Factors) -> Truth:
    """What an approximation b @ a of the sum left out, and the least that can be left out at its rank."""
    b, a = found.b.double(), found.a.double()
    w, beside = summed(terms, shape, torch.float64) if _wide(terms, shape) else None, 0.0
    if w is None:
        w, b, a, beside = _reduced(terms, b, a)
    side = w if w.shape[0] <= w.shape[1] else w.T
    squares = torch.linalg.eigvalsh(side @ side.T)
    lost = float((w - b @ a).square().sum()) + beside
    return Truth(float(w.square().sum()), float(squares[: -found.rank].clamp(min=0).sum()), lost)


def _wide(terms: Terms, shape: Shape) -> bool:
    return sum(factors.rank for _, factors in terms) >= min(shape)


def _reduced(terms: Terms, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """W, b and a in orthonormal bases of all clients' columns and rows, and the energy that b @ a has outside of them."""
    left, r_left = torch.linalg.qr(torch.cat([weight * factors.b.double() for weight, factors in terms], dim=1))
    right, r_right = torch.linalg.qr(torch.cat([factors.a.double() for _, factors in terms]).T)
    inner_b, inner_a = left.T @ b, a @ right
    whole = float(((b.T @ b) * (a @ a.T)).sum())
    inside = float(((inner_b.T @ inner_b) * (inner_a @ inner_a.T)).sum())
    return r_left @ r_right.T, inner_b, inner_a, max(0.0, whole - inside)
