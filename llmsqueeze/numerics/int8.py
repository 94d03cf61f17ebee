"""Weights of eight bits, rounded to nearest: codes -127 to 127 and one scale for each output.

The scale follows from the row's largest magnitude, which rounding leaves as it is: 127 steps. So rounding
what was rounded changes nothing, and codes and scales can be read off the decoded weights: whether a matrix
is an int8 one is seen from its values.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127
# Rows that are looked at first: most matrices that do not fit show it there.
_PROBE = 16


def encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [rows, columns] of a finite matrix, and [rows] the largest magnitude that each row has
    afterwards, in its dtype."""
    scale = scales(weight.abs().amax(dim=1))
    codes = (weight.float() / scale[:, None]).round_().clamp_(-LARGEST, LARGEST)
    largest = torch.where(codes.any(dim=1), LARGEST * scale, 0.0)
    return codes.to(torch.int8), largest.to(weight.dtype)


def scales(largest: Tensor) -> Tensor:
    """[rows] fp32: what one step of a code is worth; 1 for rows of zeros."""
    largest = largest.float()
    scale = torch.where(largest > 0, largest / LARGEST, 1.0)
    # Of so few bits that products with codes are exact in fp32, whatever the dtype of the weights.
    short = (scale.view(torch.int32) & ~0x7F).view(torch.float32)
    return short.clamp_min(torch.finfo(torch.float32).tiny)


def decode(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The [rows, columns] matrix, laid out as the codes are."""
    # Into the result's own dtype: no copy in fp32 lies between.
    return torch.mul(codes, scale[:, None], out=torch.empty_like(codes, dtype=dtype))


def round_weight(weight: Tensor) -> Tensor:
    """The matrix of the same dtype that encode and decode leave of it."""
    codes, largest = encode(weight)
    return decode(codes, scales(largest), weight.dtype)


def fits(weight: Tensor) -> bool:
    """Whether rounding would change no value."""
    probe = weight[:_PROBE]
    if not torch.equal(round_weight(probe), probe):
        return False
    return weight.shape[0] <= _PROBE or torch.equal(round_weight(weight), weight)
