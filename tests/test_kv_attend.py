"""Attention over tiles: the operator against attention in fp64 over what codecs decode."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from llmsqueeze.numerics import kv_constants, kv_tiles
from llmsqueeze.numerics.feedback import Feedback, factorise
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
from llmsqueeze.numerics.kv_tiles import TileFormat
from llmsqueeze.numerics.rope import rotate
from llmsqueeze.ops import kv_attend, kv_kernels
from llmsqueeze.ops.packed_attention import ring_tiles


@dataclass
class Case:
    """A layer's cache in tiles, and what it holds."""

    format: TileFormat
    tiles: Tensor
    length: Tensor
    padding: Tensor | None
    constants: tuple[Tensor | None, ...]  # books, channels, inverse, angles, steps
    sinks: tuple[Tensor | None, Tensor | None]
    keys: Tensor  # fp64, as attention is to see them
    values: Tensor
    kv_heads: int

    def arguments(self, q: Tensor, window: int, scale: float) -> tuple[object, ...]:
        counters = torch.zeros(len(q) * self.kv_heads, dtype=torch.int32, device=q.device)
        return (
            q, self.tiles, self.length, self.padding, *self.constants, *self.sinks, counters,
            self.format.arguments(), window, scale,
        )  # fmt: skip

    def expected(self, q: Tensor, window: int, scale: float) -> Tensor:
        """[batch, 1, heads, D] fp64."""
        batch, heads, _, width = q.shape
        query = q.double().view(batch, self.kv_heads, -1, width)
        scores = query @ self.keys.mT * scale
        length = self.keys.shape[2]
        slots = torch.arange(length, device=q.device)
        start = 0 if self.padding is None else self.padding[:, None]
        seen = (slots >= start) & (slots >= (length - window if window else 0))
        scores = scores.masked_fill(~seen.expand(batch, -1)[:, None, None], -torch.inf)
        return (scores.softmax(-1) @ self.values).view(batch, 1, heads, width)


@functools.cache
def feedback_of(heads: int, width: int) -> Feedback:
    diagonal, factors = factorise(torch.eye(width) + 0.3, 2)
    return Feedback.of(diagonal.expand(heads, -1), factors.expand(heads, -1, -1))


def codecs_of(
    kind: str, bits: int, heads: int, width: int, slots: int, generator: torch.Generator
) -> tuple[Codec, Codec]:
    """kind: fp8, rotated, channels, or channels-turned."""
    if kind == "fp8":
        return Fp8(), Fp8()
    if kind == "rotated":
        return Rotated(bits), Rotated(bits)
    values = normal_book(bits, torch.device("cpu")).decode / 2.8
    book = Codebook(bits, values, values * 1.03 + 0.01)
    offset, scale = torch.randn(2, heads, 1, width, generator=generator)
    feedback = feedback_of(heads, width) if slots else None
    # Of 16 bits, as checkpoints have them.
    keys = ChannelCodec(
        book, offset.half().float(), (scale.exp() * 2).half().float(), slots, feedback
    )
    return keys, TokenCodec(book, slots, turned=kind == "channels-turned")


