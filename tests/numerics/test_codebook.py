"""Codebooks, packed codes and the Hadamard transform, against definitions and published values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmsqueeze.numerics.codebook import nearest, normal_codebook, pack_codes, unpack_codes
from llmsqueeze.numerics.hadamard import hadamard

# Max, Quantizing for minimum distortion (1960), table I: the positive half, and the mean squared error.
PUBLISHED = {
    2: ([0.4528, 1.510], 0.1175),
    3: ([0.2451, 0.7560, 1.344, 2.152], 0.03454),
    4: ([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497),
}


@pytest.mark.parametrize("bits", PUBLISHED)
def test_the_codebook_is_the_published_one(bits: int) -> None:
    codebook = normal_codebook(bits)
    half, error = PUBLISHED[bits]
    assert codebook[2 ** (bits - 1) :].tolist() == pytest.approx(half, abs=6e-4)
    assert torch.equal(codebook, -codebook.flip(0))
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2)
    lost = (x - codebook[nearest(x, codebook).long()]).square()
    assert float((lost * density).sum() / density.sum()) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_nudged_codebook_is_better(bits: int) -> None:
    codebook = normal_codebook(bits)
    x = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2)

    def error(values: torch.Tensor) -> float:
        return float(((x[:, None] - values).square().amin(dim=1) * density).sum())

    least = error(codebook)
    for index in range(len(codebook)):
        for step in (-0.02, 0.02):
            nudged = codebook.clone()
            nudged[index] += step
            assert error(nudged) > least


@given(st.integers(1, 4), st.lists(st.floats(-4, 4), min_size=1, max_size=20))
def test_nearest_is_nearest(bits: int, values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    codebook = normal_codebook(bits)
    found = (x - codebook[nearest(x, codebook).long()]).abs()
    assert torch.equal(found, (x[:, None] - codebook).abs().amin(dim=1))


@given(st.integers(1, 7), st.integers(0, 40), st.integers(0, 2**31))
def test_codes_come_back(bits: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (2, 3, count), generator=generator, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, -(-count // 8) * bits)
    assert torch.equal(unpack_codes(packed, bits, count), codes)


@pytest.mark.parametrize("bits", range(1, 8))
def test_every_code_in_every_place(bits: int) -> None:
    codes = (torch.arange(8 * 2**bits).reshape(-1, 8) % 2**bits).to(torch.uint8)
    codes = torch.cat([codes, codes.roll(1, dims=1), codes.flip(1)])
    whole = [sum(int(c) << bits * i for i, c in enumerate(row)) for row in codes]
    expected = [list(word.to_bytes(bits, "little")) for word in whole]
    assert pack_codes(codes, bits).tolist() == expected
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, 8), codes)


@pytest.mark.parametrize("width", [1, 2, 16, 64, 80, 96, 128, 256])
def test_hadamard_is_its_own_inverse_and_keeps_lengths(width: int) -> None:
    x = torch.randn(5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = hadamard(x)
    assert torch.allclose(hadamard(turned), x, atol=1e-12)
    assert torch.allclose(turned.norm(dim=1), x.norm(dim=1))
    # Entries by definition: ±1/√block, the sign from the parity of the common bits of row and column.
    block = width & -width
    matrix = hadamard(torch.eye(width, dtype=torch.float64))
    for i in range(min(width, 20)):
        for j in range(min(width, 20)):
            same = i // block == j // block
            sign = -1 if bin(i % block & j % block).count("1") % 2 else 1
            assert matrix[i, j] == pytest.approx(sign / block**0.5 if same else 0)


def test_hadamard_spreads_an_outlier() -> None:
    x = torch.zeros(128)
    x[5] = 100.0
    assert hadamard(x).abs().max() == pytest.approx(100 / 128**0.5)
