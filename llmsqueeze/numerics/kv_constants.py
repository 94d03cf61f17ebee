"""What decode attention over tiles needs besides them: codebooks, and the rotary embedding of keys.

A token at position 16 b + j has its key turned by the angle of 16 b and by that of j. The second, with the
scale, the offset and the attention factor of keys, is a constant of every layer, the same for all tiles; by
the first the query is turned back instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmsqueeze.numerics.kv_codecs import (
    ChannelCodec,
    Codec,
    Rotated,
    TokenCodec,
    normal_book,
)
from llmsqueeze.numerics.kv_tiles import FP8, TOKENS, TileFormat, pair_order


@dataclass(frozen=True)
class Angles:
    """Of a model, for all layers. table: [16 + blocks, D/2, 2] fp32, cos and sin of pairs of channels, as
    pair_order pairs them, at positions 0 to 15, then 0, 16, 32, …; steps: [blocks, D] fp16, what of it a
    warp reads for a tile; gain: the attention factor of keys (YaRN)."""

    table: Tensor
    steps: Tensor
    gain: float

    @classmethod
    def of(cls, cos: Tensor, sin: Tensor, format: TileFormat) -> Angles:
        """cos, sin: [positions, R] of the model's rotary module, scaled by its attention factor."""
        half = format.rotary // 2
        gain = float(torch.hypot(cos[0, 0].double(), sin[0, 0].double())) if half else 1.0
        rows = torch.cat([torch.arange(TOKENS), torch.arange(0, len(cos), TOKENS)]).to(cos.device)
        if len(cos) < TOKENS:
            raise ValueError(f"angles of {len(cos)} positions; a tile has {TOKENS}")
        table = cos.new_zeros(len(rows), format.width // 2, 2, dtype=torch.float32)
        table[..., 0] = 1
        table[:, :half, 0] = (cos[rows, :half].double() / gain).float()
        table[:, :half, 1] = (sin[rows, :half].double() / gain).float()
        return cls(table, _steps(table[TOKENS:]), gain)


def _steps(table: Tensor) -> Tensor:
    # Pair 16 a + 8 f + 2 t + e: of fragments 2 a and 2 a + 1.
    split = table.half().unflatten(1, (-1, 2, 4, 2))  # block a f t e (cos, sin)
    return split.permute(0, 1, 3, 2, 5, 4).flatten(1).contiguous()


def books(keys: Codec, values: Codec, format: TileFormat) -> Tensor | None:
    """[2, 256, 2] fp16: the values that both codes of a pair stand for, of K and of V. None for fp8.

    A pair's bits beyond those of its codes do not count.
    """
    if format.bits == FP8:
        return None
    return torch.stack([_pairs(_decoded(codec), format.bits) for codec in (keys, values)])


def _decoded(codec: Codec) -> Tensor:
    if isinstance(codec, Rotated):
        return normal_book(codec.bits, torch.device("cpu")).decode
    assert isinstance(codec, ChannelCodec | TokenCodec)
    return codec.book.decode


def _pairs(decoded: Tensor, bits: int) -> Tensor:
    index, mask = torch.arange(256, device=decoded.device), 2**bits - 1
    return torch.stack([decoded[index & mask], decoded[index >> bits & mask]], dim=-1).half()


def channel_constants(keys: ChannelCodec, angles: Angles, format: TileFormat) -> Tensor:
    """[heads, D/16, 3, 32, 4, 2] fp16: for a fragment of K and a lane twelve pairs, in three times 16 bytes.

    Six for token g, then for token g + 8 of a tile: what the first of two channels becomes of the codes'
    values x and y, a1 x + a2 y + a0, and the second, b1 x + b2 y + b0; in the order a1 a2 a0 b1 b2 b0.
    """
    order = pair_order(format).to(keys.scale.device)
    first, second = order.chunk(2)
    gains = torch.ones(format.width, dtype=torch.float64, device=order.device)
    gains[: format.rotary] = angles.gain
    s, z = (t[:, 0].double() * gains for t in (keys.scale, keys.offset))
    s1, s2, z1, z2 = (t[:, None, part] for t in (s, z) for part in (first, second))
    cos, sin = angles.table[:TOKENS].double().to(s.device).unbind(-1)
    six = [cos * s1, -sin * s2, cos * z1 - sin * z2, sin * s1, cos * s2, sin * z1 + cos * z2]
    stacked = torch.stack([x.expand(len(s), TOKENS, -1) for x in six], dim=-1).half()
    # Head, row, g, fragment, t, e, six → head, fragment, (row, six) in threes of four, lane, four, e.
    split = stacked.unflatten(2, (-1, 4, 2)).unflatten(1, (2, 8))
    ordered = split.permute(0, 3, 1, 6, 2, 4, 5).flatten(2, 3).flatten(-3, -2)
    return ordered.unflatten(2, (3, 4)).transpose(3, 4).contiguous()


def read_channel_constants(constants: Tensor) -> Tensor:
    """The same as [heads, 16, D/2, 6]: per token of a tile and pair of channels."""
    ordered = constants.transpose(3, 4).flatten(2, 3)
    split = ordered.unflatten(3, (8, 4)).unflatten(2, (2, 6))
    return split.permute(0, 2, 4, 1, 5, 6, 3).flatten(3, 5).flatten(1, 2)


def inverse_scale(keys: ChannelCodec) -> Tensor:
    """[heads, D] fp32: outliers are added to codes' values, before those are scaled."""
    return (1 / keys.scale[:, 0].double()).float()
