"""Ranks from the labels that operators give to clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from coordinator.ranks import Candidate, Policy, Population, owner_words
from protocol import errors
from protocol.plan import Plan
from protocol.views import RankView


class Labels(Policy):
    """Look the rank up in a table, by the value of one client label.

    A client whose owner allows less than the table gives gets the largest rung that the owner allows.
    """

    label: str = Field(default="class", min_length=1, description="the label to look at")
    table: dict[str, Annotated[int, Field(ge=1)]] = Field(min_length=1, description="value of the label → a rank of the ladder")
    default: int | None = Field(
        default=None, ge=1, description="rank of clients whose label is missing or not in the table; without it they take no part"
    )

    def check(self, ladder: Sequence[int]) -> None:
        """Raise InvalidPlan if a rank of the table is not on the ladder."""
        for value, rank in {**self.table, "default": self.default}.items():
            if rank is not None and rank not in ladder:
                raise errors.InvalidPlan(f"rank policy 'labels': {value!r} has rank {rank}, which is not on the ladder {list(ladder)}")

    def obstacle(self, plan: Plan, candidate: Candidate, rungs: Sequence[int]) -> str | None:
        """The missing label, or the owner's limit where it leaves no rung."""
        rank = self._rank(candidate)
        if rank is None:
            return f"{self._said(candidate)}, for which the plan's table has no rank and no default"
        return None

    def choose(self, plan: Plan, candidate: Candidate, population: Population, rungs: Sequence[int]) -> RankView:
        """The table's rank, or the largest rung below it that the owner allows."""
        wanted = self._rank(candidate)
        assert wanted is not None
        rank = max(r for r in rungs if r <= wanted)
        limits: dict[str, int | None] = {"label": wanted, "owner": rungs[-1] if rungs[-1] < plan.ranks.ladder[-1] else None}
        if rank < wanted:
            reason = f"{rank}: the table gives rank {wanted}, but {owner_words(candidate.profile)}"
        elif candidate.labels.get(self.label) in self.table:
            reason = f"{rank}: {self._said(candidate)}"
        else:
            reason = f"{rank}: {self._said(candidate)}, so it gets the table's default"
        return RankView(rank=rank, reason=reason, limits=limits)

    def _rank(self, candidate: Candidate) -> int | None:
        return self.table.get(candidate.labels.get(self.label, ""), self.default)

    def _said(self, candidate: Candidate) -> str:
        value = candidate.labels.get(self.label)
        return f"the client has no label {self.label!r}" if value is None else f"the client is labelled {self.label} = {value}"
