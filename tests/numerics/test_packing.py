"""Bitmask packing: exact for every shape, dtype and bit pattern."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmsqueeze import native
from llmsqueeze.numerics.packing import INT_OF_SIZE, pack_bitmask, unpack_bitmask

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Ragged shapes, empty rows, full rows, and any bits at all (NaN, Inf, -0.0, subnormals)."""
    rows = draw(st.integers(1, 9))
    columns = draw(st.integers(1, 40) | st.sampled_from([63, 64, 65, 127, 128, 129, 200]))
    dtype = draw(st.sampled_from(FLOATS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    bits = torch.from_numpy(rng.integers(-(2**15), 2**15, (rows, columns)))
    bits = bits.to(INT_OF_SIZE[dtype.itemsize])
    fill = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=rows, max_size=rows))
    keep = torch.from_numpy(rng.random((rows, columns))) < torch.tensor(fill).unsqueeze(1)
    return (bits * keep).view(dtype)


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.view(INT_OF_SIZE[tensor.element_size()])


@given(matrices())
@settings(max_examples=300, deadline=None)
def test_round_trip_is_bit_exact(weight: Tensor) -> None:
    values, mask, row_offsets = pack_bitmask(weight)
    again = unpack_bitmask(values, mask, row_offsets, weight.shape[1])
    assert again.dtype == weight.dtype
    assert torch.equal(bits_of(again), bits_of(weight))
    parts = (values, mask, row_offsets)
    size = sum(t.numel() * t.element_size() for t in parts)
    rows, columns = weight.shape
    held = int((bits_of(weight) != 0).sum()) * weight.element_size()
    assert size == held + rows * -(-columns // 8) + 4 * (rows + 1)


@pytest.mark.skipif(native.library() is None, reason="nothing was built")
@given(weight=matrices(), threads=st.integers(1, 3))
@settings(max_examples=300, deadline=None)
def test_the_library_packs_as_numpy_does(weight: Tensor, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = pack_bitmask(weight)
    finally:
        torch.set_num_threads(before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        expected = pack_bitmask(weight)
    assert [(t.dtype, t.shape) for t in found] == [(t.dtype, t.shape) for t in expected]
    assert torch.equal(bits_of(found[0]), bits_of(expected[0]))
    assert torch.equal(found[1], expected[1]) and torch.equal(found[2], expected[2])


@given(matrices())
@settings(max_examples=100, deadline=None)
def test_layout_is_what_the_docstring_says(weight: Tensor) -> None:
    values, mask, row_offsets = pack_bitmask(weight)
    flat: list[int] = []
    for i, row in enumerate(bits_of(weight).tolist()):
        assert int(row_offsets[i]) == len(flat)
        for j, bit_pattern in enumerate(row):
            assert bool(mask[i, j // 8] >> (j % 8) & 1) == (bit_pattern != 0)
            flat += [bit_pattern] if bit_pattern else []
        for j in range(len(row), mask.shape[1] * 8):
            assert not mask[i, j // 8] >> (j % 8) & 1
    assert int(row_offsets[-1]) == len(flat)
    assert bits_of(values).tolist() == flat


def test_minus_zero_survives() -> None:
    weight = torch.tensor([[0.0, -0.0, 1.0]])
    parts = pack_bitmask(weight)
    assert parts[0].numel() == 2
    assert torch.signbit(unpack_bitmask(*parts, 3)[0, 1])


@pytest.mark.parametrize("damage", ["values", "mask", "padding", "offsets", "dtype", "width"])
def test_parts_that_disagree_are_refused(damage: str) -> None:
    weight = torch.arange(30, dtype=torch.float32).reshape(3, 10)
    values, mask, row_offsets = pack_bitmask(weight)
    columns = 10
    if damage == "values":
        values = values[:-1]
    elif damage == "mask":
        mask[1, 0] ^= 4
    elif damage == "padding":
        mask[0, 1] |= 128
    elif damage == "offsets":
        row_offsets[1] += 1
    elif damage == "dtype":
        row_offsets = row_offsets.long()
    else:
        columns = 17
    with pytest.raises(ValueError):
        unpack_bitmask(values, mask, row_offsets, columns)
