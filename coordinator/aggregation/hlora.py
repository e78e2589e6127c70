"""HLoRA: the weighted mean of the clients' updates, each multiplied out at its own scale."""

from __future__ import annotations

from coordinator.aggregation import ModuleRound, Strategy
from coordinator.contributions import by_share, products
from coordinator.sums import Sum


class HLoRA(Strategy):
    """The weighted mean of the clients' products; directions that weak clients never saw shrink from round to round.

    Where only a share γ of a change counts, p s b a becomes p (γ s b a + (1 − γ) s₀ b₀ a₀).
    A direction held by clients with the share m of the weight is multiplied by m each round, trained or not.
    Source: HLoRA, arXiv:2503.00813; the same sum as FlexLoRA, arXiv:2402.11505. There the dense sum is decomposed; here
    its factors are.
    """

    exact = True
    linear = True
    gauge_free = True
    equation = "W ← Σ p s b a"
    source = "arXiv:2503.00813"

    def combine(self, round: ModuleRound) -> Sum:
        """Σ p (γ s b a + (1 − γ) s₀ b₀ a₀)."""
        return Sum(round.shape, products(round, by_share(round)))
