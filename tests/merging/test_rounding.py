"""The rounding of what is handed out is never more than is said, and seldom much less."""

from __future__ import annotations

import pytest
import torch

from coordinator.lowrank import cut
from coordinator.rounding import share
from protocol.plan import Dtype, Split
from protocol.slices import TORCH_DTYPES, Factors
from tests.merging.test_truncation import rand


def adapter(values: torch.Tensor, n_out: int = 60, n_in: int = 80) -> Factors:
    """b = U√S, a = √S Vᵀ in float32."""
    u = torch.linalg.qr(rand(n_out, len(values), seed=1).double())[0]
    v = torch.linalg.qr(rand(n_in, len(values), seed=2).double())[0]
    return Factors(b=(u * values.sqrt()).float(), a=(values.sqrt()[:, None] * v.T).float())


SPECTRA = {
    "flat": torch.ones(16, dtype=torch.float64),
    "falling": 0.5 ** torch.arange(16, dtype=torch.float64),
    "with dead directions": torch.tensor([3.0, 1.0, *[0.0] * 14], dtype=torch.float64),
    "small": 1e-6 * 0.8 ** torch.arange(16, dtype=torch.float64),
    "below float16": 1e-14 * 0.8 ** torch.arange(16, dtype=torch.float64),
    "large": 1e6 * 0.8 ** torch.arange(16, dtype=torch.float64),
}


@pytest.mark.parametrize("split", Split)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("wire", [Dtype.bfloat16, Dtype.float16])
def test_what_is_said_bounds_the_dense_error(wire: Dtype, spectrum: str, split: Split) -> None:
    whole = adapter(SPECTRA[spectrum])
    for rank, scale in ((1, 1.0), (4, 0.37), (16, 3.0)):
        part = cut(whole, rank, scale, split, rand(rank, 80, seed=3), TORCH_DTYPES[wire])
        if not bool(torch.isfinite(part.b).all() and torch.isfinite(part.a).all()):
            continue  # refused before anybody asks
        exact = whole.b[:, :rank].double() @ whole.a[:rank].double()
        error = float((scale * part.b.double() @ part.a.double() - exact).norm() / exact.norm())
        said = share(whole, part, scale)
        assert error <= said
        if spectrum != "below float16":  # where whole directions become zero
            assert said <= 3 * error + 1e-6


def test_nothing_is_rounded_of_nothing() -> None:
    nothing = Factors(b=torch.zeros(6, 2), a=torch.zeros(2, 5))
    assert share(nothing, Factors(b=torch.zeros(6, 2), a=rand(2, 5, seed=1)), 2.0) == 0.0
