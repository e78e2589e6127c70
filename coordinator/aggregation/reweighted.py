"""Reweighted: changes, each direction's averaged over those who train it."""

from __future__ import annotations

from pydantic import Field

from coordinator.aggregation import Changes


class Reweighted(Changes):
    """The clients' changes, each direction's averaged over those who train it; high directions learn at full speed.

    qᵢ is the share of those whose rank reaches direction i. It looks at directions and not at products, so a client must
    send its factors as it trained them. Where qᵢ is one for all i this is `delta`; with slices given without rounding and
    every direction trained it is `raflora`.
    Source: the change form of FedHL, arXiv:2505.18494, with the weights of raFLoRA, arXiv:2602.13486.
    """

    exact = True
    linear = False
    gauge_free = False
    equation = "W ← W + Σᵢ Σ (p / qᵢ) (s bᵢ aᵢ − s₀ b₀ᵢ a₀ᵢ)"
    source = "arXiv:2602.13486"

    reweight: float = Field(default=1.0, ge=0, le=1, description="ρ in p / qᵢ^ρ, the weight of direction i; at 0 this is `delta`")
