"""Rotary position embedding of [..., D] vectors, the two halves of the rotated channels paired."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., D] turned as transformers does; cos, sin: [..., R], R ≤ D, broadcast against x.

    Channels from R on stay as they are (partial rotary).
    """
    width, half = cos.shape[-1], cos.shape[-1] // 2
    out = (
        x * cos
        if width == x.shape[-1]
        else torch.cat([x[..., :width] * cos, x[..., width:]], dim=-1)
    )
    out[..., :half].addcmul_(x[..., half:width], sin[..., :half], value=-1)
    out[..., half:width].addcmul_(x[..., :half], sin[..., half:])
    return out


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The inverse of rotate, exact for rounded and for scaled cos and sin (YaRN's attention factor).

    Products and sums are separate operations: fused ones would round differently in different places of
    a batch, and what a token is coded as must not depend on where it stood.
    """
    width = cos.shape[-1]
    norm = cos * cos + sin * sin
    turned = x[..., :width]
    turned = turned * (cos / norm) - _half(turned) * (sin / norm)
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], dim=-1)


def _half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
