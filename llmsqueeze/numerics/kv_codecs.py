"""How keys or values of one layer are coded: [batch, heads, tokens, D] to packed parts and back.

Every part is [batch, heads or 1, tokens, …], and a token's parts depend on that token alone, so a cache may
append, drop and reorder tokens in them freely.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from llmsqueeze.numerics.codebook import (
    look_up,
    lookup_table,
    normal_codebook,
    pack_codes,
)
from llmsqueeze.numerics.feedback import Feedback, round_with_feedback
from llmsqueeze.numerics.hadamard import hadamard

FP8_MAX = 448.0  # of e4m3
TINY = float(torch.finfo(torch.float16).smallest_normal)

Parts = tuple[Tensor, ...]


class Codec(Protocol):
    """How one tensor of a layer is coded."""

    @property
    def pre_rope(self) -> bool:
        """Whether keys are coded as they are before the rotary embedding."""

    @property
    def turned(self) -> bool:
        """Whether a Hadamard matrix turns vectors before they are coded."""

    def encode(self, x: Tensor) -> Parts: ...

    def decode(
        self, parts: Parts, width: int, dtype: torch.dtype, *, turn_back: bool = True
    ) -> Tensor:
        """[batch, heads, tokens, width]; computed in fp32. Without turn_back, turned vectors stay so."""

    def bits_per_element(self, heads: int, width: int) -> float:
        """Stored bits by entry, scales, outliers and padding included."""

    def to(self, device: torch.device) -> Codec:
        """The same, its tensors on a device: that of the vectors it is given."""


@dataclass(frozen=True)
class Identity:
    """Vectors as they are, in a dtype of `bits` bits: the plumbing alone."""

    bits: int = 16
    pre_rope: bool = False
    turned: bool = False

    def to(self, device: torch.device) -> Identity:
        return self

    def encode(self, x: Tensor) -> Parts:
        return (x,)

    def decode(
        self, parts: Parts, width: int, dtype: torch.dtype, *, turn_back: bool = True
    ) -> Tensor:
        return parts[0].to(dtype)

    def bits_per_element(self, heads: int, width: int) -> float:
        return self.bits


@dataclass(frozen=True)
class Fp8:
    """e4m3, scaled by the largest magnitude of every token and head."""

    pre_rope: bool = False
    turned: bool = False

    def to(self, device: torch.device) -> Fp8:
        return self

    def encode(self, x: Tensor) -> Parts:
        x = x.float()
        # The scale is used as it is stored, and never 0: it divides.
        scale = (x.abs().amax(dim=-1, keepdim=True) / FP8_MAX).half().clamp_min(TINY)
        return (x / scale.float()).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale

    def decode(
        self, parts: Parts, width: int, dtype: torch.dtype, *, turn_back: bool = True
    ) -> Tensor:
        codes, scale = parts
        return (codes.float() * scale.float()).to(dtype)

    def bits_per_element(self, heads: int, width: int) -> float:
        return 8 + 16 / width


@dataclass(frozen=True)
class Codebook:
    """encode: [2^bits] fp64, ascending, of which the nearest is chosen; decode: [2^bits] fp64, what it then
    stands for (the same, or stretched by Q-Norm)."""

    bits: int
    encode: Tensor
    decode: Tensor

    def to(self, device: torch.device) -> Codebook:
        return Codebook(self.bits, self.encode.to(device), self.decode.to(device))

    def nearest(self, x: Tensor) -> Tensor:
        """uint8 codes of fp64 values."""
        return torch.bucketize(x.contiguous(), self.borders).to(torch.uint8)

    def values(self, codes: Tensor) -> Tensor:
        """fp64: what single codes stand for."""
        return self.decode[codes.long()]

    def look_up(self, packed: Tensor, width: int) -> Tensor:
        """fp32 [..., width]: what packed codes stand for."""
        return look_up(packed, self._table, self.bits, width)

    @functools.cached_property
    def borders(self) -> Tensor:
        """[2^bits - 1] fp64: where one code ends and the next begins."""
        return (self.encode[1:] + self.encode[:-1]) / 2

    @functools.cached_property
    def _table(self) -> Tensor:
        return lookup_table(self.decode.float(), self.bits)


@functools.lru_cache(maxsize=16)
def normal_book(bits: int, device: torch.device) -> Codebook:
    """The best values for a normal distribution."""
    values = normal_codebook(bits).to(device)
    return Codebook(bits, values, values)


@dataclass(frozen=True)
class Rotated:
    """The vector of every token and head turned by a Hadamard matrix, after which its entries are nearly
    normal, then coded by the best values for a normal distribution and a scale (TurboQuant, arXiv
    2504.19874, without its residual)."""

    bits: int
    pre_rope: bool = False
    turned: bool = True

    def to(self, device: torch.device) -> Rotated:
        return self

    def encode(self, x: Tensor) -> Parts:
        turned = hadamard(x.double())
        book = normal_book(self.bits, x.device)
        power = turned.square().mean(dim=-1, keepdim=True).sqrt()
        codes = book.nearest(turned / power.clamp_min(TINY))
        # The scale that brings the coded vector nearest to the true one.
        coded = book.values(codes)
        scale = (turned * coded).sum(-1, keepdim=True) / coded.square().sum(-1, keepdim=True)
        return pack_codes(codes, self.bits), scale.half()

    def decode(
        self, parts: Parts, width: int, dtype: torch.dtype, *, turn_back: bool = True
    ) -> Tensor:
        codes, scale = parts
        turned = normal_book(self.bits, codes.device).look_up(codes, width)
        turned = turned.mul_(scale.float())
        return (hadamard(turned) if turn_back else turned).to(dtype)

    def bits_per_element(self, heads: int, width: int) -> float:
        return _code_bits(width, self.bits) + 16 / width


@dataclass(frozen=True)
class ChannelCodec:
    """Keys before the rotary embedding, with an offset and a scale for every channel (KVQuant, arXiv
    2401.18079, section 3.1 and 3.2), and `slots` outliers of every token and head kept exactly (3.3).

    offset, scale: [heads, 1, D] fp32. feedback: how rounding errors are passed on; None to round every
    channel to the nearest.
    """

    book: Codebook
    offset: Tensor
    scale: Tensor
    slots: int
    feedback: Feedback | None
    pre_rope: bool = True
    turned: bool = False

    def to(self, device: torch.device) -> ChannelCodec:
        return replace(
            self,
            book=self.book.to(device),
            offset=self.offset.to(device),
            scale=self.scale.to(device),
            feedback=self.feedback.to(device) if self.feedback else None,
        )

    def encode(self, x: Tensor) -> Parts:
        offset, scale, x = self.offset.double(), self.scale.double(), x.double()
        unit = (x - offset) / scale
        codes = self.book.nearest(unit)
        outliers = None
        if self.slots:
            error = (self.book.values(codes) - unit).abs() * scale
            outliers = _largest(error, self.slots)
        if self.feedback:
            book = self.book
            codes = round_with_feedback(unit, book.borders, book.decode, self.feedback, outliers)
        packed = pack_codes(codes, self.book.bits)
        if outliers is None:
            return (packed,)
        return packed, *_outlier_parts(x, self.book.values(codes) * scale + offset, outliers)

    def decode(
        self, parts: Parts, width: int, dtype: torch.dtype, *, turn_back: bool = True
    ) -> Tensor:
        x = torch.addcmul(self.offset, self.book.look_up(parts[0], width), self.scale)
        return _add_outliers(x, parts[1:]).to(dtype)

    def bits_per_element(self, heads: int, width: int) -> float:
        return _code_bits(width, self.book.bits) + _slot_bits(self.slots, width)


@dataclass(frozen=True)
class TokenCodec:
    """Values, with an offset and a scale for every token (KVQuant, sections 3.1 to 3.3).

    turned: whether a Hadamard matrix spreads every head's vector first; then the range is centred at zero,
    and no offset is stored. The scale is half the range that the token's entries in all heads span, its
    outliers aside: no entry is clipped.
    """

    book: Codebook
    slots: int
    turned: bool
    pre_rope: bool = False

    def to(self, device: torch.device) -> TokenCodec:
        return replace(self, book=self.book.to(device))

    def encode(self, x: Tensor) -> Parts:
        x, offset, scale, outliers = self.normalise(x)
        codes = self.book.nearest((x - offset.double()) / scale.double())
        packed = pack_codes(codes, self.book.bits)
        parts = (packed, scale) if self.turned else (packed, offset, scale)
        if outliers is None:
            return parts
        coded = self.book.values(codes) * scale.double() + offset.double()
        return *parts, *_outlier_parts(x, coded, outliers)

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x fp64, rotated if values are; every token's offset and scale, fp16; channels of its outliers."""
        x = hadamard(x.double()) if self.turned else x.double()
        outliers, low, high = None, x, x
        if self.slots:
            middle = (x.amax(-1, keepdim=True) + x.amin(-1, keepdim=True)) / 2
            outliers = _largest((x - middle).abs(), self.slots)
            low = x.scatter(-1, outliers, torch.inf)
            high = x.scatter(-1, outliers, -torch.inf)
        low, high = low.amin((1, 3), keepdim=True), high.amax((1, 3), keepdim=True)
        if self.turned:
            high = torch.maximum(high, -low)
            low = -high
        offset, scale = span(low, high)
        return x, offset, scale, outliers

    def decode(
        self, parts: Parts, width: int, dtype: torch.dtype, *, turn_back: bool = True
    ) -> Tensor:
        x = self.book.look_up(parts[0], width)
        if self.turned:
            x, rest = x.mul_(parts[1].float()), parts[2:]
        else:
            x, rest = torch.addcmul(parts[1].float(), x, parts[2].float()), parts[3:]
        x = _add_outliers(x, rest)
        return (hadamard(x) if self.turned and turn_back else x).to(dtype)

    def bits_per_element(self, heads: int, width: int) -> float:
        shared = (16 if self.turned else 32) / (heads * width)
        return _code_bits(width, self.book.bits) + shared + _slot_bits(self.slots, width)


