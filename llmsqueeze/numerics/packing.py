"""The bitmask encoding: one bit for every weight, then only the non-zero values.

values       [nonzeros]                the weight's dtype, row after row
mask         [rows, ceil(columns/8)]   uint8, bit j%8 (little) of byte j//8 is column j; padding 0
row_offsets  [rows + 1]                int32, where each row starts in `values`

A weight counts as zero when all its bits are zero, so that -0.0 survives and packing is bit-exact.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llmsqueeze import native

# The integer type that shows the bits of a float of so many bytes.
INT_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
INT32_MAX = 2**31 - 1
_BITS_OF_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(
    1, dtype=np.uint8
)


def pack_bitmask(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(values, mask, row_offsets), on the CPU, of a [rows, columns] matrix of 2-, 4- or 8-byte floats."""
    rows = weight.shape[0]
    if weight.numel() > INT32_MAX:
        raise ValueError(f"a matrix of {weight.numel()} weights exceeds int32 row offsets")
    weight = weight.detach().cpu().contiguous()
    bits = weight.view(INT_OF_SIZE[weight.element_size()])
    row_offsets = torch.zeros(rows + 1, dtype=torch.int32)
    loaded = native.library()
    if loaded is None:
        # numpy packs and compacts several times faster than torch's masked_select.
        present = bits.numpy() != 0
        mask = torch.from_numpy(np.packbits(present, axis=1, bitorder="little"))
        np.cumsum(np.count_nonzero(present, axis=1), out=row_offsets[1:].numpy())
        values = torch.from_numpy(np.compress(present.reshape(-1), bits.numpy().reshape(-1)))
    else:
        columns = bits.shape[1]
        shape = (rows, columns, bits.element_size(), torch.get_num_threads())
        mask = torch.empty(rows, -(-columns // 8), dtype=torch.uint8)
        counts = row_offsets[1:]
        loaded.llmsqueeze_bitmask_find(bits.data_ptr(), mask.data_ptr(), counts.data_ptr(), *shape)
        torch.cumsum(counts.clone(), 0, out=counts)
        values = torch.empty(int(row_offsets[-1]), dtype=bits.dtype)
        loaded.llmsqueeze_bitmask_take(
            bits.data_ptr(), mask.data_ptr(), row_offsets.data_ptr(), values.data_ptr(), *shape
        )
    return values.view(weight.dtype), mask, row_offsets


def dense_tiles(mask: np.ndarray, size: int) -> np.ndarray:
    """[tile rows, tile columns] bool: the square tiles that are not 2:4 along inputs.

    mask: uint8 as above; size: weights along a side, a multiple of 8; edge tiles are ragged.
    """
    rows, groups = mask.shape[0], 2 * mask.shape[1]
    # A byte is two groups of four columns.
    over = np.stack([_BITS_OF_BYTE[mask & 15] > 2, _BITS_OF_BYTE[mask >> 4] > 2], axis=2)
    over = np.logical_or.reduceat(over.reshape(rows, groups), np.arange(0, rows, size), axis=0)
    found = np.logical_or.reduceat(over, np.arange(0, groups, size // 4), axis=1)
    return np.asarray(found)


def check_bitmask(values: Tensor, mask: Tensor, row_offsets: Tensor, columns: int) -> None:
    """ValueError if the three parts do not belong together: what reads them need not look again."""
    rows = mask.shape[0]
    if mask.dtype != torch.uint8 or mask.shape != (rows, -(-columns // 8)):
        raise ValueError(f"mask {mask.dtype} {tuple(mask.shape)} does not fit {columns} columns")
    if row_offsets.dtype != torch.int32 or row_offsets.shape != (rows + 1,):
        raise ValueError(f"row offsets {row_offsets.dtype} {tuple(row_offsets.shape)} do not fit")
    bits = mask.numpy()
    if columns % 8 and (bits[:, -1] >> (columns % 8)).any():
        raise ValueError("mask has bits set beyond the last column")
    expected = np.zeros(rows + 1, dtype=np.int64)
    np.cumsum(_BITS_OF_BYTE[bits].sum(axis=1, dtype=np.int64), out=expected[1:])
    if not np.array_equal(expected, row_offsets.numpy()):
        raise ValueError("row offsets disagree with the mask")
    if values.dim() != 1 or values.numel() != int(expected[-1]):
        raise ValueError(f"{values.numel()} values for {int(expected[-1])} set bits")


def unpack_bitmask(values: Tensor, mask: Tensor, row_offsets: Tensor, columns: int) -> Tensor:
    """The [rows, columns] matrix; ValueError if the three parts do not belong together."""
    rows = mask.shape[0]
    if mask.dtype != torch.uint8 or mask.shape != (rows, -(-columns // 8)):
        raise ValueError(f"mask {mask.dtype} {tuple(mask.shape)} does not fit {columns} columns")
    if row_offsets.dtype != torch.int32 or row_offsets.shape != (rows + 1,):
        raise ValueError(f"row offsets {row_offsets.dtype} {tuple(row_offsets.shape)} do not fit")
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    present = ((mask.unsqueeze(-1) >> shifts) & 1).view(torch.bool).reshape(rows, mask.shape[1] * 8)
    if bool(present[:, columns:].any()):
        raise ValueError("mask has bits set beyond the last column")
    present = present[:, :columns]
    counts = present.sum(dim=1)
    expected = torch.zeros(rows + 1, dtype=torch.int64, device=mask.device)
    torch.cumsum(counts, dim=0, out=expected[1:])
    if not torch.equal(expected, row_offsets.to(torch.int64)):
        raise ValueError("row offsets disagree with the mask")
    if values.dim() != 1 or values.numel() != int(expected[-1]):
        raise ValueError(f"{values.numel()} values for {int(expected[-1])} set bits")
    bits = values.contiguous().view(INT_OF_SIZE[values.element_size()])
    weight = torch.zeros(rows, columns, dtype=bits.dtype, device=values.device)
    weight.masked_scatter_(present, bits)
    return weight.view(values.dtype)
