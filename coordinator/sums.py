"""What strategies write down: weighted sums of factored updates, by reference.

W = Σ b diag(w) a is kept as factors, and a term's factors may lie in a file: what is said of them does not need their
numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from protocol import errors
from protocol.slices import Factors


class Stored(Protocol):
    """A pair of factors that lies somewhere: its rank is known, its numbers are read when they are needed."""

    @property
    def rank(self) -> int: ...
    def load(self) -> Factors: ...


@dataclass(frozen=True)
class Term:
    """One weighted update b diag(w) a; a single weight is every direction's."""

    factors: Factors | Stored
    weight: float | Tensor  # (r,), any sign

    def load(self, shape: tuple[int, int]) -> Factors:
        """The factors' numbers, where this thread computes. Raises MismatchedSlice unless b is (n_out, r) and a is (r, n_in)."""
        found = self.factors if isinstance(self.factors, Factors) else self.factors.load()
        n_out, n_in = shape
        if found.b.shape != (n_out, self.factors.rank) or found.a.shape != (self.factors.rank, n_in):
            raise errors.MismatchedSlice(
                f"factors of shapes {list(found.b.shape)} and {list(found.a.shape)} cannot update a matrix of {n_out} × {n_in}"
            )
        return Factors(b=torch.as_tensor(found.b), a=torch.as_tensor(found.a))  # as they are, where they are there already

    def weights(self) -> Tensor:
        """One weight per direction: (r,) float64. Raises NonFiniteSlice for NaN and infinity, MismatchedSlice for more or fewer of them."""
        found = torch.as_tensor(self.weight, dtype=torch.float64)
        if found.ndim and found.shape != (self.factors.rank,):
            raise errors.MismatchedSlice(f"{list(found.shape)} weights came for {self.factors.rank} directions")
        if not bool(torch.isfinite(found).all()):
            raise errors.NonFiniteSlice("the weights of a sum's term hold NaN or infinity")
        return found.expand(self.factors.rank)


@dataclass(frozen=True)
class Sum:
    """W = Σ b diag(w) a, of shape (n_out, n_in)."""

    shape: tuple[int, int]
    terms: Sequence[Term]

    @property
    def rank(self) -> int:
        """The stacked rank: how many directions enter the sum."""
        return sum(term.factors.rank for term in self.terms)
