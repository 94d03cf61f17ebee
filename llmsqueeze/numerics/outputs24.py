"""2:4 along the outputs, column by column: what a kernel reads that skips columns. 9 bits a weight of 16.

Of sixteen outputs of a column eight values are stored, two for each group of four, and sixteen bits that say
which they are. A column with more non-zeros than that is stored as two, which share the input that meets
them; a column of zeros not at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Outputs that one lane of the kernel computes: 16 bytes of values.
SPAN = 16
# Inputs are numbered in 16 bits.
MAX_COLUMNS = 65536
# Stored columns for each of a matrix. More than 1: matrices that were pruned apart and are stored as one may
# each have kept other columns whole.
MOST_STORED = 1.25
# Columns that are packed at a time.
_SLICE = 256


@dataclass(frozen=True)
class Columns:
    """values: [stored columns, spans, 8] bf16 or fp16; keep: [stored columns, spans] int16, the bits of the
    outputs that have one; index: [stored columns] int16 (as if unsigned), the input of each, ascending, or
    None: each its own."""

    values: Tensor
    keep: Tensor
    index: Tensor | None


def fits(weight: Tensor) -> bool:
    """Whether it is worth it: few columns need the room of two."""
    if weight.shape[1] > MAX_COLUMNS:
        return False
    return int(_needed(weight).sum()) <= MOST_STORED * weight.shape[1]


def _groups(weight: Tensor) -> Tensor:
    """[columns, groups, 4]: whether there is a non-zero."""
    padded = torch.nn.functional.pad(weight.t() != 0, (0, -weight.shape[0] % 4))
    return padded.unflatten(1, (-1, 4))


def _needed(weight: Tensor) -> Tensor:
    """[columns]: how many stored columns each takes."""
    most = _groups(weight).sum(-1, dtype=torch.uint8).amax(-1)
    return (most.int() + 1) // 2


def pack(weight: Tensor) -> Columns:
    """Of a [rows, columns] matrix that fits()."""
    spans = -(-weight.shape[0] // SPAN)
    parts = [_pack_slice(part) for part in weight.split(_SLICE, dim=1)]
    starts = range(0, weight.shape[1], _SLICE)
    index = torch.cat([part[2] + start for part, start in zip(parts, starts, strict=True)])
    missing = 2 - len(index) % 2 if len(index) % 2 or not len(index) else 0
    if missing:  # the kernel reads columns in pairs: more of them, of zeros
        spare = weight.new_zeros(missing, spans, 8), index.new_full((missing, spans), 0x3333)
        parts.append((*spare, index[:0]))
        index = torch.nn.functional.pad(index, (0, missing), value=weight.shape[1] - 1)
    own = torch.equal(index, torch.arange(weight.shape[1], device=index.device))
    return Columns(
        torch.cat([part[0] for part in parts]),
        torch.cat([part[1] for part in parts]).to(torch.int32).to(torch.int16),
        None if own else index.to(torch.int32).to(torch.int16),
    )


def _pack_slice(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values [stored, spans, 8], bits [stored, spans] int64 and inputs [stored] int64 of a few columns."""
    stored = torch.nn.functional.pad(weight.t(), (0, -weight.shape[0] % SPAN)).unflatten(1, (-1, 4))
    present = stored != 0
    order = present.cumsum(-1)
    chosen = torch.cat([present & (order <= 2), present & (order > 2)])
    # The first two non-zeros of every group, then the others; side by side for each input.
    chosen = chosen.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
    wanted = chosen.flatten(1).any(1).nonzero().squeeze(1)
    chosen, inputs = chosen[wanted], wanted // 2
    # Filled up to two of four from the left, so that all groups have two bits.
    rank = chosen * 4 + 3 - torch.arange(4, device=weight.device)
    places = rank.argsort(dim=-1, descending=True)[..., :2].sort(dim=-1).values
    values = stored[inputs].gather(-1, places).masked_fill_(~chosen.gather(-1, places), 0)
    bits = (1 << places).sum(-1).unflatten(1, (-1, 4))
    keep = (bits << 4 * torch.arange(4, device=weight.device)).sum(-1)
    return values.flatten(1).unflatten(1, (-1, 8)), keep, inputs


def unpack(packed: Columns, rows: int, columns: int) -> Tensor:
    """The [rows, columns] matrix: inverse of pack."""
    stored, spans = packed.keep.shape
    bits = packed.keep.int()[..., None] >> torch.arange(SPAN, device=packed.keep.device) & 1
    groups = bits.view(stored, spans, 4, 4)
    place = groups.cumsum(-1) - 1  # of the value, within its group
    pairs = packed.values.view(stored, spans, 4, 2)
    spread = pairs.gather(-1, place.clamp(0, 1)).masked_fill_(groups == 0, 0)
    dense = spread.reshape(stored, -1)
    if packed.index is not None:
        # At most one of two columns of an input has a value at a place: the sum is exact.
        whole = dense.new_zeros(columns, spans * SPAN)
        dense = whole.index_add_(0, packed.index.int() & 0xFFFF, dense)
    return dense[:, :rows].t()
