"""One new token's attention over a cache that lies in tiles: what its kernel is to compute."""

from __future__ import annotations

import torch
from torch import Tensor

from llmsqueeze.numerics.hadamard import hadamard
from llmsqueeze.numerics.kv_constants import read_channel_constants
from llmsqueeze.numerics.kv_tiles import FP8, TOKENS, Fields, TileFormat, pair_order, read_fields

SCHEMA = (
    "kv_attend(Tensor q, Tensor tiles, Tensor length, Tensor? padding, Tensor? books, Tensor? channels,"
    " Tensor? inverse, Tensor? angles, Tensor? steps, Tensor? key_sinks, Tensor? value_sinks,"
    " Tensor counters, int[] format, int window, float scale, float skip=0.0) -> Tensor"
)


def kv_attend(
    q: Tensor, tiles: Tensor, length: Tensor, padding: Tensor | None, books: Tensor | None,
    channels: Tensor | None, inverse: Tensor | None, angles: Tensor | None, steps: Tensor | None,
    key_sinks: Tensor | None, value_sinks: Tensor | None, counters: Tensor, format: list[int],
    window: int, scale: float, skip: float = 0.0,
) -> Tensor:  # fmt: skip
    """softmax(scale · q Kᵀ) V over the cached tokens that are seen, in fp32.

    q: [batch, heads, 1, D], the query after the rotary embedding; tiles: of kv_tiles.TileFormat with the
    arguments `format`; length: [1] int32 on the device, how many tokens are cached. padding: [batch] int32,
    slots at the beginning of each row that are not seen; a token's position is its slot less these. books,
    channels, inverse (for outliers of keys), angles.table and angles.steps: see kv_constants; keys coded by
    channel need all of them. key_sinks, value_sinks: [batch, kv heads, sinks, D] in q's dtype, keys after
    the rotary embedding: what stands at the first positions in place of what tiles hold there. window: only
    the last so many tokens are seen; 0: all. With a window tiles may be fewer than the tokens need, as many
    as ring_tiles() says: tile t lies at t modulo their number. counters: int32, zeros that the kernel works
    with and leaves zero; at least batch · kv heads. Returns [batch, 1, heads, D].

    skip: tiles whose scores, of all heads of a kv head, lie more than so many nats below the largest do not
    count: each of their tokens has less than exp(-skip) of the softmax's weight. Here all of them; kernels
    compare with the largest that they have met, and leave out some of them, always the same ones. 0: none.

    On Hopper tiles are read while launches just before may still run. Such a launch may write q, length,
    padding, sinks and the tile of the newest token, but no tile before it that is seen.
    """
    shape = TileFormat.from_arguments(format)
    batch, heads, _, width = q.shape
    kv_heads = tiles.shape[1]
    fields = read_fields(tiles, shape)
    query = q.float().view(batch, kv_heads, heads // kv_heads, width)
    start = padding if padding is not None else length.new_zeros(batch)
    keys, values = _keys(fields, shape, books, channels, inverse), _values(fields, shape, books)
    numbers = _tile_numbers(length, tiles.shape[2])
    if channels is not None:
        assert angles is not None
        scores = _rotated_scores(query, keys, channels, angles, start, numbers, shape)
    else:
        scores = (hadamard(query) if shape.turned_keys else query) @ keys.mT
    sinks = 0 if key_sinks is None else key_sinks.shape[2]
    slots = (numbers[:, None] * TOKENS + torch.arange(TOKENS, device=q.device)).flatten()
    oldest = start[:, None] if not window else torch.maximum(start, length - window)[:, None]
    seen = (slots >= torch.maximum(oldest, start[:, None] + sinks)) & (slots < length)
    scores = scores.mul(scale).masked_fill(~seen[:, None, None], -torch.inf)
    if skip > 0:
        scores = _without_low(scores, skip)
    if key_sinks is None or value_sinks is None:
        weights = scores.softmax(-1)
        y = weights @ values
        y = hadamard(y) if shape.turned_values else y
    else:
        slots = start[:, None] + torch.arange(sinks, device=q.device)
        seen = (slots >= oldest) & (slots < length)
        first = (query @ key_sinks.float().mT).mul(scale)
        first = first.masked_fill(~seen[:, None, None], -torch.inf)
        weights = torch.cat([first, scores], dim=-1).softmax(-1)
        y = weights[..., sinks:] @ values
        y = (hadamard(y) if shape.turned_values else y) + weights[..., :sinks] @ value_sinks.float()
    return y.to(q.dtype).view(batch, 1, heads, width)


def ring_tiles(window: int) -> int:
    """How many tiles hold all that a window sees, whatever the newest token, and where that one is put."""
    return (window - 1) // TOKENS + 2


def _tile_numbers(length: Tensor, held: int) -> Tensor:
    """[held] of the tiles at every place, the last of each; below 0 where there is none."""
    newest = (length - 1) // TOKENS
    return newest - (newest - torch.arange(held, device=length.device)) % held


def _without_low(scores: Tensor, skip: float) -> Tensor:
    """Scores [batch, kv heads, group, tokens], those of tiles that lie too low -inf."""
    low = scores <= scores.amax(dim=-1, keepdim=True) - skip
    low = low.unflatten(-1, (-1, TOKENS)).all(dim=-1).all(dim=2, keepdim=True)
    return scores.masked_fill(low.repeat_interleave(TOKENS, dim=-1), -torch.inf)


def _keys(
    fields: Fields,
    shape: TileFormat,
    books: Tensor | None,
    channels: Tensor | None,
    inverse: Tensor | None,
) -> Tensor:
    """[batch, kv heads, tokens, D] fp32; of keys by channel the values of their codes, outliers added."""
    keys = _decoded(fields.keys, shape, books, 0)
    if shape.key_scale:
        return keys * fields.parameters[..., :1].float()
    if shape.key_slots:
        assert inverse is not None
        where = fields.key_channels.long()
        unit = inverse[None, :, None].expand(*where.shape[:-1], -1).gather(-1, where)
        keys.scatter_add_(-1, where, fields.key_missing.float() * unit)
    return keys


def _values(fields: Fields, shape: TileFormat, books: Tensor | None) -> Tensor:
    values = _decoded(fields.values, shape, books, 1)
    scale, *offset = fields.parameters[..., int(shape.key_scale) :].float().split(1, dim=-1)
    values = values * scale + offset[0] if offset else values * scale
    if shape.value_slots:
        values.scatter_add_(-1, fields.value_channels.long(), fields.value_missing.float())
    return values


def _decoded(codes: Tensor, shape: TileFormat, books: Tensor | None, side: int) -> Tensor:
    if shape.bits == FP8:
        return codes.contiguous().view(torch.float8_e4m3fn).float()
    assert books is not None
    return books[side, : 2**shape.bits, 0].float()[codes.long()]


def _rotated_scores(
    query: Tensor, keys: Tensor, channels: Tensor, angles: Tensor, start: Tensor, numbers: Tensor,
    shape: TileFormat,
) -> Tensor:  # fmt: skip
    """[batch, kv heads, group, tokens]: products with keys that are turned by their positions."""
    order = pair_order(shape).to(keys.device)
    six = read_channel_constants(channels).float()[:, None].unbind(-1)  # [heads, 1, 16, D/2] each
    x, y = keys[..., order].unflatten(2, (-1, TOKENS)).chunk(2, dim=-1)
    x, y = (six[i] * x + six[i + 1] * y + six[i + 2] for i in (0, 3))
    blocks = angles[TOKENS + numbers.clamp_min(0), None]
    turned = torch.cat(_turn(x, y, blocks), dim=-1).flatten(2, 3)
    # A key's position is its slot less the padding: the query is turned by that instead.
    one, two = query[..., order].chunk(2, dim=-1)
    for rows in (angles[TOKENS + start // TOKENS], angles[start % TOKENS]):
        one, two = _turn(one, two, rows[:, None, None])
    return torch.cat([one, two], dim=-1) @ turned.mT


def _turn(x: Tensor, y: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = angles.unbind(-1)
    return cos * x - sin * y, sin * x + cos * y


def kv_attend_shape(q: Tensor, *rest: object) -> Tensor:
    return q.new_empty(q.shape[0], 1, q.shape[1], q.shape[3])
