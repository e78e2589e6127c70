"""What nobody has trained yet: fresh directions of factors and fresh tensors, made from seeds alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def fresh_rows(rank: int, n_in: int, *, seed: int, round: int, module: str) -> Tensor:
    """Rows of a for directions that the adapter does not have yet: (rank, n_in) float32, uniform in ±1/√n_in.

    The same for all clients, and nested: every rank takes its first rows from the same matrix, made once at the cap.
    Source: the initialisation of a in LoRA's reference code (Kaiming-uniform with slope √5).
    """
    bound = n_in**-0.5
    return torch.empty(rank, n_in, device="cpu").uniform_(-bound, bound, generator=_generator("rows", seed, round, module))


def fresh_tensor(name: str, shape: Sequence[int], *, seed: int) -> Tensor:
    """A tensor kept whole, before the first round, float32: biases zero, other vectors one, the rest normal (0, 0.02)."""
    if name.endswith("bias"):
        return torch.zeros(*shape)
    if len(shape) == 1:
        return torch.ones(*shape)
    return torch.empty(*shape).normal_(0.0, 0.02, generator=_generator("tensor", seed, name))


def _generator(*parts: object) -> torch.Generator:
    """A generator of this purpose alone: neighbouring seeds and names share nothing."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
