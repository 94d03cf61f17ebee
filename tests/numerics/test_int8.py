"""Weights of eight bits: rounding to nearest, and that it is seen from the values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsqueeze.numerics import int8

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def matrix(rows: int, columns: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of very different size, one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= 10 ** (torch.rand(rows, 1, generator=generator) * 4 - 3)
    weight[seed % rows] = 0
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_goes_to_the_nearest_code(dtype: torch.dtype) -> None:
    weight = matrix(9, 40, 3, dtype)
    codes, largest = int8.encode(weight)
    for row, found, most in zip(weight.tolist(), codes.tolist(), largest.tolist(), strict=True):
        assert most == pytest.approx(max(map(abs, row)), rel=2**-16)
        for value, code in zip(row, found, strict=True):
            exact = value / (most / 127) if most else 0.0
            assert -127 <= code <= 127
            # fp32 may decide a tie either way.
            assert abs(code - exact) <= 0.5 + 1e-4


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 999), st.sampled_from(DTYPES))
def test_rounding_twice_is_rounding_once(
    rows: int, columns: int, seed: int, dtype: torch.dtype
) -> None:
    weight = matrix(rows, columns, seed, dtype)
    once = int8.round_weight(weight)
    assert int8.fits(once)
    codes, largest = int8.encode(weight)
    again, same = int8.encode(once)
    assert torch.equal(again, codes) and torch.equal(same, largest)
    # Zeros of a pruned matrix stay.
    assert torch.equal(once[weight == 0], weight[weight == 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_does_not_fit(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert not int8.fits(weight)
    rounded = int8.round_weight(weight)
    assert int8.fits(rounded)
    rounded[50, 3] = weight[50, 3]  # behind the rows that are looked at first
    assert not int8.fits(rounded) or rounded[50, 3] == int8.round_weight(weight)[50, 3]


def test_decoding_keeps_the_layout() -> None:
    codes, largest = int8.encode(torch.randn(6, 5).bfloat16())
    turned = codes.t().contiguous().t()
    weight = int8.decode(turned, int8.scales(largest), torch.bfloat16)
    assert weight.stride() == turned.stride()
    assert torch.equal(weight, int8.decode(codes, int8.scales(largest), torch.bfloat16))
