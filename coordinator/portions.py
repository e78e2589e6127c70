"""What of the adapter a client starts from, and what of that it trains: the first two choices of a strategy.

A file to start from may hold more directions than the client trains. The others stay frozen: the client computes with all of
the file, its optimiser touches the trained ones alone, and only these come back. So uplink and optimiser state stay at r.
"""

from __future__ import annotations

import random
from enum import StrEnum

import torch
from torch import Tensor

from protocol.plan import Plan


class Portion(StrEnum):
    """What is handed out for a rank r of an adapter that is kept at a cap, and what of it is trained."""

    leading = "leading"  # the first r directions; all of them
    whole = "whole"  # all directions; the first r
    carried = "carried"  # all directions to whom can carry them, the first r to others; the first r
    rotating = "rotating"  # all directions; r of them, drawn anew for every client and round
    on_top = "on-top"  # all directions and r fresh ones behind them; the fresh ones

    @property
    def optional(self) -> bool:
        """Whether a client that cannot carry the file for its rank starts from its slice, and trains all of that."""
        return self is Portion.carried

    def held(self, rank: int, cap: int) -> int:
        """How many directions the file for that rank holds."""
        match self:
            case Portion.leading:
                return rank
            case Portion.whole | Portion.carried | Portion.rotating:
                return cap
            case Portion.on_top:
                return cap + rank

    def trained(self, rank: int, cap: int, seed: str) -> list[int] | None:
        """The positions in the file that are trained, rising; none where all are. The same for the same seed."""
        match self:
            case Portion.leading:
                return None
            case Portion.whole | Portion.carried:
                return list(range(rank))
            case Portion.rotating:
                return sorted(random.Random(seed).sample(range(cap), rank))
            case Portion.on_top:
                return list(range(cap, cap + rank))


def directions(portion: Portion, plan: Plan, rank: int, round: int, client: str) -> list[int] | None:
    """What a client of that name trains of its file in a round, whatever else happened; none where it trains all of it."""
    return portion.trained(rank, plan.global_rank, f"{plan.seed}/{round}/{client}/directions")


def fresh(rows: Tensor, held: int) -> Tensor:
    """A fresh row for each of so many directions, those on top of an adapter beginning anew with the first: (held, n_in).

    rows: (cap, n_in), as they are made for a round.
    """
    return rows if held <= len(rows) else torch.cat([rows, rows[: held - len(rows)]])
