"""Kernels for a cache in tiles on a CPU: attention against fp64 loops, coding against the reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from llmsqueeze import ops
from llmsqueeze.numerics.kv_constants import read_channel_constants
from llmsqueeze.numerics.kv_tiles import FP8, TOKENS, TileFormat, pair_order, read_fields
from llmsqueeze.ops import cpu
from tests.test_kv_append import CASES, COUNT, HEADS, codecs, constants, one_by_one
from tests.test_kv_attend import KINDS, Case, make_case, query_for

if cpu.library() is None:
    pytest.skip("built with the package where there is a C++ compiler", allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = range(cpu.INSTRUCTIONS.index(cpu.instructions() or "portable") + 1)


def dequantised(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[batch, kv heads, tokens, D] each, computed in `dtype` from what the operator is given."""
    form, length = case.format, int(case.length)
    fields = [f[..., :length, :] for f in read_fields(case.tiles, form).all()]
    key_codes, value_codes, parameters, *outliers = fields
    books, channels, inverse, angles, _ = case.constants
    if form.bits == FP8:
        found = [
            c.contiguous().view(torch.float8_e4m3fn).to(dtype) for c in (key_codes, value_codes)
        ]
    else:
        assert books is not None
        found = [
            b[:, 0].to(dtype)[c.long()]
            for b, c in zip(books, (key_codes, value_codes), strict=True)
        ]
    (keys, values), columns = found, parameters.to(dtype).split(1, dim=-1)
    values = values * columns[form.key_scale] + (columns[-1] if form.value_offset else 0)
    if form.value_slots:
        values.scatter_add_(-1, outliers[3].long(), outliers[2].to(dtype))
    if form.key_scale:
        return keys * columns[0], values
    assert channels is not None and angles is not None
    order, half = pair_order(form), form.width // 2
    if form.key_slots:
        assert inverse is not None
        where = outliers[1].long()
        unit = inverse.to(dtype)[None, :, None].expand(*where.shape[:-1], -1).gather(-1, where)
        keys.scatter_add_(-1, where, outliers[0].to(dtype) * unit)
    # Nothing turns token 0 of a tile: its constants are the scale and the offset.
    s1, _, z1, _, s2, z2 = read_channel_constants(channels)[:, 0].to(dtype)[:, None].unbind(-1)
    x, y = keys[..., order[:half]] * s1 + z1, keys[..., order[half:]] * s2 + z2
    start = torch.zeros(len(keys)).int() if case.padding is None else case.padding
    at = (torch.arange(length) - start[:, None]).clamp_min(0)
    (c1, s1), (c2, s2) = (
        angles[rows].to(dtype)[:, None].unbind(-1) for rows in (TOKENS + at // TOKENS, at % TOKENS)
    )
    cos, sin = c1 * c2 - s1 * s2, s1 * c2 + c1 * s2
    turned = torch.cat([cos * x - sin * y, sin * x + cos * y], dim=-1)
    return turned[..., order.argsort()], values


def attention(
    case: Case, q: Tensor, window: int, scale: float, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """[batch, 1, heads, D], head by head; and the largest score."""
    from llmsqueeze.numerics.hadamard import hadamard

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    keys, values = dequantised(case, wide)
    form, length, group = case.format, int(case.length), q.shape[1] // case.kv_heads
    keys = hadamard(keys) if form.turned_keys else keys
    values = hadamard(values) if form.turned_values else values
    y, largest = torch.empty(len(q), 1, q.shape[1], form.width, dtype=dtype), 0.0
    for row in range(len(q)):
        start = 0 if case.padding is None else int(case.padding[row])
        for kept, x in zip(case.sinks, (keys, values), strict=True):
            if kept is not None:
                count = max(0, min(kept.shape[2], length - start))
                x[row, :, start : start + count] = kept[row, :, :count].to(wide)
        oldest = max(start, length - window if window else 0)
        for head in range(q.shape[1]):
            k, v = (x[row, head // group, oldest:].to(dtype) for x in (keys, values))
            scores = q[row, head].to(dtype) @ k.mT * scale
            largest = max(largest, float(scores.abs().max()))
            y[row, 0, head] = scores.softmax(-1) @ v
    return y, largest


def check(case: Case, group: int, dtype: torch.dtype = torch.float32, window: int = 0) -> None:
    """Not worse than twice what torch makes of it in the same precision, last places of a result and, in
    fp32, of the largest score aside."""
    q = query_for(case, group, dtype)
    sinks = tuple(None if s is None else s.to(dtype) for s in case.sinks)
    case = dataclasses.replace(case, sinks=sinks)  # type: ignore[arg-type]
    scale = case.format.width**-0.5
    expected, largest = attention(case, q, window, scale, torch.float64)
    plain = float((attention(case, q, window, scale, dtype)[0] - expected).abs().max())
    place = torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * largest
    place *= float(expected.abs().max())
    strided = torch.stack([case.tiles, case.tiles], dim=-1)[..., 0]
    for isa in ISAS:
        y = cpu.kv_attend(*case.arguments(q, window, scale), isa=isa)  # type: ignore[arg-type]
        apart = dataclasses.replace(case, tiles=strided).arguments(q, window, scale)
        assert torch.equal(cpu.kv_attend(*apart, isa=isa), y)  # type: ignore[arg-type]
        assert y.dtype == dtype and y.shape == expected.shape
        assert float((y.double() - expected).abs().max()) <= 2 * plain + place


@pytest.mark.parametrize(("kind", "bits"), KINDS)
@pytest.mark.parametrize("width", [64, 96, 128, 256])
def test_it_is_attention_over_what_tiles_hold(kind: str, bits: int, width: int) -> None:
    slots = 1 if "channels" in kind else 0
    for tokens in (1, 45, 600):  # a tile that is not full, and more than a piece of work
        case = make_case(kind, bits, width=width, slots=slots, tokens=tokens)
        for dtype in DTYPES:
            check(case, 3, dtype)


@pytest.mark.parametrize(("kind", "bits"), KINDS)
@pytest.mark.parametrize("padding", [None, (0, 19), (7, 44), (0, 290)])
def test_what_is_seen(kind: str, bits: int, padding: tuple[int, int] | None) -> None:
    slots = 4 if "channels" in kind else 0
    tokens = 300 if padding and max(padding) > 45 else 45
    for sinks in (0, 3):
        case = make_case(kind, bits, padding=padding, sinks=sinks, slots=slots, tokens=tokens)
        for window in (0, 1, 43):
            check(case, 2, window=window)


@pytest.mark.parametrize("group", range(1, 10))
@pytest.mark.parametrize("kind", ["rotated", "channels"])
def test_groups(kind: str, group: int) -> None:
    check(make_case(kind, kv_heads=3, sinks=1, tokens=100), group)


@pytest.mark.parametrize("rotary", [0, 16, 32, 64])
def test_partial_rotary_and_attention_factors(rotary: int) -> None:
    gain = 1.2 if rotary else 1.0
    check(make_case("channels", rotary=rotary, gain=gain, padding=(3, 18), slots=2), 2)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads: int) -> None:
    before = torch.get_num_threads()
    for kind in ("fp8", "rotated", "channels"):
        case = make_case(kind, 8 if kind == "fp8" else 4, tokens=700, sinks=2)
        given: Any = case.arguments(query_for(case, 3, torch.bfloat16), 0, 0.1)
        for isa in ISAS:
            expected = cpu.kv_attend(*given, isa=isa)
            torch.set_num_threads(threads)
            found = cpu.kv_attend(*given, isa=isa)
            torch.set_num_threads(before)
            assert torch.equal(found, expected)


def test_rows_do_not_depend_on_one_another() -> None:
    case = make_case("channels", tokens=304, padding=(0, 303), slots=1, spare=0)
    q = query_for(case, 2, torch.float32)
    for isa in ISAS:
        both = cpu.kv_attend(*case.arguments(q, 0, 0.1), isa=isa)  # type: ignore[arg-type]
        for row in (0, 1):
            given: Any = list(case.arguments(q[row : row + 1], 0, 0.1))
            given[1], given[3] = case.tiles[row : row + 1], case.padding[row : row + 1]  # type: ignore[index]
            assert torch.equal(cpu.kv_attend(*given, isa=isa), both[row : row + 1])
        # A row that sees nothing is no number, as in torch; the other one is what it was. Where tiles are
        # full, angles of what would come next are not there.
        given = list(case.arguments(q, 0, 0.1))
        given[3] = torch.tensor([0, 304], dtype=torch.int32)
        y = cpu.kv_attend(*given, isa=isa)
        assert torch.equal(y[0], both[0]) and bool(y[1].isnan().all())


@pytest.mark.parametrize(("kind", "bits"), KINDS)
def test_what_is_no_number_shows(kind: str, bits: int) -> None:
    """But not where no token is seen: what tiles hold behind the last one may be anything."""
    case = make_case(kind, bits, tokens=40, spare=0)
    q = query_for(case, 2, torch.float32)
    given: Any = list(case.arguments(q, 0, 0.1))
    at = 128 * case.format.words
    for isa in ISAS:
        given[1] = case.tiles
        expected = cpu.kv_attend(*given, isa=isa)
        given[1] = case.tiles.clone()
        fields = read_fields(given[1], case.format)
        halves = (
            given[1][..., 2, at : at + 32 * case.format.parameters].contiguous().view(torch.float16)
        )
        split = halves.unflatten(-1, (8, 2, case.format.parameters)).clone()
        split[..., 1, :] = torch.nan  # tokens 40 to 47
        given[1][..., 2, at : at + 32 * case.format.parameters] = split.flatten(-3).view(
            torch.uint8
        )
        assert not torch.equal(fields.parameters, read_fields(given[1], case.format).parameters)
        assert torch.equal(cpu.kv_attend(*given, isa=isa), expected)
        bad = q.clone()
        bad[0, 1, 0, 5] = torch.nan
        y = cpu.kv_attend(bad, *given[1:], isa=isa)
        assert bool(y[0, 0, 1].isnan().all()) and torch.equal(y[1], expected[1])


def test_what_does_not_fit_is_refused() -> None:
    case = make_case("channels", spare=0)
    given: Any = list(case.arguments(query_for(case, 2, torch.float32), 0, 0.1))
    few = [*given[:7], case.constants[3][:18], *given[8:]]  # type: ignore[index]
    with pytest.raises(ValueError, match="angles of 18 rows"):
        cpu.kv_attend(*few)
    for wrong in (0, 49):
        given[2] = torch.tensor([wrong], dtype=torch.int32)
        with pytest.raises(ValueError, match=f"{wrong} tokens in tiles"):
            cpu.kv_attend(*given)
    with pytest.raises(ValueError, match="do not fit"):
        cpu.kv_attend(given[0], case.tiles[..., 1:], case.length, *given[3:])


@pytest.mark.parametrize(("kind", "bits", "width", "slots"), CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_is_coded_as_by_the_reference(
    kind: str, bits: int, width: int, slots: int, dtype: torch.dtype
) -> None:
    keys, values = codecs(kind, bits, width, slots)
    rotary = width // 2 if width == 128 else width
    form = TileFormat.of(keys, values, width, rotary if keys.pre_rope else 0)
    assert form is not None
    key, value = torch.randn(2, 2, HEADS, COUNT, width).to(dtype)
    padding = torch.tensor([0, 5], dtype=torch.int32)
    found = []
    for append in (cpu.kv_append, ops.kv_append):
        tiles = form.empty(2, HEADS, COUNT, torch.device("cpu"))
        sinks = torch.zeros(2, 2, HEADS, 4, width, dtype=dtype)
        known = constants(keys, values, form, tiles.shape[2])
        one_by_one(key, value, tiles, form, known, padding, (sinks[0], sinks[1]), append)
        *fields, one, two, three, four = read_fields(tiles, form).all()
        # The largest and the smallest value are as far from the middle: any of them may come first.
        found.append((*fields, *_in_order(one, two), *_in_order(three, four), sinks))
    for one, other in zip(*found, strict=True):
        # Sums of fp64 in another order: a number would have to lie at a border.
        assert int((one != other).sum()) <= 1e-3 * one.numel()


def _in_order(missing: Tensor, channels: Tensor) -> tuple[Tensor, Tensor]:
    channels, order = channels.sort(dim=-1)
    return missing.gather(-1, order), channels


def test_the_operator_that_codes_is_well_formed() -> None:
    keys, values = codecs("kvquant", 3, 64, 1)
    form = TileFormat.of(keys, values, 64, 64)
    assert form is not None
    tiles, length = form.empty(2, HEADS, 20, torch.device("cpu")), torch.tensor([17]).int()
    known = constants(keys, values, form, tiles.shape[2])
    names = ("books", "offset", "scale", "order", "steps", "angles")
    arguments = (
        *torch.randn(2, 2, HEADS, 1, 64), tiles, length, None, *(known[n] for n in names),
        *torch.zeros(2, 2, HEADS, 4, 64), form.arguments(),
    )  # fmt: skip
    torch.library.opcheck(torch.ops.llmsqueeze.kv_append.default, arguments)
    with pytest.raises(ValueError, match="33 tokens"):
        cpu.kv_append(*arguments[:3], torch.tensor([33]), *arguments[4:])
    with pytest.raises(ValueError, match="sinks of the key's dtype"):
        cpu.kv_append(arguments[0].bfloat16(), *arguments[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_rounded_as_torch_rounds_them(dtype: torch.dtype) -> None:
    """Of every size: subnormal in e4m3, at the borders of what it holds."""
    keys, values = codecs("fp8", 8, 64)
    form = TileFormat.of(keys, values, 64)
    assert form is not None
    powers = torch.arange(-30, 16).double().exp2()
    for power in powers:
        x = (torch.linspace(-1, 1, 64).double() * power * 1.003).to(dtype).expand(2, 1, 1, 1, 64)
        tiles = form.empty(1, 1, 16, torch.device("cpu"))
        expected = tiles.clone()
        length, rest = torch.tensor([1]).int(), (None,) * 9
        cpu.kv_append(x[0], x[1], tiles, length, *rest, form.arguments())
        ops.kv_append(x[0], x[1], expected, length, *rest, form.arguments())
        assert torch.equal(tiles, expected)
