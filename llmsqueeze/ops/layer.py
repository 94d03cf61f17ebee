"""Several steps of decoder layers like Llama's as one operator, for few tokens on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from llmsqueeze.numerics import int8
from llmsqueeze.numerics.packing import unpack_bitmask

LINEARS = (
    "linears(Tensor x, Tensor? norm, float epsilon, Tensor[] values, Tensor[] masks, Tensor[] row_offsets,"
    " Tensor[] scales, Tensor? bias, Tensor? residual, bool glu=False) -> Tensor"
)
ROTATE = "rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor"


def linears(
    x: Tensor, norm: Tensor | None, epsilon: float, values: list[Tensor], masks: list[Tensor],
    row_offsets: list[Tensor], scales: list[Tensor], bias: Tensor | None, residual: Tensor | None,
    glu: bool = False,
) -> Tensor:  # fmt: skip
    """Several linears of one input as one: what they put out, one after another.

    norm: [in], x goes through rms_norm() first; None: it does not. Of every weight, in the same order:
    values, mask and row offsets as numerics.packing.pack_bitmask gives them; or the last two empty and
    values [rows, in]. Values are of one dtype for all, 16 bits or fp32 whatever x is; without masks int8
    too, to be multiplied by scales, fp32 [rows], else empty. bias: [out] or None; residual: [..., out] or
    None. glu: of two weights, silu of the first one's outputs times the second one's; no bias or residual.
    Returns [..., out] in x's dtype.
    """
    x = x if norm is None else rms_norm(x, norm, epsilon)
    found = []
    for part, mask, starts, scale in zip(values, masks, row_offsets, scales, strict=True):
        if mask.numel():
            weight = unpack_bitmask(part, mask, starts, x.shape[-1]).to(x.dtype)
        elif scale.numel():
            weight = int8.decode(part, scale, x.dtype)
        else:
            weight = part.to(x.dtype)
        found.append(torch.nn.functional.linear(x, weight))
    return combined(found, bias, residual, glu)


def combined(
    found: list[Tensor], bias: Tensor | None, residual: Tensor | None, glu: bool
) -> Tensor:
    """What linears() makes of the products."""
    if glu:
        return torch.nn.functional.silu(found[0]) * found[1]
    y = torch.cat(found, -1)
    y = y if bias is None else y + bias
    return y if residual is None else y + residual


def rms_norm(x: Tensor, norm: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x²) + epsilon), rounded to x's dtype, · norm: as Llama does."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return norm * scaled.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads turned as rotary embeddings turn them: the first half of each with the second.

    x: [batch, tokens, heads, width]; cos, sin: [batch or 1, tokens, width]; all of one dtype.
    """
    left, right = x.chunk(2, -1)
    return x * cos[:, :, None] + torch.cat([-right, left], -1) * sin[:, :, None]


def linears_shape(
    x: Tensor, norm: Tensor | None, epsilon: float, values: list[Tensor], masks: list[Tensor],
    row_offsets: list[Tensor], scales: list[Tensor], bias: Tensor | None, residual: Tensor | None,
    glu: bool = False,
) -> Tensor:  # fmt: skip
    rows = [len(mask if mask.numel() else part) for part, mask in zip(values, masks, strict=True)]
    return x.new_empty(*x.shape[:-1], rows[0] if glu else sum(rows))


def rotate_shape(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
