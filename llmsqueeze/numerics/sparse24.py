"""2:4 weights in the order in which sparse tensor cores take them: 9 bits a weight of 16.

A band of 16 rows and a chunk of 256 columns are nine times 32 lanes of 16 bytes. The first eight are the
A operands of mma.sp.m16n8k32, one for every 32 columns: lane 4g + t holds rows g and g + 8, of both halves
of the columns the two non-zeros of group t. The ninth is the metadata, two bits a non-zero: where it
stands in its group of four.
"""

from __future__ import annotations

import torch
from torch import Tensor

BAND, CHUNK = 16, 256


def fits(weight: Tensor) -> bool:
    """Whether no four weights in a row, aligned, hold more than two non-zeros; columns divisible by 4."""
    if weight.shape[1] % 4:
        return False
    return int((weight != 0).unflatten(1, (-1, 4)).sum(-1, dtype=torch.uint8).max()) <= 2


def pack(weight: Tensor) -> Tensor:
    """[bands, chunks, 9, 32, 4] int32 of a [rows, columns] bf16 or fp16 matrix that fits()."""
    rows, columns = weight.shape
    weight = torch.nn.functional.pad(weight, (0, -columns % CHUNK, 0, -rows % BAND))
    bands, chunks = weight.shape[0] // BAND, weight.shape[1] // CHUNK
    groups = weight.unflatten(1, (-1, 4))
    # The first two non-zeros of each group, filled up with zeros, in ascending order.
    present = (groups != 0).to(torch.uint8)
    places = present.argsort(dim=-1, descending=True, stable=True)[..., :2].sort(dim=-1).values
    values = groups.gather(-1, places)
    # [band, half of the rows, g, chunk, unit, half of the columns, t, which] → lanes hold 16 bytes
    values = values.view(bands, 2, 8, chunks, 8, 2, 4, 2).permute(0, 3, 4, 2, 6, 5, 1, 7)
    operands = values.reshape(bands, chunks, 8, 32, 8).view(torch.int32)
    nibbles = (places[..., 0] | places[..., 1] << 2).int().view(-1, 4)
    shifts = 4 * torch.arange(4, dtype=torch.int32, device=weight.device)
    halves = (nibbles << shifts).sum(-1, dtype=torch.int32)
    halves = halves.view(bands, 2, 8, chunks, 4, 2, 2)
    # Rows g and g + 8 share a word; lanes 4g and 4g + 1 serve even units, the two behind them odd ones.
    words = halves[:, 0] | halves[:, 1] << 16  # [band, g, chunk, pair of units, unit, half]
    words = words.permute(0, 2, 1, 4, 5, 3).reshape(bands, chunks, 1, 32, 4)
    return torch.cat([operands, words], dim=2).contiguous()


def unpack(stream: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The [rows, columns] matrix: inverse of pack."""
    bands, chunks = stream.shape[:2]
    values = stream[:, :, :8].contiguous().view(dtype)
    values = values.view(bands, chunks, 4, 2, 8, 4, 2, 2, 2).permute(0, 7, 4, 1, 2, 3, 6, 5, 8)
    words = stream[:, :, 8].view(bands, chunks, 8, 2, 2, 4).permute(0, 2, 1, 5, 3, 4)
    halves = torch.stack([words & 0xFFFF, words >> 16 & 0xFFFF], dim=1)
    shifts = 4 * torch.arange(4, dtype=torch.int32, device=stream.device)
    nibbles = halves.unsqueeze(-1) >> shifts & 15
    places = torch.stack([nibbles & 3, nibbles >> 2], dim=-1).long()
    dense = values.new_zeros(*places.shape[:-1], 4).scatter_(-1, places, values)
    return dense.reshape(bands * BAND, chunks * CHUNK)[:rows, :columns].contiguous()
