"""2:4 along the outputs: read back, and walked as a lane of the kernel walks it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmsqueeze.numerics import outputs24
from llmsqueeze.numerics.masks import keep_nm_out


def pruned(rows: int, columns: int, seed: int, budget: float, dtype: torch.dtype) -> Tensor:
    """Some groups have fewer than two non-zeros; with a budget some columns are whole, some empty."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    keep = keep_nm_out(weight.abs(), 2, 4, budget)
    keep &= torch.rand(rows, columns, generator=generator) < 0.9
    return (weight * keep).to(dtype)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 30),
    st.integers(1, 600),
    st.integers(0, 99),
    st.sampled_from([0.0, 0.02, 0.3]),
    st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_unpacking_is_the_inverse(
    groups: int, columns: int, seed: int, budget: float, dtype: torch.dtype
) -> None:
    weight = pruned(4 * groups, columns, seed, budget, dtype)
    assert outputs24.fits(weight)
    packed = outputs24.pack(weight)
    assert torch.equal(outputs24.unpack(packed, *weight.shape), weight)
    assert len(packed.keep) % 2 == 0
    if packed.index is not None:
        index = packed.index.int() & 0xFFFF
        assert bool((index.diff() >= 0).all()) and int(index.max()) < columns


@pytest.mark.parametrize("budget", [0.0, 0.1])
def test_nine_bits_a_weight(budget: float) -> None:
    packed = outputs24.pack(pruned(64, 500, 0, budget, torch.bfloat16))
    assert 16 * (packed.values.numel() + packed.keep.numel()) / (64 * 500) == pytest.approx(
        9, abs=0.02
    )
    assert (packed.index is None) == (budget == 0)


def test_what_does_not_fit() -> None:
    assert not outputs24.fits(torch.ones(8, 8))
    assert outputs24.fits(torch.zeros(8, 8))
    one_whole = torch.zeros(8, 8)
    one_whole[:, 3] = 1
    assert outputs24.fits(one_whole)
    assert not outputs24.fits(torch.zeros(4, outputs24.MAX_COLUMNS + 1))


def test_zeros_take_one_pair_of_columns() -> None:
    packed = outputs24.pack(torch.zeros(16, 9, dtype=torch.bfloat16))
    assert packed.keep.shape == (2, 1)
    assert not outputs24.unpack(packed, 16, 9).any()


def walk(packed: outputs24.Columns, x: Tensor, rows: int) -> Tensor:
    """W x in fp64, by what gated.cu says of FORMAT 2, one value after another."""
    stored, spans = packed.keep.shape
    y = torch.zeros(spans * 16, dtype=torch.float64)
    for column in range(stored):
        number = column if packed.index is None else int(packed.index[column]) & 0xFFFF
        for span in range(spans):
            bits = int(packed.keep[column, span]) & 0xFFFF
            for group in range(4):
                one, two = packed.values[column, span, 2 * group : 2 * group + 2].double()
                keep = bits >> 4 * group & 15
                assert keep.bit_count() == 2
                taken = (one, two if keep & 1 else one, one if keep & 8 else two, two)
                for place in range(4):
                    if keep >> place & 1:
                        y[16 * span + 4 * group + place] += taken[place] * x[number]
    return y[:rows]


@pytest.mark.parametrize(
    ("rows", "columns", "budget"), [(16, 8, 0.0), (36, 21, 0.0), (20, 30, 0.1)]
)
def test_lanes_find_the_product(rows: int, columns: int, budget: float) -> None:
    weight = pruned(rows, columns, 5, budget, torch.bfloat16)
    x = torch.randn(columns, generator=torch.Generator().manual_seed(6)).double()
    found = walk(outputs24.pack(weight), x, rows)
    assert torch.allclose(found, weight.double() @ x, rtol=1e-12, atol=1e-12)
