"""Coding new tokens' keys and values into tiles: what its kernel is to compute."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from llmsqueeze.numerics import kv_tiles
from llmsqueeze.numerics.feedback import Feedback, group_ends
from llmsqueeze.numerics.kv_codecs import (
    ChannelCodec,
    Codebook,
    Codec,
    Fp8,
    Rotated,
    TokenCodec,
    normal_book,
)
from llmsqueeze.numerics.kv_constants import Angles
from llmsqueeze.numerics.kv_tiles import TOKENS, TileFormat
from llmsqueeze.numerics.rope import rotate

SCHEMA = (
    "kv_append(Tensor key, Tensor value, Tensor(a!) tiles, Tensor length, Tensor? padding, Tensor? books,"
    " Tensor? offset, Tensor? scale, Tensor? order, Tensor? steps, Tensor? angles, Tensor(b!)? key_sinks,"
    " Tensor(c!)? value_sinks, int[] format, int window=0) -> ()"
)


def kv_append(
    key: Tensor, value: Tensor, tiles: Tensor, length: Tensor, padding: Tensor | None,
    books: Tensor | None, offset: Tensor | None, scale: Tensor | None, order: Tensor | None,
    steps: Tensor | None, angles: Tensor | None, key_sinks: Tensor | None, value_sinks: Tensor | None,
    format: list[int], window: int = 0,
) -> None:  # fmt: skip
    """Code the newest tokens, as kv_codecs would, and put them into tiles; into the sinks too, if they are.

    key, value: [batch, kv heads, tokens, D], keys after the rotary embedding; length: [1] int32 on the
    device, how many tokens are cached, these included, and no more of them than tiles hold; books: of
    encoding_books(), None for fp8. Of keys by channel: offset and scale, [kv heads, D] fp32, and angles: see
    coding_angles(); order and steps: see feedback_constants(), None for none. tiles, length, padding,
    key_sinks, value_sinks, format, window: as in kv_attend. On CUDA all is computed in fp32, here what
    kv_codecs computes in fp64 is: a number at a border may be coded to either side.
    """
    first = length.long() - key.shape[2]
    for index, token in enumerate(zip(key.split(1, dim=2), value.split(1, dim=2), strict=True)):
        _one(
            *token, tiles, first + index, padding, books, offset, scale, order, steps, angles, key_sinks,
            value_sinks, format, window,
        )  # fmt: skip


def _one(
    key: Tensor, value: Tensor, tiles: Tensor, slot: Tensor, padding: Tensor | None,
    books: Tensor | None, offset: Tensor | None, scale: Tensor | None, order: Tensor | None,
    steps: Tensor | None, angles: Tensor | None, key_sinks: Tensor | None, value_sinks: Tensor | None,
    format: list[int], window: int,
) -> None:  # fmt: skip
    shape = TileFormat.from_arguments(format)
    position = slot if padding is None else slot - padding.long()
    keys: Codec
    values: Codec
    arriving = key
    if books is None:
        keys = values = Fp8()
    elif shape.key_scale:
        keys = values = Rotated(shape.bits)
    else:
        assert offset is not None and scale is not None and angles is not None
        of_keys, of_values = (Codebook(shape.bits, *side.double()) for side in books)
        feedback = None
        if order is not None and steps is not None:
            feedback = Feedback(order.long(), _groups(steps.double(), shape.width))
        keys = ChannelCodec(of_keys, offset[:, None], scale[:, None], shape.key_slots, feedback)
        values = TokenCodec(of_values, shape.value_slots, shape.turned_values)
        if shape.rotary:
            at = position.clamp_min(0)
            cos, sin = _cos_sin(angles, at, shape.rotary)
            arriving = rotate(key.float(), cos, -sin)
    place = slot % (TOKENS * tiles.shape[2]) if window else slot
    kv_tiles.write(tiles, shape, place, keys.encode(arriving), values.encode(value))
    if key_sinks is not None and value_sinks is not None:
        rows = torch.arange(len(key), device=key.device)
        place = position.expand(len(key)).clamp(0, key_sinks.shape[2] - 1)
        new = ((position >= 0) & (position < key_sinks.shape[2])).expand(len(key))[:, None, None]
        for sinks, x in ((key_sinks, key), (value_sinks, value)):
            sinks[rows, :, place] = torch.where(
                new, x[:, :, 0].to(sinks.dtype), sinks[rows, :, place]
            )


def encoding_books(keys: Codec, values: Codec) -> Tensor | None:
    """[2, 2, 2^bits] fp32, of K and of V: what is chosen from, and what it then stands for. None for fp8."""
    books = []
    for codec in (keys, values):
        if isinstance(codec, Fp8):
            return None
        assert isinstance(codec, Rotated | ChannelCodec | TokenCodec)
        book = (
            normal_book(codec.bits, torch.device("cpu"))
            if isinstance(codec, Rotated)
            else codec.book
        )
        books.append(torch.stack([book.encode, book.decode]).float())
    return torch.stack(books)


def feedback_constants(feedback: Feedback) -> tuple[Tensor, Tensor]:
    """order: [heads, D] int32; steps: [heads, all of them, group after group] fp32."""
    return feedback.order.int(), torch.cat([s.flatten(1) for s in feedback.steps], dim=1).float()


def coding_angles(angles: Angles) -> Tensor:
    """The table, by two of whose entries, multiplied, a key is turned back and loses the attention factor."""
    return angles.table * angles.gain**-0.5


def _groups(steps: Tensor, width: int) -> tuple[Tensor, ...]:
    """The inverse."""
    ends = group_ends(width)[:-1]
    sizes = [(b - a, width - b) for a, b in itertools.pairwise([0, *ends])]
    split = steps.split([n * rest for n, rest in sizes], dim=1)
    return tuple(s.unflatten(1, size) for s, size in zip(split, sizes, strict=True))


def _cos_sin(angles: Tensor, position: Tensor, rotary: int) -> tuple[Tensor, Tensor]:
    """[batch or 1, 1, 1, R] each."""
    half = rotary // 2
    c1, s1 = angles[TOKENS + position // TOKENS, :half].unbind(-1)
    c2, s2 = angles[position % TOKENS, :half].unbind(-1)
    cos, sin = c1 * c2 - s1 * s2, s1 * c2 + c1 * s2
    return tuple(torch.cat([x, x], dim=-1)[:, None, None] for x in (cos, sin))  # type: ignore[return-value]


def kv_append_shape(*arguments: object) -> None:
    return None
