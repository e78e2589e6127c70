"""One rank for every client, as standard federations have it."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from coordinator.ranks import Candidate, Policy, Population, owner_words
from protocol import errors
from protocol.plan import Plan
from protocol.views import RankView


class Fixed(Policy):
    """Give every client the same rank; a client that cannot carry it takes no part.

    Nothing of the machine is looked at: the policy is for comparisons and for fleets of equal machines.
    """

    rank: int | None = Field(default=None, ge=1, description="a rank of the ladder; by default its largest")

    def check(self, ladder: Sequence[int]) -> None:
        """Raise InvalidPlan if the rank is not on the ladder."""
        if self.rank is not None and self.rank not in ladder:
            raise errors.InvalidPlan(f"rank policy 'fixed': rank {self.rank} is not on the ladder {list(ladder)}")

    def obstacle(self, plan: Plan, candidate: Candidate, rungs: Sequence[int]) -> str | None:
        """The owner's limit, where the rank is beyond it."""
        rank = self._rank(plan)
        return None if rank in rungs else f"the plan gives every client rank {rank}; {owner_words(candidate.profile)}"

    def choose(self, plan: Plan, candidate: Candidate, population: Population, rungs: Sequence[int]) -> RankView:
        """The one rank."""
        rank = self._rank(plan)
        return RankView(rank=rank, reason=f"{rank}: the plan gives every client the same rank", limits={"plan": rank})

    def _rank(self, plan: Plan) -> int:
        return self.rank or plan.ranks.ladder[-1]
