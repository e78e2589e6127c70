"""Every number counts when a slice is looked at for NaN and infinity, and a sum that is too large for its dtype is none of them."""

from __future__ import annotations

import math

import pytest
import torch

from protocol.checks import is_finite

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf]])
def test_one_bad_number_anywhere_is_found(dtype: torch.dtype, bad: list[float]) -> None:
    for place in (0, 500, 1000 - len(bad)):
        tensor = torch.ones(1000, dtype=dtype)
        tensor[place : place + len(bad)] = torch.tensor(bad, dtype=dtype)
        assert not is_finite(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_numbers_are_numbers_though_their_sum_is_none(dtype: torch.dtype) -> None:
    largest = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(largest)
    assert is_finite(torch.cat([largest, -largest]))
    assert is_finite(torch.empty(0, dtype=dtype))
