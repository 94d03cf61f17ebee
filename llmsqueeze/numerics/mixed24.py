"""2:4 weights with dense parts, as PATCH leaves them, in the order in which tensor cores take them.

Of a band of 16 rows every 128 columns are one piece if they are 2:4, in 9 bits a weight, two dense pieces of
64 columns if not, or none if they are zeros. The layout is that of kernels/sparse24.cu with MIXED.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmsqueeze.numerics import sparse24

BAND, TILE = 16, 128
# A piece's first column / 64, then its number among the 2:4 pieces of its band, then whether it is one.
_NUMBER, _SPARSE = 11, 31
MAX_COLUMNS = 64 << _NUMBER
# Share of a matrix that is to be 2:4: bits a weight are 16, less 7 where it is.
LEAST_SPARSE = 0.3


@dataclass(frozen=True)
class Mixed:
    """stream: [pieces, 4, 32, 4] int32; entries: [pieces] int32; metadata: [2:4 pieces, 32, 2] int32;
    starts: [bands + 1, 2] int32, of the first piece and the first 2:4 piece of every band."""

    stream: Tensor
    entries: Tensor
    metadata: Tensor
    starts: Tensor


def fits(weight: Tensor) -> bool:
    """Whether enough of it is 2:4 or zeros; columns divisible by 4."""
    if weight.shape[1] % 4 or weight.shape[1] > MAX_COLUMNS:
        return False
    return float(_kinds(weight)[0].float().mean()) >= LEAST_SPARSE


def _kinds(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[bands, tiles] twice: whether a band's 128 columns are 2:4, and whether they are zeros."""
    counts = (weight != 0).unflatten(1, (-1, 4)).sum(-1, dtype=torch.uint8)
    counts = torch.nn.functional.pad(
        counts, (0, -counts.shape[1] % (TILE // 4), 0, -counts.shape[0] % BAND)
    )
    most = counts.unflatten(1, (-1, TILE // 4)).amax(2).unflatten(0, (-1, BAND)).amax(1)
    return most <= 2, most == 0


def pack(weight: Tensor) -> Mixed:
    """Of a [rows, columns] bf16 or fp16 matrix with columns divisible by 4."""
    sparse, empty = _kinds(weight)
    bands, tiles = sparse.shape
    device = weight.device
    sparse = sparse & ~empty
    count = torch.where(sparse, 1, 2).masked_fill_(empty, 0)
    first = count.flatten().cumsum(0).view(bands, tiles) - count  # of the stream
    number = sparse.cumsum(1) - sparse.int()
    starts = torch.zeros(bands + 1, 2, dtype=torch.int64, device=device)
    starts[1:, 0], starts[1:, 1] = count.sum(1).cumsum(0), sparse.sum(1).cumsum(0)
    total = int(starts[-1, 0])

    packed = sparse24.pack(weight)  # chunks of two tiles
    operands = packed[:, :, :8].reshape(bands, -1, 4, 32, 4)[:, :tiles]
    words = packed[:, :, 8].view(bands, -1, 32, 2, 2).transpose(2, 3).reshape(bands, -1, 32, 2)
    stream = torch.zeros(total, 4, 32, 4, dtype=torch.int32, device=device)
    entries = torch.zeros(total, dtype=torch.int64, device=device)
    column = torch.arange(tiles, device=device).expand(bands, tiles) * (TILE // 64)
    stream[first[sparse]] = operands[sparse]
    entries[first[sparse]] = (column | number << _NUMBER | 1 << _SPARSE)[sparse]
    dense = ~sparse & ~empty
    whole = _operands(weight, tiles)
    for part in (0, 1):
        stream[first[dense] + part] = whole[:, part::2][dense]
        entries[first[dense] + part] = (column + part)[dense]
    return Mixed(
        stream,
        # The topmost bit makes them negative.
        torch.where(entries >= 2**31, entries - 2**32, entries).int(),
        words[:, :tiles][sparse].contiguous(),
        starts.int(),
    )


def _operands(weight: Tensor, tiles: int) -> Tensor:
    """[bands, 2 · tiles, 4, 32, 4] int32: A operands of mma.m16n8k16, four for every 64 columns."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, tiles * TILE - columns, 0, -rows % BAND))
    # [band, half of the rows, g, operand, half of its columns, t, which] → lanes 4g + t hold 16 bytes
    split = padded.view(padded.shape[0] // BAND, 2, 8, 8 * tiles, 2, 4, 2).permute(
        0, 3, 2, 5, 4, 1, 6
    )
    return split.reshape(len(split), 2 * tiles, 4, 32, 8).view(torch.int32)


def unpack(packed: Mixed, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The [rows, columns] matrix: inverse of pack."""
    bands, tiles = len(packed.starts) - 1, -(-columns // TILE)
    device = packed.stream.device
    pieces = packed.starts[:, 0].diff().long()
    band = torch.arange(bands, device=device).repeat_interleave(pieces)
    column = packed.entries & (1 << _NUMBER) - 1
    sparse = packed.entries < 0
    dense = torch.zeros(bands, 2 * tiles, BAND, 64, dtype=dtype, device=device)
    held = packed.stream[~sparse].view(dtype).view(-1, 4, 8, 4, 2, 2, 2)
    # [operand, g, t, half of its columns, half of the rows, which] → rows and columns
    held = held.permute(0, 5, 2, 1, 4, 3, 6).reshape(-1, BAND, 64)
    dense[band[~sparse], column[~sparse].long()] = held
    if bool(sparse.any()):
        # As a matrix of one chunk for each piece, half of it used.
        chunks = packed.stream.new_zeros(int(sparse.sum()), 1, 9, 32, 4)
        chunks[:, 0, :4] = packed.stream[sparse]
        chunks[:, 0, 8, :, :2] = packed.metadata
        halves = sparse24.unpack(chunks, BAND * len(chunks), TILE, dtype)
        halves = halves.view(-1, BAND, 2, 64).transpose(1, 2)
        for part in (0, 1):
            dense[band[sparse], column[sparse].long() + part] = halves[:, part]
    return dense.transpose(1, 2).reshape(bands * BAND, -1)[:rows, :columns].contiguous()
