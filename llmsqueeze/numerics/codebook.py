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
    return torch.bucketize(x.contiguous(), borders.to(x)).to(torch.uint8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """[..., ceil(n / 8) · bits] uint8 from [..., n] codes below 2^bits, bits 1 to 7.

    Eight codes become `bits` bytes, code i at bits i·bits and up, little end first; n is filled up with
    code 0.
    """
    count = codes.shape[-1]
    codes = torch.nn.functional.pad(codes, (0, -count % 8)) if count % 8 else codes
    if 8 % bits == 0:  # whole codes in every byte
        run = 8 // bits
        packed = codes[..., ::run].to(torch.uint8, copy=True)
        for i in range(1, run):
            packed |= codes[..., i::run].to(torch.uint8) << bits * i
        return packed
    codes = codes.unflatten(-1, (-1, 8)).long()
    words = (codes << (bits * torch.arange(8, device=codes.device))).sum(dim=-1, keepdim=True)
    shifts = 8 * torch.arange(bits, device=codes.device)
    return (words >> shifts & 0xFF).to(torch.uint8).flatten(-2)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """[..., count] uint8: inverse of pack_codes."""
    shifts = 8 * torch.arange(bits, device=packed.device)
    words = (packed.unflatten(-1, (-1, bits)).long() << shifts).sum(dim=-1, keepdim=True)
    codes = words >> (bits * torch.arange(8, device=packed.device)) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :count]


def lookup_table(codebook: Tensor, bits: int) -> Tensor:
    """What look_up reads, of an fp32 codebook: the values of every run of codes that it takes at a time."""
    run = 4 if bits == 3 else 8 // bits
    index = torch.arange(2 ** (bits * run), device=codebook.device)
    shifts = bits * torch.arange(run, device=codebook.device)
    runs = codebook[index[:, None] >> shifts & (2**bits - 1)].contiguous()
    # A run as one number of 8 or 16 bytes: picking those is several times faster than picking rows.
    return runs.view(torch.int64 if run == 2 else torch.complex128).flatten()


def look_up(packed: Tensor, table: Tensor, bits: int, count: int) -> Tensor:
    """[..., count] fp32 values that packed codes of 2, 3 or 4 bits stand for; table: of lookup_table.

    The same as indexing the codebook with unpack_codes, several codes at a time.
    """
    index = packed.int()
    if bits == 3:  # three bytes are two runs of four codes
        low, middle, high = index.unflatten(-1, (-1, 3)).unbind(-1)
        index = torch.stack([low | (middle & 15) << 8, middle >> 4 | high << 4], -1).flatten(-2)
    shape = (*index.shape[:-1], -1)
    values = table.index_select(0, index.flatten()).view(torch.float32).view(shape)
    return values if values.shape[-1] == count else values[..., :count]


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
