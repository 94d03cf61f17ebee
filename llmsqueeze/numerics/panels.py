"""Zeros anywhere, for a kernel that skips inputs: panels of outputs, in each of them input after input.

values       [nonzeros]                         the weight's dtype
mask         [panels, columns, width / 8]       uint8, bit j%8 (little) of byte j//8 is output j of the panel
row_offsets  [panels * columns + 1]             int32, where each input of each panel starts in `values`

width is divisible by 64; the last panel is filled up with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmsqueeze.numerics.packing import pack_bitmask, unpack_bitmask

# A run of weights should be long enough to be fetched ahead, and panels as many as there are threads.
WIDEST, STEP, FEWEST = 1024, 64, 8


@dataclass(frozen=True)
class Panels:
    """See above."""

    values: Tensor
    mask: Tensor
    row_offsets: Tensor


def width_of(rows: int) -> int:
    """Outputs of a panel of a matrix of so many."""
    return min(WIDEST, -(-rows // (FEWEST * STEP)) * STEP)


def pack(weight: Tensor) -> Panels:
    """Of a [rows, columns] matrix of 2- or 4-byte floats; on the CPU."""
    rows, columns = weight.shape
    width = width_of(rows)
    count = -(-rows // width)
    filled = weight.new_zeros(count * width, columns)
    filled[:rows] = weight
    runs = filled.view(count, width, columns).transpose(1, 2).reshape(-1, width)
    values, mask, row_offsets = pack_bitmask(runs)
    return Panels(values, mask.view(count, columns, width // 8), row_offsets)


def unpack(panels: Panels, rows: int) -> Tensor:
    """The [rows, columns] matrix; ValueError if the parts do not belong together."""
    count, columns, eighth = panels.mask.shape
    mask = panels.mask.reshape(-1, eighth)
    runs = unpack_bitmask(panels.values, mask, panels.row_offsets, 8 * eighth)
    return runs.view(count, columns, -1).transpose(1, 2).reshape(-1, columns)[:rows]
