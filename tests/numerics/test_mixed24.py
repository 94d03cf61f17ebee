"""2:4 with dense parts: read back, and walked lane by lane as the tensor cores walk it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmsqueeze.numerics import mixed24
from llmsqueeze.numerics.masks import keep_tiles


def tiled(rows: int, columns: int, dense: float, seed: int, dtype: torch.dtype) -> Tensor:
    """A share of 16 × 128 blocks dense, one of zeros, the rest 2:4."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    keep = keep_tiles(weight.abs(), 128, 0)
    for top in range(0, rows, 16):
        for left in range(0, columns, 128):
            block = keep[top : top + 16, left : left + 128]
            kind = float(torch.rand(1, generator=generator))
            block |= kind < dense
            block &= kind < 0.95
    return (weight * keep).to(dtype)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 70),
    st.integers(1, 140),
    st.sampled_from([0.0, 0.4, 1.0]),
    st.integers(0, 99),
    st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_unpacking_is_the_inverse(
    rows: int, groups: int, dense: float, seed: int, dtype: torch.dtype
) -> None:
    weight = tiled(rows, 4 * groups, dense, seed, dtype)
    packed = mixed24.pack(weight)
    assert torch.equal(mixed24.unpack(packed, rows, 4 * groups, dtype), weight)
    assert len(packed.stream) == len(packed.entries) == int(packed.starts[-1, 0])
    assert len(packed.metadata) == int(packed.starts[-1, 1])


@pytest.mark.parametrize("dense", [0, 8, 16, 32])
def test_bits_a_weight(dense: int) -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(1))
    packed = mixed24.pack((weight * keep_tiles(weight.abs(), 128, dense)).bfloat16())
    bits = 32 * (packed.stream.numel() + packed.metadata.numel()) / weight.numel()
    assert bits == 9 + 7 * dense / 32
    # What the kernel finds its way by is little.
    assert 32 * (packed.entries.numel() + packed.starts.numel()) / weight.numel() < 0.04


def test_what_fits() -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    fits = [mixed24.fits(weight * keep_tiles(weight.float().abs(), 128, n)) for n in (0, 5, 6, 8)]
    assert fits == [True, True, False, False]
    assert not mixed24.fits(torch.zeros(16, 6))
    assert not mixed24.fits(torch.zeros(1, mixed24.MAX_COLUMNS + 4))


def walk(packed: mixed24.Mixed, x: Tensor, dtype: torch.dtype) -> Tensor:
    """W x in fp64 by the operand layouts of mma.sp.m16n8k32 and mma.m16n8k16 in the PTX manual.

    Dense: register r of a lane holds row g (r even) or g + 8 (r odd), columns 2t and 2t + 1 of the first
    (r < 2) or second eight. 2:4: see test_sparse24.walk.
    """
    y = torch.zeros(16 * (len(packed.starts) - 1), dtype=torch.float64)
    values = packed.stream.view(dtype).view(-1, 4, 32, 8).double()
    for band in range(len(packed.starts) - 1):
        begin, numbered = packed.starts[band].tolist()
        before = -1
        for piece in range(begin, int(packed.starts[band + 1, 0])):
            entry = int(packed.entries[piece]) & 0xFFFFFFFF
            first = (entry & 0x7FF) * 64
            assert first > before  # ascending
            before = first
            for operand in range(4):
                for lane in range(32):
                    g, t = lane // 4, lane % 4
                    for register in range(4):
                        row, half = band * 16 + g + 8 * (register % 2), register // 2
                        for which in range(2):
                            value = values[piece, operand, lane, 2 * register + which]
                            column = first + operand * 16 + half * 8 + 2 * t + which
                            if entry >> 31:
                                number = numbered + (entry >> 11 & 0xFFFFF)
                                supplier = 4 * g + 2 * (operand % 2) + half
                                word = int(packed.metadata[number, supplier, operand // 2])
                                bits = word >> 16 * (register % 2) & 0xFFFF
                                place = bits >> 2 * (2 * t + which) & 3
                                column = first + operand * 32 + half * 16 + t * 4 + place
                            if value and column < len(x):
                                y[row] += value * x[column]
    return y


def test_lanes_find_the_product() -> None:
    weight = tiled(36, 516, 0.4, 7, torch.bfloat16)
    x = torch.randn(516, generator=torch.Generator().manual_seed(6)).double()
    y = walk(mixed24.pack(weight), x, torch.bfloat16)
    assert torch.allclose(y[:36], weight.double() @ x, rtol=1e-12, atol=1e-12)