def span(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """fp16 offset and scale, so that offset ± scale holds both: neither is beyond because of rounding."""
    offset = ((high + low) / 2).half()
    middle = offset.to(low.dtype)
    scale = torch.maximum(high - middle, middle - low) * (1 + 2**-10)
    return offset, scale.half().clamp_min(TINY)


def _largest(x: Tensor, count: int) -> Tensor:
    """[..., count]: where the largest along the last dimension are, NaN first; of equals the first ones.

    Equals are common: the least and the greatest of a vector are as far from the middle between them. topk
    takes one or the other, by device.
    """
    left, found = x.clone(), []
    for _ in range(count):
        found.append(left.argmax(-1, keepdim=True))
        left.scatter_(-1, found[-1], -torch.inf)
    return torch.cat(found, -1)


def _outlier_parts(x: Tensor, coded: Tensor, outliers: Tensor) -> Parts:
    """Channels [..., slots], and fp16 what is missing there between the coded and the true entry."""
    missing = (x - coded).gather(-1, outliers).half()
    wide = x.shape[-1] > 256
    return outliers.to(torch.int16 if wide else torch.uint8), missing


def _add_outliers(x: Tensor, parts: Parts) -> Tensor:
    if parts:
        channels, missing = parts
        x.scatter_add_(-1, channels.long(), missing.float())
    return x


def _code_bits(width: int, bits: int) -> float:
    return 8 * (-(-width // 8) * bits) / width


def _slot_bits(slots: int, width: int) -> float:
    return slots * (32 if width > 256 else 24) / width
