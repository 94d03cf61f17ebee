"""The stream of 2:4 weights: read back, and walked lane by lane as the tensor cores walk it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmsqueeze.numerics import sparse24


def two_of_four(rows: int, columns: int, seed: int, dtype: torch.dtype, most: int = 2) -> Tensor:
    """Every group of four with `most` or fewer non-zeros."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1)
    count = torch.randint(0, most + 1, (rows, columns // 4, 1), generator=generator)
    values = torch.randn(rows, columns // 4, 4, generator=generator)
    return (values * (order < count)).flatten(1).to(dtype)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 40),
    st.integers(1, 140),
    st.integers(0, 99),
    st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_unpacking_is_the_inverse(rows: int, groups: int, seed: int, dtype: torch.dtype) -> None:
    weight = two_of_four(rows, 4 * groups, seed, dtype)
    assert sparse24.fits(weight)
    stream = sparse24.pack(weight)
    assert stream.shape == (-(-rows // 16), -(-groups // 64), 9, 32, 4)
    assert torch.equal(sparse24.unpack(stream, rows, 4 * groups, dtype), weight)


def test_nine_bits_a_weight() -> None:
    stream = sparse24.pack(two_of_four(64, 512, 0, torch.bfloat16))
    assert stream.numel() * 32 / (64 * 512) == 9


def test_what_does_not_fit() -> None:
    weight = two_of_four(8, 16, 1, torch.bfloat16)
    weight[3, 4:7] = 1
    assert not sparse24.fits(weight)
    assert not sparse24.fits(torch.zeros(4, 6))
    assert sparse24.fits(torch.zeros(4, 8))


def walk(stream: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """W x in fp64 by the operand layout of mma.sp.m16n8k32 in the PTX manual, lane by lane.

    Register r of a lane holds two stored columns: of row g (r even) or g + 8 (r odd), the pair 2t of the
    first (r < 2) or second half. A row's metadata gives two bits to each stored column. For even units
    the lanes 4g and 4g + 1 supply it, one for each half of the columns; for odd units the two after them.
    """
    bands, chunks = stream.shape[:2]
    y = torch.zeros(bands * 16, dtype=torch.float64)
    words = stream.tolist()
    values = stream[:, :, :8].contiguous().view(dtype).double()
    for band in range(bands):
        for chunk in range(chunks):
            for unit in range(8):
                for lane in range(32):
                    g, t = lane // 4, lane % 4
                    for register in range(4):
                        row, half = g + 8 * (register % 2), register // 2
                        supplier = 4 * g + 2 * (unit % 2) + half
                        word = words[band][chunk][8][supplier][unit // 2] & 0xFFFFFFFF
                        bits = word >> 16 * (register % 2) & 0xFFFF
                        for which in range(2):
                            place = bits >> 2 * (2 * t + which) & 3
                            column = chunk * 256 + unit * 32 + half * 16 + t * 4 + place
                            value = values[band, chunk, unit, lane, 2 * register + which]
                            if value and column < len(x):
                                y[band * 16 + row] += value * x[column]
    return y


@pytest.mark.parametrize(("rows", "columns"), [(16, 256), (20, 260)])
def test_lanes_find_the_product(rows: int, columns: int) -> None:
    weight = two_of_four(rows, columns, 5, torch.bfloat16)
    x = torch.randn(columns, generator=torch.Generator().manual_seed(6)).double()
    y = walk(sparse24.pack(weight), x, torch.bfloat16)
    assert torch.allclose(y[:rows], weight.double() @ x, rtol=1e-12, atol=1e-12)
    assert not y[rows:].any()


def test_places_ascend_where_a_group_has_fewer() -> None:
    """The instruction is the one for ordered metadata: two places of a group must ascend."""
    weight = torch.zeros(16, 256, dtype=torch.bfloat16)
    weight[:, 3::4] = 1  # one non-zero, in the last place
    words = sparse24.pack(weight)[0, 0, 8]
    for nibble in range(8):
        places = words >> 4 * nibble & 15
        assert bool(((places & 3) < (places >> 2)).all())