def make_case(
    kind: str, bits: int = 4, *, batch: int = 2, kv_heads: int = 2, width: int = 64, tokens: int = 45,
    slots: int = 0, sinks: int = 0, padding: tuple[int, ...] | None = None, rotary: int | None = None,
    gain: float = 1.0, spare: int = 20, dtype: torch.dtype = torch.bfloat16, device: str = "cpu",
    theta: float = 1e4, seed: int = 0, ring: int = 0,
) -> Case:  # fmt: skip
    """ring: how many tiles there are, of which only the last ones are kept; 0: as many as are needed."""
    generator = torch.Generator().manual_seed(seed)
    keys_codec, values_codec = codecs_of(kind, bits, kv_heads, width, slots, generator)
    keys_codec, values_codec = (c.to(torch.device(device)) for c in (keys_codec, values_codec))
    pre_rope = keys_codec.pre_rope
    rotary = width if rotary is None else rotary
    x = torch.randn(2, batch, kv_heads, tokens, width, generator=generator).to(device)
    if isinstance(keys_codec, ChannelCodec):
        x[0] = x[0] * keys_codec.scale / 2.5 + keys_codec.offset
    format = TileFormat.of(keys_codec, values_codec, width, rotary if pre_rope else 0)
    assert format is not None
    parts = keys_codec.encode(x[0]), values_codec.encode(x[1])
    tiles = format.empty(batch, kv_heads, tokens + spare, torch.device(device))
    kv_tiles.write(tiles, format, 0, *parts)

    keys = keys_codec.decode(parts[0], width, torch.float32).double()
    values = values_codec.decode(parts[1], width, torch.float32).double()
    start = (
        torch.zeros(batch, dtype=torch.int32) if padding is None else torch.tensor(padding).int()
    )
    constants: tuple[Tensor | None, ...] = (kv_constants.books(keys_codec, values_codec, format),)
    if pre_rope:
        places = torch.arange(tiles.shape[2] * 16).double()
        turns = places[:, None] * theta ** -(torch.arange(rotary // 2).double() * 2 / rotary)
        cos, sin = (torch.cat([f, f], -1).to(device) * gain for f in (turns.cos(), turns.sin()))
        ids = (torch.arange(tokens) - start[:, None]).clamp_min(0)
        keys = rotate(keys, cos[ids][:, None], sin[ids][:, None])
        angles = Angles.of(cos, sin, format)
        assert isinstance(keys_codec, ChannelCodec)
        channels = kv_constants.channel_constants(keys_codec, angles, format)
        inverse = kv_constants.inverse_scale(keys_codec) if slots else None
        constants = (*constants, channels, inverse, angles.table, angles.steps)
    else:
        constants = (*constants, None, None, None, None)
    kept: tuple[Tensor | None, Tensor | None] = (None, None)
    if sinks:
        exact = torch.randn(2, batch, kv_heads, sinks, width, generator=generator).to(dtype)
        for row in range(batch):
            first = int(start[row])
            count = min(sinks, tokens - first)
            for whole, part in zip((keys, values), exact, strict=True):
                whole[row, :, first : first + count] = part[row, :, :count].double().to(device)
        kept = exact[0].to(device), exact[1].to(device)
    constants = tuple(c if c is None else c.to(device) for c in constants)
    if ring:
        tiles = in_ring(tiles, tokens, ring)
    length = torch.tensor([tokens], dtype=torch.int32, device=device)
    given = None if padding is None else start.to(device)
    return Case(format, tiles, length, given, constants, kept, keys, values, kv_heads)


def in_ring(tiles: Tensor, tokens: int, held: int) -> Tensor:
    """The last of a sequence's tiles where they lie if there are so many; what was never written is 0."""
    found = torch.zeros_like(tiles[:, :, :1]).repeat(1, 1, held, 1)
    for number in range(-(-tokens // 16)):
        found[:, :, number % held] = tiles[:, :, number]
    return found


def query_for(case: Case, group: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    batch, heads, _, width = case.keys.shape
    shape = (batch, heads * group, 1, width)
    q = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return q.to(dtype).to(case.keys.device)


def off(case: Case, group: int, window: int = 0, dtype: torch.dtype = torch.float32) -> float:
    """Relative error against fp64: of the operator, on a CPU the larger of its and the reference's."""
    q = query_for(case, group, dtype)
    scale = case.format.width**-0.5
    arguments = case.arguments(q, window, scale)
    found = [torch.ops.llmsqueeze.kv_attend(*arguments)]
    if not q.is_cuda:
        found.append(kv_attend(*arguments))  # type: ignore[arg-type]
    expected = case.expected(q, window, scale)
    assert all(y.shape == expected.shape and y.dtype == dtype for y in found)
    return max(float((y.double() - expected).norm() / expected.norm()) for y in found)


KINDS = [
    ("fp8", 8), ("rotated", 4), ("rotated", 3), ("rotated", 2), ("channels", 4), ("channels", 3),
    ("channels", 2), ("channels-turned", 4), ("channels-turned", 3),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "bits"), KINDS)
@pytest.mark.parametrize("width", [64, 96, 128, 256])
def test_it_is_attention_over_what_codecs_decode(kind: str, bits: int, width: int) -> None:
    case = make_case(kind, bits, width=width, slots=1 if "channels" in kind else 0)
    assert off(case, 3) < 2e-3


@pytest.mark.parametrize(("kind", "bits"), KINDS)
@pytest.mark.parametrize("padding", [None, (0, 19), (7, 40)])
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("window", [0, 5, 43])
def test_what_is_seen(
    kind: str, bits: int, padding: tuple[int, int] | None, sinks: int, window: int
) -> None:
    slots = 2 if "channels" in kind else 0
    for tokens in (45, 48):
        case = make_case(kind, bits, padding=padding, sinks=sinks, slots=slots, tokens=tokens)
        assert off(case, 2, window) < 2e-3


@pytest.mark.parametrize(("kind", "bits"), KINDS)
@pytest.mark.parametrize("padding", [None, (3, 70)])
@pytest.mark.parametrize("window", [1, 17, 43])
def test_a_window_needs_only_the_last_tiles(
    kind: str, bits: int, padding: tuple[int, int] | None, window: int
) -> None:
    slots = 1 if "channels" in kind else 0
    for tokens in (3, 80, 81, 96):
        if padding and tokens < 80:
            continue
        case = make_case(
            kind, bits, padding=padding, sinks=2, slots=slots, tokens=tokens,
            ring=ring_tiles(window), spare=64,
        )  # fmt: skip
        assert off(case, 2, window) < 2e-3


def peaked(case: Case, q: Tensor, size: float) -> Tensor:
    """Queries that read one token each of the first row, far more than others."""
    heads = q.shape[1]
    places = torch.arange(heads) % 4 * 7 + 5
    group = heads // case.kv_heads
    for head, place in enumerate(places):
        key = case.keys[:, head // group, place]
        q[:, head, 0] = (key / key.norm(dim=-1, keepdim=True) * size).to(q.dtype)
    return q


@pytest.mark.parametrize(("kind", "bits"), KINDS)
def test_tiles_that_weigh_too_little_may_be_left_out(kind: str, bits: int) -> None:
    case = make_case(kind, bits, tokens=400, sinks=2, slots=1 if "channels" in kind else 0)
    q = peaked(case, query_for(case, 4, torch.float32), 12.0)
    scale = case.format.width**-0.5
    expected = case.expected(q, 0, scale)
    given = case.arguments(q, 0, scale)
    largest = float(case.values.abs().max())
    for call in (torch.ops.llmsqueeze.kv_attend, kv_attend):
        whole = call(*given)  # type: ignore[operator]
        assert torch.equal(call(*given, 1e4), whole)  # type: ignore[operator]
        for skip in (3.0, 6.0, 12.0):
            found = call(*given, skip)  # type: ignore[operator]
            assert torch.equal(found, call(*given, skip))  # type: ignore[operator]
            # What is lost, and what the rest then weighs more.
            bound = 2 * largest * 400 * math.exp(-skip) + 4e-3 * largest
            assert float((found - expected).abs().max()) < bound
            # Queries that read one token leave most out.
            assert skip > 6 or not torch.equal(found, whole)


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("kind", ["rotated", "channels"])
def test_groups(kind: str, group: int) -> None:
    assert off(make_case(kind, kv_heads=3, sinks=1), group) < 2e-3


@pytest.mark.parametrize("rotary", [0, 16, 32, 64])
def test_partial_rotary_and_attention_factors(rotary: int) -> None:
    case = make_case("channels", rotary=rotary, gain=1.2 if rotary else 1.0, padding=(3, 18))
    assert off(case, 2) < 2e-3


def test_the_operator_is_well_formed() -> None:
    case = make_case("channels", sinks=2, padding=(0, 5), slots=1)
    arguments = case.arguments(query_for(case, 2, torch.bfloat16), 0, 0.1)
    torch.library.opcheck(torch.ops.llmsqueeze.kv_attend, arguments)


def test_blocks_fill_multiprocessors() -> None:
    """Of 132: once where that does, in several turns where many would have nothing to do."""
    for rows, rounds, expected in ((8, 64, 16), (64, 64, 2), (132, 64, 1), (8, 3, 3), (8, 1, 1)):
        assert kv_kernels._splits(rows, rounds, 132) == expected
    assert kv_kernels._splits(72, 64, 132) == 3
