"""Appending tokens: the operator against the codecs that wrote all of them at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmsqueeze.numerics import kv_tiles
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
from llmsqueeze.numerics.rope import unrotate
from llmsqueeze.ops import kv_append
from llmsqueeze.ops.packed_append import coding_angles, encoding_books, feedback_constants

HEADS, COUNT = 3, 37


def cos_sin(positions: Tensor, rotary: int) -> tuple[Tensor, Tensor]:
    frequencies = 10_000 ** -(torch.arange(0, rotary, 2).double() / rotary)
    angles = positions.double()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().float(), angles.sin().float()


def codecs(
    kind: str, bits: int, width: int, slots: int = 0, feedback: bool = True
) -> tuple[Codec, Codec]:
    """Keys' and values'. kind: fp8, rotate, kvquant, plain (values not turned)."""
    if kind == "fp8":
        return Fp8(), Fp8()
    if kind == "rotate":
        return Rotated(bits), Rotated(bits)
    generator = torch.Generator().manual_seed(bits)
    levels = torch.linspace(-1, 1, 2**bits).double()
    wide = normal_book(bits, torch.device("cpu")).encode.float().double()
    offset = torch.randn(HEADS, 1, width, generator=generator)
    scale = torch.rand(HEADS, 1, width, generator=generator) + 0.5
    found = None
    if feedback:
        mixed = torch.randn(HEADS, width, width, generator=generator).double()
        found = Feedback.of(*factorise(mixed @ mixed.mT / width, 4))
    keys = ChannelCodec(Codebook(bits, wide, wide * 1.05), offset, scale, slots, found)
    turned = kind == "kvquant"
    return keys, TokenCodec(Codebook(bits, levels, levels), 0 if turned else slots, turned)


def constants(
    keys: Codec, values: Codec, format: TileFormat, capacity: int, device: str = "cpu"
) -> dict[str, Any]:
    """Arguments of the operator beyond the token and the tiles."""
    found: dict[str, Any] = dict.fromkeys(("offset", "scale", "order", "steps", "angles"))
    found["books"] = encoding_books(keys, values)
    if isinstance(keys, ChannelCodec):
        found["offset"], found["scale"] = keys.offset[:, 0], keys.scale[:, 0]
        if keys.feedback:
            found["order"], found["steps"] = feedback_constants(keys.feedback)
        table = cos_sin(torch.arange(16 * capacity), format.rotary or 2)
        found["angles"] = coding_angles(Angles.of(*table, format))
    return {n: t if t is None else t.contiguous().to(device) for n, t in found.items()}


CASES = [
    ("fp8", 8, 64, 0), ("fp8", 8, 96, 0), ("rotate", 4, 128, 0), ("rotate", 3, 96, 0), ("rotate", 2, 256, 0),
    ("kvquant", 4, 128, 0), ("kvquant", 3, 64, 1), ("kvquant", 2, 96, 2), ("plain", 4, 64, 1),
    ("plain", 3, 128, 3), ("kvquant", 3, 256, 2), ("plain", 2, 64, 0),
]  # fmt: skip


def one_by_one(
    key: Tensor, value: Tensor, tiles: Tensor, format: TileFormat, known: dict[str, Any],
    padding: Tensor | None = None, sinks: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
    append: Callable[..., None] = torch.ops.llmsqueeze.kv_append, window: int = 0, step: int = 1,
) -> None:  # fmt: skip
    """Or so many tokens at a time."""
    length = torch.zeros(1, dtype=torch.int32, device=key.device)
    for token in range(0, key.shape[2], step):
        some = slice(token, token + step)
        length += key[:, :, some].shape[2]
        append(
            key[:, :, some], value[:, :, some], tiles, length, padding,
            known["books"], known["offset"], known["scale"], known["order"], known["steps"],
            known["angles"], *sinks, format.arguments(), window,
        )  # fmt: skip


@pytest.mark.parametrize(("kind", "bits", "width", "slots"), CASES)
@pytest.mark.parametrize("append", [torch.ops.llmsqueeze.kv_append, kv_append])
def test_tokens_are_coded_as_all_at_once(
    kind: str, bits: int, width: int, slots: int, append: Callable[..., None]
) -> None:
    keys, values = codecs(kind, bits, width, slots)
    rotary = width // 2 if width == 128 else width
    format = TileFormat.of(keys, values, width, rotary if kind in ("kvquant", "plain") else 0)
    assert format is not None
    key, value = torch.randn(2, 2, HEADS, COUNT, width).bfloat16()
    padding = torch.tensor([0, 5], dtype=torch.int32)
    tiles = format.empty(2, HEADS, COUNT, torch.device("cpu"))
    expected, several = tiles.clone(), tiles.clone()
    known = constants(keys, values, format, tiles.shape[2])
    arriving = key.float()
    if keys.pre_rope:
        positions = (torch.arange(COUNT) - padding[:, None]).clamp_min(0)
        tables = [cos_sin(row, format.rotary) for row in positions]
        cos, sin = (torch.stack(t)[:, None] for t in zip(*tables, strict=True))
        arriving = unrotate(arriving, cos, sin)
    sinks = torch.zeros(2, 2, HEADS, 4, width).bfloat16()
    one_by_one(key, value, tiles, format, known, padding, (sinks[0], sinks[1]), append)
    again = torch.zeros_like(sinks)
    one_by_one(
        key, value, several, format, known, padding, (again[0], again[1]), append, step=14
    )  # fmt: skip
    assert torch.equal(several, tiles) and torch.equal(again, sinks)
    kv_tiles.write(expected, format, 0, keys.encode(arriving), values.encode(value))
    for x, kept in zip((key, value), sinks, strict=True):
        assert torch.equal(kept[0], x[0, :, :4]) and torch.equal(kept[1], x[1, :, 5:9])
    # In all, but where a number lies at a border: tables of angles and of feedback are rounded.
    found, wanted = (kv_tiles.read_fields(t, format).all() for t in (tiles, expected))
    for one, other in zip(found[:2], wanted[:2], strict=True):
        assert float((one != other).float().mean()) < 2e-3
    assert torch.equal(found[2], wanted[2])


@pytest.mark.parametrize(("kind", "bits", "width", "slots"), CASES[::3])
@pytest.mark.parametrize("append", [torch.ops.llmsqueeze.kv_append, kv_append])
def test_a_window_keeps_the_last_tiles(
    kind: str, bits: int, width: int, slots: int, append: Callable[..., None]
) -> None:
    keys, values = codecs(kind, bits, width, slots)
    format = TileFormat.of(keys, values, width, width if keys.pre_rope else 0)
    assert format is not None
    key, value = torch.randn(2, 1, HEADS, COUNT, width).bfloat16()
    whole = format.empty(1, HEADS, COUNT, torch.device("cpu"))
    known = constants(keys, values, format, whole.shape[2])
    one_by_one(key, value, whole, format, known, append=append)
    ring = format.empty(1, HEADS, 32, torch.device("cpu"))
    one_by_one(key, value, ring, format, known, append=append, window=16)
    several = torch.zeros_like(ring)
    one_by_one(key, value, several, format, known, append=append, window=16, step=15)
    assert torch.equal(several, ring)
    assert torch.equal(ring[:, :, 1], whole[:, :, 1])
    # Of the newest tile, which lies where the first was, what is new.
    found, wanted = (
        kv_tiles.read_fields(t, format).all() for t in (ring[:, :, :1], whole[:, :, 2:])
    )
    for one, two in zip(found, wanted, strict=True):
        assert torch.equal(one[..., : COUNT - 32, :], two[..., : COUNT - 32, :])
    with pytest.raises((ValueError, IndexError, RuntimeError)):  # without a window they do not fit
        one_by_one(key, value, ring, format, known, append=append)
