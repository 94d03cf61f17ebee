"""Coding keys by channel and values by token: bounds, outliers, exactness."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmsqueeze.methods.kvquant import Config, fit_keys, fit_values, slots
from llmsqueeze.numerics.codebook import (
    look_up,
    lookup_table,
    pack_codes,
    unpack_codes,
)
from llmsqueeze.numerics.feedback import Feedback
from llmsqueeze.numerics.hadamard import hadamard
from llmsqueeze.numerics.kv_codecs import ChannelCodec, Codebook, TokenCodec

PLAIN = Config(plain=True)


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def keys_codec(
    keys: Tensor, bits: int, count: int = 0, config: Config = PLAIN, senses: Tensor | None = None
) -> ChannelCodec:
    """Fitted on [heads, tokens, width], every key read by `senses`."""
    at = torch.arange(keys.shape[1]).expand(len(keys), -1)
    senses = torch.ones_like(keys) if senses is None else senses
    fitted = fit_keys(keys, at, senses, bits, count, config)
    feedback = None
    if not config.plain:
        feedback = Feedback.of(fitted["key_diagonal"], fitted["key_factors"])
    book = Codebook(bits, fitted["key_encode"].double(), fitted["key_decode"].double())
    return ChannelCodec(
        book,
        fitted["key_offset"].float()[:, None],
        fitted["key_scale"].float()[:, None],
        count,
        feedback,
    )


def values_codec(values: Tensor, bits: int, count: int = 0, *, turned: bool = False) -> TokenCodec:
    none = torch.zeros(2**bits, dtype=torch.float64)
    empty = TokenCodec(Codebook(bits, none, none), count, turned)
    fitted = fit_values(values[None], empty)
    book = Codebook(bits, fitted["value_encode"].double(), fitted["value_decode"].double())
    return TokenCodec(book, count, turned)


def read_back(codec: ChannelCodec | TokenCodec, x: Tensor) -> Tensor:
    return codec.decode(codec.encode(x[None]), x.shape[-1], torch.float32)[0]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("count", [8, 13, 64])
def test_looking_up_is_unpacking_and_indexing(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, count), generator=torch.Generator().manual_seed(bits))
    packed = pack_codes(codes.to(torch.uint8), bits)
    assert packed.shape[-1] == -(-count // 8) * bits
    assert torch.equal(unpack_codes(packed, bits, count).long(), codes)
    book = vectors(2**bits)
    assert torch.equal(look_up(packed, lookup_table(book, bits), bits, count), book[codes])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_one_set_of_values_for_all_channels_comes_back_exactly(bits: int) -> None:
    book = torch.cat([torch.tensor([-1.0, 1.0]), vectors(2**bits - 2).tanh() * 0.9])
    picked = torch.randint(0, 2**bits, (2, 400, 12), generator=torch.Generator().manual_seed(0))
    # Offsets and scales that fp16 holds.
    scale = torch.randint(1, 9, (2, 1, 12)) / 4
    keys = book[picked] * scale + torch.randint(-8, 9, (2, 1, 12)) / 4
    found = read_back(keys_codec(keys, bits), keys)
    assert torch.allclose(found, keys, atol=4e-3)


def test_entries_in_range_are_off_by_half_a_gap_at_most() -> None:
    keys = vectors(2, 500, 16) * torch.logspace(-1, 1, 16) + vectors(2, 1, 16) * 3
    codec = keys_codec(keys, 3)
    book, scale = codec.book.encode, codec.scale
    unit = (keys - codec.offset) / scale
    assert float(unit.abs().max()) <= 1  # no outliers, no clipping
    gap = max(float(book.diff().max()) / 2, 1 - float(book[-1]), 1 + float(book[0]))
    assert bool(((read_back(codec, keys) - keys).abs() <= scale * (gap + 1e-3)).all())


@pytest.mark.parametrize("config", [PLAIN, Config()], ids=["plain", "feedback"])
@pytest.mark.parametrize("count", [1, 3])
def test_as_many_outliers_as_slots_are_exact(config: Config, count: int) -> None:
    keys = vectors(2, 300, 16)
    keys[:, ::7, 5] += 40
    keys[1, 10] = 2.5  # all the same: no more slots than there are
    codec = keys_codec(keys, 2, count, config)
    _, channels, missing = codec.encode(keys[None])
    assert channels.shape == missing.shape == (1, 2, 300, count)
    assert bool((channels[0].sort(dim=-1).values.diff(dim=-1) > 0).all())
    found = read_back(codec, keys)
    at = channels[0].long()
    error = (found - keys).abs().gather(-1, at)
    assert bool((error <= keys.abs().gather(-1, at) * 2**-10 + missing[0].abs() * 2**-10).all())
    # They are where rounding to the nearest would have been worst.
    unit = ((keys - codec.offset) / codec.scale).double()
    lost = (codec.book.values(codec.book.nearest(unit)) - unit).abs() * codec.scale
    assert torch.allclose(
        lost.gather(-1, at).sort(dim=-1).values, lost.topk(count, dim=-1).values.flip(-1)
    )

    values = keys.clone()
    codec_v = values_codec(values, 2, count)
    channels = codec_v.encode(values[None])[3]
    error = (read_back(codec_v, values) - values).abs().gather(-1, channels[0].long())
    assert channels.shape == (1, 2, 300, count) and float(error.max()) < 0.05
    # What is left lies in the token's range.
    x, offset, scale, outliers = codec_v.normalise(values[None])
    unit = ((x - offset.double()) / scale.double()).scatter(-1, outliers, 0.0)
    assert float(unit.abs().max()) <= 1


def test_constant_channels_and_tokens_are_their_offset() -> None:
    keys = torch.full((2, 50, 8), 3.25)
    assert torch.allclose(read_back(keys_codec(keys, 3), keys), keys, atol=1e-3)
    for turned in (False, True):
        codec = values_codec(keys, 3, turned=turned)
        assert torch.allclose(read_back(codec, keys), keys, rtol=5e-3)
        zeros = torch.zeros_like(keys)
        assert torch.allclose(read_back(codec, zeros), zeros, atol=1e-3)


def test_turned_values_decode_by_the_definition() -> None:
    values = vectors(2, 40, 24)
    codec = values_codec(values, 4, turned=True)
    codes, scale = codec.encode(values[None])
    turned = codec.book.values(unpack_codes(codes, 4, 24)) * scale.double()
    expected = hadamard(turned)[0]
    assert torch.allclose(read_back(codec, values).double(), expected, atol=1e-5)
    kept = codec.decode((codes, scale), 24, torch.float32, turn_back=False)[0]
    assert torch.allclose(kept.double(), turned[0], atol=1e-5)
    # The range is centred at zero, holds every entry, and is no larger than that.
    largest = hadamard(values.double()).abs().amax((0, 2))
    assert torch.allclose(scale.double().flatten(), largest, rtol=3e-3)
    assert bool((scale.double().flatten() >= largest).all())


def test_values_share_one_range_in_all_heads() -> None:
    values = vectors(3, 20, 16)
    codec = values_codec(values, 4)
    _, offset, scale = codec.encode(values[None])
    assert offset.shape == scale.shape == (1, 1, 20, 1)
    high, low = values.amax((0, 2)), values.amin((0, 2))
    assert torch.allclose(offset[0, 0, :, 0].float(), (high + low) / 2, atol=2e-3)
    assert torch.allclose(scale[0, 0, :, 0].float(), (high - low) / 2, rtol=2e-3)


def moments(x: Tensor, weights: Tensor) -> tuple[float, float]:
    """Weighted mean and spread."""
    mean = (x * weights).sum() / weights.sum()
    return float(mean), float((weights * (x - mean).square()).sum() / weights.sum()) ** 0.5


def test_codes_of_two_bits_have_mean_and_spread_of_what_they_stand_for() -> None:
    x = vectors(2, 3000, 8).exp()
    keys = keys_codec(x, 2)
    unit = (x - keys.offset) / keys.scale
    found = (read_back(keys, x) - keys.offset) / keys.scale
    felt = keys.scale.square().expand_as(unit)
    assert moments(found, felt) == pytest.approx(moments(unit, felt), abs=1e-3)
    assert not torch.equal(keys.book.encode, keys.book.decode)
    values = values_codec(x, 2)
    parts = values.encode(x[None])
    unit = (x - parts[1][0].float()) / parts[2][0].float()
    coded = values.book.values(values.book.nearest(unit.double()))
    felt = parts[2][0].float().square().expand_as(unit)
    assert moments(coded, felt) == pytest.approx(moments(unit, felt), abs=1e-3)
    for codec in (keys_codec(x, 3), values_codec(x, 3)):  # more bits need no help
        assert torch.equal(codec.book.encode, codec.book.decode)


def test_error_falls_with_bits_and_with_slots() -> None:
    keys = vectors(2, 800, 32) * vectors(2, 1, 32).exp()
    keys[:, ::5, 3] *= 12
    errors = {
        (bits, count): float((read_back(keys_codec(keys, bits, count), keys) - keys).square().sum())
        for bits in (2, 3, 4)
        for count in (0, 1, 2)
    }
    for bits in (2, 3, 4):
        assert errors[bits, 0] > errors[bits, 1] > errors[bits, 2]
        if bits > 2:
            assert errors[bits, 1] < errors[bits - 1, 1]


def test_what_is_never_read_may_be_wrong() -> None:
    """The codebook fits what the senses feel."""
    keys = torch.cat([vectors(1, 600, 4) * 0.02, vectors(1, 600, 4)], dim=1)
    keys = torch.cat([keys, torch.full((1, 1, 4), 4.0), torch.full((1, 1, 4), -4.0)], dim=1)
    senses = torch.ones_like(keys)
    senses[:, 600:] = 1e-4
    weighted, even = keys_codec(keys, 2, senses=senses), keys_codec(keys, 2)
    small = [float((read_back(c, keys) - keys)[:, :600].square().sum()) for c in (weighted, even)]
    assert small[0] < 0.2 * small[1]


@pytest.mark.parametrize(("share", "width", "expected"), [(0, 64, 0), (0.01, 64, 1), (0.01, 128, 1),
                                                          (0.02, 128, 3), (0.001, 64, 1)])  # fmt: skip
def test_slots(share: float, width: int, expected: int) -> None:
    assert slots(share, width) == expected


@pytest.mark.parametrize("count", [1, 2, 5])
def test_of_outliers_that_are_as_large_the_first_are_kept(count: int) -> None:
    """The least and the greatest always are; on every device the same ones are to be."""
    levels = torch.linspace(-1, 1, 16).double()
    codec = TokenCodec(Codebook(4, levels, levels), count, turned=False)
    values = torch.randint(-3, 4, (2, 2, 50, 64)).double()
    middle = (values.amax(-1, keepdim=True) + values.amin(-1, keepdim=True)) / 2
    far = (values - middle).abs()
    *_, channels = codec.normalise(values)
    assert channels is not None
    for row, found in zip(
        far.flatten(0, -2).tolist(), channels.flatten(0, -2).tolist(), strict=True
    ):
        assert found == sorted(range(64), key=lambda c: (-row[c], c))[:count]
