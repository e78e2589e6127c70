"""HLoRA: the weighted mean of the clients' updates, each multiplied out at its own scale."""

from __future__ import annotations

from coordinator.aggregation import ModuleRound, Strategy
from coordinator.sums import Sum, Term


class HLoRA(Strategy):
    """The weighted mean of the clients' products; directions that weak clients never saw shrink from round to round.

    W ← Σ p s b a. Where only a share γ of a change counts, p s b a becomes p (γ s b a + (1 − γ) s₀ b₀ a₀).
    A direction held by clients with the share m of the weight is multiplied by m each round, trained or not.
    Source: HLoRA, arXiv:2503.00813; the same sum as FlexLoRA, arXiv:2402.11505. There the dense sum is decomposed; here
    its factors are.
    """

    exact = True
    linear = True
    gauge_free = True
    source = "arXiv:2503.00813"

    def combine(self, round: ModuleRound) -> Sum:
        """Σ p (γ s b a + (1 − γ) s₀ b₀ a₀)."""
        trained = [Term(c.factors, c.weight * c.shrink * c.scale) for c in round.contributions]
        left = [Term(c.given.factors, c.weight * (1 - c.shrink) * c.given.scale) for c in round.contributions if c.shrink < 1]
        return Sum(round.shape, trained + left)
