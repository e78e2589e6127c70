"""raFLoRA: products, each direction averaged over those who hold it."""

from __future__ import annotations

from coordinator.aggregation import ModuleRound, Strategy
from coordinator.contributions import by_direction, products, untouched
from coordinator.sums import Sum


class RaFLoRA(Strategy):
    """The clients' products by partitions of rank, each averaged over those who hold it; an empty one keeps its old value.

    Between two ranks l < h that clients have, directions l + 1 … h are averaged over the clients of rank ≥ h: for a single
    direction these are all whose rank reaches it.
    Source: raFLoRA, arXiv:2602.13486. Keeping the directions that nobody of the round holds is added here; there they go.
    """

    exact = True
    linear = False
    gauge_free = False
    equation = "W ← Σᵢ Σ (p / qᵢ) s bᵢ aᵢ, and Wᵢ where qᵢ = 0"
    source = "arXiv:2602.13486"

    def combine(self, round: ModuleRound) -> Sum:
        """Σᵢ Σ (p / qᵢ) (γ s bᵢ aᵢ + (1 − γ) s₀ b₀ᵢ a₀ᵢ) + Σ of Wᵢ over qᵢ = 0."""
        return Sum(round.shape, [untouched(round), *products(round, by_direction(round))])
