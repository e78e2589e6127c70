"""A sum's factors in memory, side by side: what the Gram matrices of narrow sums are formed from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coordinator import symmetric
from coordinator.sums import Sum
from protocol.slices import Factors


@dataclass(frozen=True)
class Stack:
    """W = b diag(c) a."""

    b: Tensor  # (n_out, R) float32, or float64 where a term came in that
    a: Tensor  # (R, n_in) of the same dtype
    c: Tensor  # (R,) float64
    places: Tensor  # (R,) int64: which direction of its own term each was

    @property
    def rank(self) -> int:
        return len(self.c)


def stacked(w: Sum) -> Stack:
    """The terms in memory, each read once; those that repeat the first one's leading directions are folded into its weights.

    The slices that clients were given are cut from the adapter, so where they travel in float32 they are its directions up
    to a factor and float32's rounding, which is what the adapter itself was rounded to. Then they cost nothing.
    """
    first, own = w.terms[0].load(w.shape), w.terms[0].weights().clone()
    size = own.abs()  # of all that was folded into a direction, which may have cancelled
    filled, weights = _Filled(w.shape, w.rank), []
    for term in w.terms[1:]:
        part, c = term.load(w.shape), term.weights()
        multiples = _nested(part, first)
        if multiples is None:
            filled.add(part)
            weights.append(c)
        else:
            own[: part.rank] += c * multiples
            size[: part.rank] += (c * multiples).abs()
    if len(w.terms) > 1:
        first, own = _counting(first, own, size)
    filled.add(first)
    return filled.stack(torch.cat([*weights, own]))


class _Filled:
    """Room for all directions, taken at once, and filled term by term: no number is in memory twice."""

    def __init__(self, shape: tuple[int, int], rank: int) -> None:
        self._b = torch.empty(shape[0], rank)
        self._a = torch.empty(rank, shape[1])
        self._rank = 0
        self._places = list[Tensor]()

    def add(self, part: Factors) -> None:
        here = slice(self._rank, self._rank + part.rank)
        if torch.float64 in (part.a.dtype, part.b.dtype):
            self._b, self._a = self._b.double(), self._a.double()
        self._b[:, here] = part.b
        self._a[here] = part.a
        self._rank += part.rank
        self._places.append(torch.arange(part.rank))

    def stack(self, c: Tensor) -> Stack:
        return Stack(self._b[:, : self._rank], self._a[: self._rank], c, torch.cat(self._places))


def _counting(part: Factors, c: Tensor, size: Tensor) -> tuple[Factors, Tensor]:
    """The directions that have numbers and a weight: folded weights may cancel, and leave rounding of their size."""
    live = (c.abs() > 16 * symmetric.EPSILON * size) & ((part.b != 0).any(dim=0) | (part.a != 0).any(dim=1))
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
    hair = 2 * torch.finfo(torch.float32).eps
    if len(x) > 1 and x.shape[1] and _unlike(x[:2, 0], y[:2, 0], 4 * hair):
        return None
    at = y.abs().argmax(dim=0, keepdim=True)
    largest = y.gather(0, at).double()
    m = torch.where(largest == 0, 0.0, x.gather(0, at).double() / largest)
    return m.squeeze(0) if bool(((x - m * y).abs() <= hair * x.abs()).all()) else None


def _unlike(x: Tensor, y: Tensor, hair: float) -> bool:
    """Whether two numbers are no multiples of two others: a trained slice is told from its first."""
    ahead, behind = x * y.flip(0)
    return bool((ahead - behind).abs() > hair * ahead.abs())
