"""Scalar codebooks: which values a few bits stand for."""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor


@functools.lru_cache(maxsize=8)
def normal_codebook(bits: int) -> Tensor:
    """[2^bits] fp64, ascending: the values with the least mean squared error for N(0, 1).

    Lloyd's conditions (Max 1960, Lloyd 1982): borders half-way between neighbours, every value the mean
    of its cell. Iterated to a fixed point, which for a log-concave density is the only one.
    """
    count = 2**bits
    values = [math.sqrt(2) * _inverse_erf((2 * i + 1) / count - 1) for i in range(count)]
    for _ in range(100_000):
        borders = [-math.inf, *((a + b) / 2 for a, b in itertools.pairwise(values)), math.inf]
        new = [_cell_mean(a, b) for a, b in itertools.pairwise(borders)]
        moved = max(abs(a - b) for a, b in zip(values, new, strict=True))
        values = new
        if moved < 1e-13:
            break
    # The mean of the mirror images: exactly symmetric.
    return torch.tensor([(a - b) / 2 for a, b in zip(values, values[::-1], strict=True)]).double()


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """uint8, x's shape: the index of the nearest value of an ascending codebook, the lower one of two."""
    borders = (codebook[1:] + codebook[:-1]) / 2
    return torch.bucketize(x, borders.to(x)).to(torch.uint8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """[..., ceil(n / 8) · bits] uint8 from [..., n] codes below 2^bits, bits 1 to 7.

    Eight codes become `bits` bytes, code i at bits i·bits and up, little end first; n is filled up with
    code 0.
    """
    count = codes.shape[-1]
    codes = torch.nn.functional.pad(codes, (0, -count % 8)).unflatten(-1, (-1, 8)).long()
    words = (codes << (bits * torch.arange(8, device=codes.device))).sum(dim=-1, keepdim=True)
    shifts = 8 * torch.arange(bits, device=codes.device)
    return (words >> shifts & 0xFF).to(torch.uint8).flatten(-2)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """[..., count] uint8: inverse of pack_codes."""
    shifts = 8 * torch.arange(bits, device=packed.device)
    words = (packed.unflatten(-1, (-1, bits)).long() << shifts).sum(dim=-1, keepdim=True)
    codes = words >> (bits * torch.arange(8, device=packed.device)) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :count]


def _cell_mean(low: float, high: float) -> float:
    """Mean of N(0, 1) between two borders."""
    if low + high > 0:  # mirrored: the difference of the lower tails is exact
        return -_cell_mean(-high, -low)
    mass = (math.erfc(-high / math.sqrt(2)) - math.erfc(-low / math.sqrt(2))) / 2
    return (_density(low) - _density(high)) / mass


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _inverse_erf(y: float) -> float:
    return float(torch.erfinv(torch.tensor(y, dtype=torch.float64)))
