"""Coded keys and values as the kernel of decode attention reads them: records of 16 tokens.

tiles: [batch, kv heads, tiles, record bytes] uint8. A record holds, all of one kv head,

codes        K, then V, in the order in which lanes of a warp hand them to tensor cores
parameters   fp16 [8, 2, P]: of tokens g and g + 8. P: the keys' scale if keys have one by token, the values'
             scale, the values' offset if they have one
K outliers   fp16 [16, slots]: what is missing there; uint8 [16, slots]: in which channels
V outliers   the same

and is a multiple of 16 bytes. Fragments: mma m16n8k16 takes a 16 × 16 matrix from 32 lanes, four pairs from
each. With lane = 4 g + t, its pairs 0 to 3 stand in rows g, g + 8, g, g + 8 and columns 2 t, 2 t, 2 t + 8,
2 t + 8 and one further. A fragment of K has tokens as rows and 16 channels as columns; of V, 16 channels as
rows and tokens as columns. In K channels that the rotary embedding turns together stand 8 columns apart, so
that one lane has both.

A pair of 4 bits is a byte, 8 codes of a lane a word. Of 3 bits, four fragments are three words: a pair is
the low six bits of a byte, and the top two bits of three bytes are a pair of the fourth fragment. Of 2 bits,
a byte holds pairs of two fragments. fp8: two words.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from llmsqueeze.numerics.codebook import pack_codes, unpack_codes
from llmsqueeze.numerics.kv_codecs import ChannelCodec, Codec, Fp8, Parts, Rotated, TokenCodec

TOKENS = 16
WIDTHS = (64, 96, 128, 256)
FP8 = 8
MOST_SLOTS = 4


@dataclass(frozen=True)
class TileFormat:
    """width: of a head; bits: of a code, 8 for e4m3. key_scale: keys have a scale for every token, else they
    are coded by channel before the rotary embedding. rotary: how many channels that turns.

    turned_*: whether a Hadamard matrix turned vectors before they were coded.
    """

    width: int
    bits: int
    key_scale: bool
    value_offset: bool = False
    key_slots: int = 0
    value_slots: int = 0
    turned_keys: bool = False
    turned_values: bool = False
    rotary: int = 0

    @classmethod
    def of(cls, keys: Codec, values: Codec, width: int, rotary: int = 0) -> TileFormat | None:
        """Of what these codecs make of a layer's keys and values; None if there is no such format."""
        if width not in WIDTHS:
            return None
        if isinstance(keys, Fp8) and isinstance(values, Fp8):
            return cls(width, FP8, True)
        if isinstance(keys, Rotated) and isinstance(values, Rotated) and keys.bits == values.bits:
            return cls(width, keys.bits, True, turned_keys=True, turned_values=True)
        if not (isinstance(keys, ChannelCodec) and isinstance(values, TokenCodec)):
            return None
        if keys.book.bits != values.book.bits or rotary % 4 or (width - rotary) % 4:
            return None
        if max(keys.slots, values.slots) > MOST_SLOTS:
            return None
        return cls(
            width, keys.book.bits, False, not values.turned, keys.slots, values.slots,
            turned_values=values.turned, rotary=rotary,
        )  # fmt: skip

    def arguments(self) -> list[int]:
        """As operators take it."""
        return [int(field) for field in astuple(self)]

    @classmethod
    def from_arguments(cls, given: list[int]) -> TileFormat:
        width, bits, scale, offset, key_slots, value_slots, keys, values, rotary = given
        return cls(
            width, bits, bool(scale), bool(offset), key_slots, value_slots, bool(keys), bool(values),
            rotary,
        )  # fmt: skip

    @property
    def fragments(self) -> int:
        """Of K, and of V."""
        return self.width // 16

    @property
    def words(self) -> int:
        """32-bit words of codes in a record that a lane reads."""
        return self.fragments * self.bits // 2

    @property
    def run(self) -> int:
        """How many of them lie side by side."""
        return next(n for n in (4, 2, 1) if self.words % n == 0)

    @property
    def parameters(self) -> int:
        return self.key_scale + 1 + self.value_offset

    @property
    def record(self) -> int:
        """Bytes."""
        slots = self.key_slots + self.value_slots
        return 128 * self.words + 2 * TOKENS * self.parameters + 3 * TOKENS * slots

    def empty(self, batch: int, heads: int, tokens: int, device: torch.device) -> Tensor:
        """Tiles for so many tokens. Of zeros: the kernel multiplies what is beyond the last token by 0."""
        tiles = -(-tokens // TOKENS)
        return torch.zeros(batch, heads, tiles, self.record, dtype=torch.uint8, device=device)


@dataclass
class Fields:
    """What tiles hold, [..., tokens, …] each: codes uint8 [D], parameters fp16 [P], outliers [slots]."""

    keys: Tensor
    values: Tensor
    parameters: Tensor
    key_missing: Tensor
    key_channels: Tensor
    value_missing: Tensor
    value_channels: Tensor

    def all(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.__dataclass_fields__]


def write(
    tiles: Tensor, format: TileFormat, start: Tensor | int, keys: Parts, values: Parts
) -> None:
    """Put what codecs encoded, [batch, heads, count, …] each, where token `start` and the next ones lie.

    start: a number or a tensor of one, so that nothing waits for the device. All of them must fit.
    """
    new = fields_of_parts(format, keys, values)
    count = new.keys.shape[-2]
    if not count:
        return
    held = tiles.shape[2]
    touched = min((count + TOKENS - 2) // TOKENS + 1, held)
    start = torch.as_tensor(start, device=tiles.device).reshape(())
    first = torch.clamp(start // TOKENS, max=held - touched)
    index = first + torch.arange(touched, device=tiles.device)
    places = start - TOKENS * first + torch.arange(count, device=tiles.device)
    fields = read_fields(tiles.index_select(2, index), format)
    for field, added in zip(fields.all(), new.all(), strict=True):
        field.index_copy_(-2, places, added)
    tiles.index_copy_(2, index, write_fields(fields, format))


def read(tiles: Tensor, format: TileFormat, count: int) -> tuple[Parts, Parts]:
    """The first `count` tokens as codecs encoded them: the inverse of write from 0."""
    fields = read_fields(tiles[:, :, : -(-count // TOKENS)], format)
    keys, values, parameters, *outliers = (field[..., :count, :] for field in fields.all())
    columns = list(parameters.split(1, dim=-1))
    if format.bits == FP8:
        codes = [codes.contiguous().view(torch.float8_e4m3fn) for codes in (keys, values)]
        return (codes[0], columns[0]), (codes[1], columns[1])
    codes = [pack_codes(codes, format.bits) for codes in (keys, values)]
    if format.key_scale:
        return (codes[0], columns[0]), (codes[1], columns[1])
    key_parts = (codes[0], outliers[1], outliers[0]) if format.key_slots else (codes[0],)
    # A codec's scale and offset are shared by all heads.
    shared = [column[:, :1] for column in reversed(columns)]
    value_parts = (codes[1], *shared)
    if format.value_slots:
        value_parts = (*value_parts, outliers[3], outliers[2])
    return key_parts, value_parts


def fields_of_parts(format: TileFormat, keys: Parts, values: Parts) -> Fields:
    key_codes, value_codes = (
        part.view(torch.uint8)
        if format.bits == FP8
        else unpack_codes(part, format.bits, format.width)
        for part in (keys[0], values[0])
    )
    shape = key_codes.shape[:-1]
    scales = 1 + format.value_offset
    parameters = [*keys[1 : 1 + format.key_scale], *reversed(values[1 : 1 + scales])]
    none = tuple(key_codes.new_empty(*shape, 0, dtype=d) for d in (torch.uint8, torch.float16))
    key_channels, key_missing = keys[1:3] if format.key_slots else none
    value_channels, value_missing = values[1 + scales : 3 + scales] if format.value_slots else none
    return Fields(
        key_codes, value_codes, torch.cat([p.expand(*shape, 1) for p in parameters], dim=-1),
        key_missing, key_channels, value_missing, value_channels,
    )  # fmt: skip


def write_fields(fields: Fields, format: TileFormat) -> Tensor:
    """[..., tiles, record bytes] of fields [..., 16 · tiles, …]."""
    split = [field.unflatten(-2, (-1, TOKENS)) for field in fields.all()]
    keys, values, parameters, *outliers = split
    codes = _join(_key_fragments(keys, format), _value_fragments(values), format)
    halves = parameters.unflatten(-2, (2, 8)).transpose(-3, -2)
    parts = [codes, *(_bytes(x) for x in (halves.flatten(-2), *outliers))]
    return torch.cat(parts, dim=-1)


def read_fields(tiles: Tensor, format: TileFormat) -> Fields:
    """The inverse of write_fields."""
    kinds = [
        (slots, dtype)
        for slots in (format.key_slots, format.value_slots)
        for dtype in (torch.float16, torch.uint8)
    ]
    sizes = [TOKENS * slots * dtype.itemsize for slots, dtype in kinds]
    codes, halves, *outliers = tiles.split(
        [128 * format.words, 2 * TOKENS * format.parameters, *sizes], dim=-1
    )
    keys, values = _part(codes, format)
    halves = halves.contiguous().view(torch.float16).unflatten(-1, (8, 2, format.parameters))
    found = [
        _key_codes(keys, format),
        _value_codes(values),
        halves.transpose(-3, -2).flatten(-3, -2),
    ]
    for part, (slots, dtype) in zip(outliers, kinds, strict=True):
        found.append(part.contiguous().view(dtype).unflatten(-1, (TOKENS, slots)))
    return Fields(*(field.flatten(-3, -2) for field in found))


def pair_order(format: TileFormat) -> Tensor:
    """[D] int64: the channels that come first in pairs of the rotary embedding, then their partners.

    Channels that it does not turn are paired with one another.
    """
    turned, rest = format.rotary // 2, (format.width - format.rotary) // 2
    first = [*range(turned), *range(2 * turned, 2 * turned + rest)]
    second = [*range(turned, 2 * turned), *range(2 * turned + rest, format.width)]
    return torch.tensor(first + second)


# Codes between tokens and fragments: [..., fragments, lane, pair of the lane, code of the pair].


def _key_fragments(codes: Tensor, format: TileFormat) -> Tensor:
    ordered = codes.index_select(-1, pair_order(format).to(codes.device))
    # Token 8 h + g; channel of the pair 8 f + 2 t + e, p: which of the two.
    split = ordered.unflatten(-1, (2, -1, 4, 2)).unflatten(-5, (2, 8))  # h g p f t e
    return _permute(split, (3, 1, 4, 2, 0, 5)).flatten(-3, -2).flatten(-4, -3)


def _key_codes(fragments: Tensor, format: TileFormat) -> Tensor:
    split = fragments.unflatten(-2, (2, 2)).unflatten(-4, (8, 4))  # f g t p h e
    ordered = _permute(split, (4, 1, 3, 0, 2, 5)).flatten(-4).flatten(-3, -2)
    return ordered.index_select(-1, pair_order(format).argsort().to(fragments.device))


def _value_fragments(codes: Tensor) -> Tensor:
    # Token 8 k + 2 t + e; channel 16 f + 8 h + g.
    split = codes.unflatten(-1, (-1, 2, 8)).unflatten(-4, (2, 4, 2))  # k t e f h g
    return _permute(split, (3, 5, 1, 0, 4, 2)).flatten(-3, -2).flatten(-4, -3)


def _value_codes(fragments: Tensor) -> Tensor:
    split = fragments.unflatten(-2, (2, 2)).unflatten(-4, (8, 4))  # f g t k h e
    return _permute(split, (3, 2, 5, 0, 4, 1)).flatten(-3).flatten(-4, -2)


def _permute(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """Of the last dimensions."""
    leading = x.dim() - len(order)
    return x.permute(*range(leading), *(leading + i for i in order))


# Fragments between codes and words: [..., words, lane, 4 bytes].


def _join(keys: Tensor, values: Tensor, format: TileFormat) -> Tensor:
    fragments = torch.cat([keys, values], dim=-4)
    if format.bits == FP8:
        words = fragments.unflatten(-2, (2, 2)).transpose(-4, -3).flatten(-2).flatten(-4, -3)
    else:
        words = fragments[..., 0] | fragments[..., 1] << format.bits
    if format.bits == 2:
        one, two = words.unflatten(-3, (-1, 2)).unbind(-3)
        words = one | two << 4
    elif format.bits == 3:
        *three, last = words.unflatten(-3, (-1, 4)).unbind(-3)
        filled = [w | (last >> 2 * i & 3) << 6 for i, w in enumerate(three)]
        words = torch.stack(filled, dim=-3).flatten(-4, -3)
    runs = words.unflatten(-3, (-1, format.run)).transpose(-3, -2)
    return runs.flatten(-4)


def _part(codes: Tensor, format: TileFormat) -> tuple[Tensor, Tensor]:
    words = codes.unflatten(-1, (-1, 32, format.run, 4)).transpose(-3, -2).flatten(-4, -3)
    if format.bits == FP8:
        pairs = words.unflatten(-1, (2, 2)).unflatten(-4, (-1, 2)).transpose(-4, -3).flatten(-3, -2)
    else:
        if format.bits == 2:
            words = torch.stack([words & 15, words >> 4], dim=-3).flatten(-4, -3)
        elif format.bits == 3:
            three = words.unflatten(-3, (-1, 3)).unbind(-3)
            last = three[0] >> 6 | (three[1] >> 6) << 2 | (three[2] >> 6) << 4
            words = torch.stack([*(w & 63 for w in three), last], dim=-3).flatten(-4, -3)
        mask = 2**format.bits - 1
        pairs = torch.stack([words & mask, words >> format.bits], dim=-1)
    return pairs[..., : format.fragments, :, :, :], pairs[..., format.fragments :, :, :, :]


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8).flatten(-2)
