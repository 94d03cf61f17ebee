"""Tiles of coded keys and values: what is written comes back, and lanes find what kv_attend.cu looks for."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from llmsqueeze.numerics import kv_constants, kv_tiles
from llmsqueeze.numerics.kv_codecs import ChannelCodec, Codebook, Fp8, Identity, Rotated, TokenCodec
from llmsqueeze.numerics.kv_constants import Angles
from llmsqueeze.numerics.kv_tiles import FP8, TOKENS, Fields, TileFormat, pair_order
from tests.test_kv_attend import KINDS, codecs_of

LANES = torch.arange(32)
G, T = LANES // 4, LANES % 4


def random_fields(form: TileFormat, tiles: int, seed: int = 0) -> Fields:
    generator = torch.Generator().manual_seed(seed)

    def codes(below: int, *shape: int) -> Tensor:
        return torch.randint(0, below, (tiles * TOKENS, *shape), generator=generator).to(
            torch.uint8
        )

    def halves(*shape: int) -> Tensor:
        return torch.rand(tiles * TOKENS, *shape, generator=generator).half() + 0.5

    def outliers(count: int) -> tuple[Tensor, Tensor]:
        order = torch.rand(tiles * TOKENS, form.width, generator=generator).argsort(-1)
        return halves(count), order[:, :count].to(torch.uint8)

    below = 120 if form.bits == FP8 else 2**form.bits  # of e4m3 numbers
    return Fields(
        codes(below, form.width), codes(below, form.width), halves(form.parameters),
        *outliers(form.key_slots), *outliers(form.value_slots),
    )  # fmt: skip


FORMATS = [
    TileFormat(width, bits, bits == FP8, bits == 4, slots, 2 * slots, rotary=rotary)
    for width, bits, (slots, rotary) in itertools.product(
        kv_tiles.WIDTHS, (2, 3, 4, FP8), ((0, 64), (1, 0), (2, 32))
    )
    if not (bits == FP8 and slots)
]


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f.width}-{f.bits}-{f.key_slots}")
def test_fields_come_back(form: TileFormat) -> None:
    fields = random_fields(form, 3)
    tiles = kv_tiles.write_fields(fields, form)
    assert tiles.shape == (3, form.record) and form.record % 16 == 0
    found = kv_tiles.read_fields(tiles, form)
    for one, two in zip(fields.all(), found.all(), strict=True):
        assert one.dtype == two.dtype and torch.equal(one, two)


@pytest.mark.parametrize(("kind", "bits"), KINDS)
@pytest.mark.parametrize("slots", [0, 2])
def test_parts_come_back_however_they_were_appended(kind: str, bits: int, slots: int) -> None:
    generator = torch.Generator().manual_seed(1)
    keys, values = codecs_of(kind, bits, 3, 96, slots, generator)
    x = torch.randn(2, 2, 3, 70, 96, generator=generator)
    parts = keys.encode(x[0]), values.encode(x[1])
    form = TileFormat.of(keys, values, 96, 96)
    assert form is not None and TileFormat.from_arguments(form.arguments()) == form
    whole, pieces = (form.empty(2, 3, 70, torch.device("cpu")) for _ in range(2))
    kv_tiles.write(whole, form, 0, *parts)
    start = 0
    for count in (1, 14, 1, 1, 0, 30, 16, 7):
        some = [[p[:, :, start : start + count] for p in side] for side in parts]
        # Where to is on the device, for a graph.
        kv_tiles.write(pieces, form, torch.tensor([start]), tuple(some[0]), tuple(some[1]))
        start += count
    assert start == 70 and torch.equal(whole, pieces)
    for found, side in zip(kv_tiles.read(whole, form, 70), parts, strict=True):
        assert len(found) == len(side)
        for one, two in zip(found, side, strict=True):
            # Offsets and scales that heads share are stored with each.
            assert one.dtype == two.dtype and torch.equal(
                one.view(torch.uint8), two.view(torch.uint8)
            )


def test_what_has_no_format() -> None:
    book = Codebook(3, *[torch.linspace(-1, 1, 8).double()] * 2)
    keys = ChannelCodec(book, torch.zeros(1, 1, 64), torch.ones(1, 1, 64), 0, None)
    values = TokenCodec(book, 0, turned=False)
    assert TileFormat.of(keys, values, 64, 64) is not None
    four = TokenCodec(Codebook(4, *[torch.linspace(-1, 1, 16).double()] * 2), 0, turned=False)
    many = ChannelCodec(book, torch.zeros(1, 1, 64), torch.ones(1, 1, 64), 5, None)
    for pair, width, rotary in (
        ((many, values), 64, 64),
        ((keys, four), 64, 64), ((Rotated(4), Rotated(3)), 64, 0), ((Fp8(), Rotated(4)), 64, 0),
        ((Identity(), Identity()), 64, 0), ((keys, values), 64, 30), ((Fp8(), Fp8()), 80, 0),
    ):  # fmt: skip
        assert TileFormat.of(*pair, width, rotary) is None


# What lanes do, as kv_attend.cu says it.


def lane_words(record: Tensor, form: TileFormat) -> Tensor:
    """[words, 32, 4 bytes]: load_words."""
    run = next(n for n in (4, 2, 1) if form.words % n == 0)
    found = torch.zeros(form.words, 32, 4, dtype=torch.uint8)
    for i, lane, j in itertools.product(range(form.words // run), range(32), range(run)):
        at = ((i * 32 + lane) * run + j) * 4
        found[i * run + j, lane] = record[at : at + 4]
    return found


def lane_fragment(words: Tensor, form: TileFormat, index: int) -> Tensor:
    """[32, 4 pairs, 2] codes: Decoder::fragment."""
    if form.bits == FP8:
        return torch.stack([words[2 * index], words[2 * index + 1]], dim=1).view(32, 4, 2)
    if form.bits == 4:
        word = words[index]
    elif form.bits == 2:
        word = words[index // 2] >> (index % 2) * 4
    else:
        three = words[index // 4 * 3 : index // 4 * 3 + 3]
        if index % 4 < 3:
            word = three[index % 4]
        else:
            word = (three[0] >> 6 & 0x03) | (three[1] >> 4 & 0x0C) | (three[2] >> 2 & 0x30)
    mask = 2**form.bits - 1
    return torch.stack([word & mask, word >> form.bits & mask], dim=-1)


def matrix_of(fragment: Tensor) -> Tensor:
    """16 × 16 that mma.m16n8k16 takes from the lanes' pairs [32, 4, 2], as PTX defines it."""
    found = fragment.new_zeros(16, 16)
    for lane, i, e in itertools.product(range(32), range(4), range(2)):
        found[lane // 4 + 8 * (i % 2), lane % 4 * 2 + e + 8 * (i // 2)] = fragment[lane, i, e]
    return found


def pair_of(form: TileFormat, channel: int) -> tuple[int, bool]:
    """A channel's pair, and whether it is the second of it: outliers_scores."""
    inside = channel < form.rotary
    half = form.rotary // 2 if inside else (form.width - form.rotary) // 2
    from_ = channel if inside else channel - form.rotary
    second = from_ >= half
    return from_ - (half if second else 0) + (0 if inside else form.rotary // 2), second


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f.width}-{f.bits}-{f.key_slots}")
def test_lanes_find_fragments(form: TileFormat) -> None:
    fields = random_fields(form, 1)
    record = kv_tiles.write_fields(fields, form)[0]
    words, count = lane_words(record, form), form.width // 16
    order = pair_order(form)
    turned = form.rotary // 2
    for pair in range(form.width // 2):  # first_of and second_of
        assert order[pair] == (pair if pair < turned else pair + turned)
        assert order[form.width // 2 + pair] == pair + (
            turned if pair < turned else form.width // 2
        )
    for f in range(count):
        own = torch.arange(8 * f, 8 * f + 8)
        channels = torch.cat([order[own], order[form.width // 2 + own]])
        keys = matrix_of(lane_fragment(words, form, f))
        assert torch.equal(keys, fields.keys[:, channels])
        values = matrix_of(lane_fragment(words, form, count + f))
        assert torch.equal(values, fields.values[:, 16 * f : 16 * f + 16].t())
    for channel in range(form.width):
        pair, second = pair_of(form, channel)
        assert order[pair + second * form.width // 2] == channel


@pytest.mark.parametrize("slots", [1, 2])
def test_outliers_of_values_are_products_of_two_matrices(slots: int) -> None:
    """Struct Outliers: rows of channels modulo 16, times numerators of a fragment's channels alone."""
    form = TileFormat(96, 4, False, True, 0, slots)
    fields = random_fields(form, 1)
    numerators = torch.randn(TOKENS, 8)
    found = torch.zeros(form.width, 8)
    for slot in range(slots):
        channels, missing = fields.value_channels[:, slot].int(), fields.value_missing[:, slot]
        rows = torch.where(channels % 16 == torch.arange(16)[:, None], missing.float(), 0)
        for f in range(form.width // 16):
            own = numerators * (channels // 16 == f)[:, None]
            found[16 * f : 16 * f + 16] += rows @ own
    dense = torch.zeros(TOKENS, form.width).scatter_(
        1, fields.value_channels.long(), fields.value_missing.float()
    )
    assert torch.allclose(found, dense.mT @ numerators, atol=1e-5)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_outliers_of_two_fragments_are_one_product(group: int) -> None:
    """PAIRED: columns of the second half have the next fragment's."""
    form = TileFormat(96, 4, False, True, 0, 2)
    fields = random_fields(form, 1)
    heads = torch.arange(8) % group
    numerators = torch.randn(TOKENS, group)
    found = torch.zeros(form.width, 8)
    for slot in range(2):
        channels, missing = fields.value_channels[:, slot].int(), fields.value_missing[:, slot]
        rows = torch.where(channels % 16 == torch.arange(16)[:, None], missing.float(), 0)
        for f in range(0, form.width // 16, 2):
            own = numerators[:, heads] * ((channels // 16)[:, None] ^ torch.arange(8) // 4 == f)
            product = rows @ own
            found[16 * f : 16 * f + 16] += product
            # What lanes of columns 4 further have.
            found[16 * f + 16 : 16 * f + 32] += product.roll(-4, dims=1)
    dense = torch.zeros(TOKENS, form.width).scatter_(
        1, fields.value_channels.long(), fields.value_missing.float()
    )
    assert torch.allclose(found[:, :group], dense.mT @ numerators, atol=1e-5)


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f.width}-{f.bits}-{f.key_slots}")
def test_lanes_find_what_stands_behind_codes(form: TileFormat) -> None:
    fields = random_fields(form, 1)
    record = kv_tiles.write_fields(fields, form)[0]
    at = 128 * form.words
    own = record[at : at + 32 * form.parameters].view(torch.float16).view(8, 2 * form.parameters)
    for g in range(8):
        both = torch.cat([fields.parameters[g], fields.parameters[g + 8]])
        assert torch.equal(own[g], both)
    at += 32 * form.parameters
    for missing, channels in (
        (fields.key_missing, fields.key_channels), (fields.value_missing, fields.value_channels),
    ):  # fmt: skip
        slots = missing.shape[1]
        assert torch.equal(record[at : at + 32 * slots].view(torch.float16), missing.flatten())
        assert torch.equal(record[at + 32 * slots : at + 48 * slots], channels.flatten())
        at += 48 * slots
    assert at == form.record


@pytest.mark.parametrize(("width", "rotary"), [(64, 64), (96, 96), (128, 32), (256, 256)])
def test_lanes_rotate_keys_and_queries(width: int, rotary: int) -> None:
    """Constants of channels and steps, as the loop over tiles uses them, against the rotation itself."""
    generator = torch.Generator().manual_seed(2)
    keys, values = codecs_of("channels", 4, 2, width, 0, generator)
    assert isinstance(keys, ChannelCodec)
    form = TileFormat.of(keys, values, width, rotary)
    assert form is not None
    turns = torch.arange(160).double()[:, None] * 100 ** -torch.linspace(0, 1, rotary // 2).double()
    cos, sin = (torch.cat([f, f], -1) * 1.25 for f in (turns.cos(), turns.sin()))
    angles = Angles.of(cos, sin, form)
    constants = kv_constants.channel_constants(keys, angles, form).double()
    order = pair_order(form)
    x = torch.randn(TOKENS, width, generator=generator).double()  # what codes stand for
    q = torch.randn(width, generator=generator).double()
    tile, head = 7, 1
    scores = torch.zeros(16)
    steps = angles.steps[tile].double().view(width // 32, 4, 2, 2, 2)
    for f in range(width // 16):
        c = constants[head, f].transpose(0, 1).reshape(32, 12, 2)  # of a lane, in its order
        a, b = torch.zeros(32, 4, 2).double(), torch.zeros(16).double()
        for lane in range(32):
            pair = 8 * f + 2 * T[lane] + torch.arange(2)
            one, two = order[pair], order[width // 2 + pair]
            for r in range(2):
                token, own = G[lane] + 8 * r, c[lane, 6 * r : 6 * r + 6]
                a[lane, r] = own[0] * x[token, one] + own[1] * x[token, two] + own[2]
                a[lane, 2 + r] = own[3] * x[token, one] + own[4] * x[token, two] + own[5]
            co, si = steps[f // 2, T[lane], f % 2]
            b[2 * T[lane] : 2 * T[lane] + 2] = co * q[one] + si * q[two]
            b[2 * T[lane] + 8 : 2 * T[lane] + 10] = co * q[two] - si * q[one]
        scores += (matrix_of(a) @ b).float()
    # Outliers: steps and constants by their bytes, as outliers_scores and its table of factors find them.
    outliers = torch.randint(0, width, (TOKENS,), generator=generator)
    missing = torch.randn(TOKENS, generator=generator).double()
    halves, flat = angles.steps[tile].double(), constants[head].flatten()
    for token in range(TOKENS):
        channel = int(outliers[token])
        pair, second = pair_of(form, channel)
        of_fragment = (pair >> 3) * 96 * 8 + second * 256 + (pair >> 1 & 3) * 8 + (pair & 1)
        factor = flat[of_fragment] / keys.scale[head, 0, channel].double()
        word = ((pair >> 4) * 64 + (pair >> 1 & 3) * 16 + (pair & 8)) // 2
        far_cos, far_sin = halves[word + (pair & 1)], halves[word + 2 + (pair & 1)]
        near_cos, near_sin = angles.table[token, pair].double()
        co = (far_cos * near_cos - far_sin * near_sin) * missing[token] * factor
        si = (far_sin * near_cos + far_cos * near_sin) * missing[token] * factor
        one, two = q[order[pair]], q[order[width // 2 + pair]]
        scores[token] += float(-si * one + co * two if second else co * one + si * two)
    whole = x * keys.scale[head].double() + keys.offset[head].double()
    whole[torch.arange(TOKENS), outliers] += missing
    at = slice(16 * tile, 16 * tile + 16)
    half = rotary // 2
    first, second = whole[:, :half], whole[:, half:rotary]
    c1, s1 = cos[at, :half], sin[at, :half]
    turned = torch.cat([c1 * first - s1 * second, s1 * first + c1 * second, whole[:, rotary:]], -1)
    expected = turned @ q
    assert float((scores.double() - expected).norm() / expected.norm()) < 2e-3


def test_constants_come_back() -> None:
    keys, values = codecs_of("channels", 4, 3, 96, 0, torch.Generator().manual_seed(3))
    assert isinstance(keys, ChannelCodec)
    form = TileFormat.of(keys, values, 96, 96)
    assert form is not None
    turns = torch.arange(40)[:, None] * torch.linspace(0.1, 1, 48)
    angles = Angles.of(torch.cat([turns.cos()] * 2, -1), torch.cat([turns.sin()] * 2, -1), form)
    constants = kv_constants.channel_constants(keys, angles, form)
    found = kv_constants.read_channel_constants(constants).double()
    cos, sin = angles.table[:TOKENS].double().unbind(-1)
    s, z = keys.scale[:, 0].double(), keys.offset[:, 0].double()
    expected = (
        cos * s[:, None, :48],
        -sin * s[:, None, 48:],
        sin * z[:, None, :48] + cos * z[:, None, 48:],
    )
    for which, part in zip((0, 1, 5), expected, strict=True):
        assert torch.allclose(found[..., which], part, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="angles of 3 positions"):
        Angles.of(turns.cos()[:3], turns.sin()[:3], form)
