"""Sparse rows as gaps: read back, and walked lane by lane as the kernel walks them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmsqueeze.numerics import gaps

BF16 = torch.bfloat16


def sparse(rows: int, columns: int, density: float | Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(rows, columns, generator=generator) < density
    return (torch.randn(rows, columns, generator=generator) * keep).to(BF16)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 70),
    st.integers(1, 300),
    st.floats(0, 1),
    st.sampled_from([3, 4]),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 6),
    st.integers(0, 99),
)
def test_unpacking_is_the_inverse(
    rows: int, columns: int, density: float, bits: int, parts: int, warps: int, seed: int
) -> None:
    weight = sparse(rows, columns, density, seed)
    packed = gaps.pack(weight, gaps.Shape(bits, parts, warps))
    assert torch.equal(gaps.unpack(packed, rows, columns, BF16), weight)


@pytest.mark.parametrize("bits", [3, 4])
def test_rows_of_every_length(bits: int) -> None:
    """Slices of like rows need not take the turns of the longest one."""
    weight = sparse(200, 2000, torch.linspace(0, 1, 200)[torch.randperm(200)][:, None])
    weight[17] = 0
    packed = gaps.pack(weight, gaps.Shape(bits, 2, 3))
    assert packed.turns == 0
    assert torch.equal(gaps.unpack(packed, 200, 2000, BF16), weight)
    longest = int(packed.first.diff().max()) * (len(packed.first) - 1)
    assert len(packed.stream) < 0.7 * longest


def test_a_panel_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = sparse(300, 200, torch.rand(300, 1, generator=torch.Generator().manual_seed(1)))
    whole = gaps.pack(weight, gaps.Shape(3, 2, 2))
    monkeypatch.setattr(gaps, "PANEL", 48)
    parts = gaps.pack(weight, gaps.Shape(3, 2, 2))
    assert torch.equal(whole.stream, parts.stream)
    assert torch.equal(whole.starts.view(torch.int16), parts.starts.view(torch.int16))
    assert torch.equal(gaps.entries(weight, 3), gaps.entries(weight, 3))


def walk(packed: gaps.Gaps, x: Tensor, rows: int) -> Tensor:
    """W x in fp64 as a lane goes through the memory: addresses, not tensors.

    Fails where a lane would leave `reach` columns of x.
    """
    shape = packed.shape
    quads = shape.block // 8 + 1
    words = packed.stream.flatten().tolist()
    values = packed.stream.flatten().view(BF16).double()
    starts = (packed.starts.view(torch.int16).long() & 0xFFFF).flatten().tolist()
    held = torch.zeros(packed.reach, dtype=torch.float64)
    held[: len(x)] = x
    y = torch.zeros(rows, dtype=torch.float64)
    first = packed.first.tolist()
    per_word = shape.block // 4
    for index in range(len(first) - 1):
        piece = -(-(first[index + 1] - first[index]) // shape.warps)
        for begin in range(first[index], first[index + 1], piece):
            for lane in range(32):
                row = int(packed.order[index * shape.rows + lane % shape.rows])
                at = starts[begin * 32 + lane]
                for turn in range(begin, min(begin + piece, first[index + 1])):
                    base = turn * quads
                    for entry in range(shape.block):
                        gap_word = words[(base + quads - 1) * 128 + lane * 4 + entry // per_word]
                        at += gap_word >> shape.bits * (entry % per_word) & (1 << shape.bits) - 1
                        place = ((base + entry // 8) * 32 + lane) * 8 + entry % 8
                        product = values[place] * held[at]
                        if row >= 0:
                            y[row] += product
                        else:
                            assert values[place] == 0
                        at += 1
    return y


@pytest.mark.parametrize(("bits", "parts"), [(3, 1), (3, 2), (4, 2), (4, 4)])
def test_lanes_find_the_product(bits: int, parts: int) -> None:
    weight = sparse(40, 333, torch.linspace(0.02, 0.8, 40)[:, None])
    x = torch.randn(333, generator=torch.Generator().manual_seed(3)).double()
    packed = gaps.pack(weight, gaps.Shape(bits, parts, 2))
    y = walk(packed, x, 40)
    assert torch.allclose(y, weight.double() @ x, rtol=1e-12, atol=1e-12)


def ring_walk(packed: gaps.Gaps, x: Tensor, rows: int, turns: int) -> Tensor:
    """W x in fp64 as gaps_tensor.cu finds it: rounds of so many turns write into a ring of just the span.

    Fails where an entry would land on one that has not been multiplied yet.
    """
    shape, span = packed.shape, packed.spans[gaps.TURNS.index(turns)]
    starts = packed.starts.view(torch.int16).long() & 0xFFFF
    per_word = shape.block // 4
    shifts = shape.bits * torch.arange(per_word)
    values = packed.stream[:, :-1].contiguous().view(BF16).double().transpose(1, 2).flatten(2)
    steps = (packed.stream[:, -1].long().unsqueeze(-1) >> shifts & (1 << shape.bits) - 1).flatten(2)
    columns = starts[..., None] + (steps + 1).cumsum(-1) - 1
    y = torch.zeros(rows, dtype=torch.float64)
    first = packed.first.tolist()
    for index in range(len(first) - 1):
        ring: dict[tuple[int, int], tuple[int, float]] = {}
        slowest = starts[first[index]].view(shape.parts, shape.rows).amin(1)
        done = (slowest // gaps.UNIT * gaps.UNIT).repeat_interleave(shape.rows)
        for begin in range(first[index], first[index + 1], turns):
            end = min(begin + turns, first[index + 1])
            for block in range(begin, end):
                for lane in range(32):
                    for column, value in zip(
                        columns[block, lane].tolist(), values[block, lane].tolist(), strict=True
                    ):
                        assert done[lane] <= column < done[lane] + span
                        if value:
                            assert ring.setdefault((lane, column % span), (column, value)) == (
                                column,
                                value,
                            )
            for half in range(shape.parts):
                lanes = range(half * shape.rows, (half + 1) * shape.rows)
                # Whole units that every lane of the half has passed.
                last = end == first[index + 1]
                upcoming = 1 << 20 if last else int(starts[end, list(lanes)].min())
                if last:  # up to the end, or to where the upper lanes began
                    whole = (
                        len(x)
                        if half == shape.parts - 1
                        else int(starts[first[index], shape.rows :].max())
                    )
                    assert -(-whole // gaps.UNIT) * gaps.UNIT - int(done[lanes[0]]) <= span
                for lane in lanes:
                    row = int(packed.order[index * shape.rows + lane % shape.rows])
                    done[lane] = upcoming // gaps.UNIT * gaps.UNIT
                    for place in [
                        k for k, (c, _) in ring.items() if k[0] == lane and c < done[lane]
                    ]:
                        column, value = ring.pop(place)
                        y[row] += value * x[column]
    return y


@pytest.mark.parametrize(("bits", "parts"), [(3, 1), (3, 2), (4, 1), (4, 2)])
@pytest.mark.parametrize("kind", ["even", "uneven", "ends in zeros"])
def test_rounds_stay_within_their_span(bits: int, parts: int, kind: str) -> None:
    weight = sparse(40, 900, torch.linspace(0.02, 0.8, 40)[:, None] if kind == "uneven" else 0.5)
    if kind == "ends in zeros":
        weight[:, 500:] = 0
    x = torch.randn(900, generator=torch.Generator().manual_seed(3)).double()
    packed = gaps.pack(weight, gaps.Shape(bits, parts, 2))
    for turns in (3, 8):
        y = ring_walk(packed, x, 40, turns)
        assert torch.allclose(y, weight.double() @ x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("odd", ["absent", "zero", "of many densities", "of columns of its own"])
def test_an_odd_row_goes_along_with_its_slice(parts: int, odd: str) -> None:
    shape = gaps.Shape(3, parts, 6)
    weight = sparse(64, 3000, 0.5)
    even = gaps.pack(weight, shape).spans
    if odd == "absent":
        weight = weight[:63]
    elif odd == "zero":
        weight[3] = 0
    elif odd == "of many densities":
        weight = sparse(64, 3000, torch.linspace(0.3, 0.6, 64)[:, None])
    else:
        weight[4, 1000:] = 0
    packed = gaps.pack(weight, shape)
    assert torch.equal(gaps.unpack(packed, len(weight), 3000, BF16), weight)
    wider = [found - span for found, span in zip(packed.spans, even, strict=True)]
    # Without zeros among its non-zeros a row of half as many would be 1500 columns ahead of the others.
    assert max(wider) <= {"absent": 32, "zero": 32}.get(odd, 400)


def test_long_gaps_are_bridged() -> None:
    weight = torch.zeros(3, 500, dtype=BF16)
    weight[0, [0, 499]] = 1
    weight[1, 8] = 1  # one more than 3 bits say
    weight[2, 7] = 1
    assert gaps.entries(weight, 3).tolist() == [1 + 1 + 498 // 8, 2, 1]
    assert gaps.entries(weight, 4).tolist() == [1 + 1 + 498 // 16, 1, 1]
    packed = gaps.pack(weight, gaps.Shape(3, 1, 1))
    assert torch.equal(gaps.unpack(packed, 3, 500, BF16), weight)


def test_bits_a_weight() -> None:
    """At 50 % with rows of equal length, what the design promises: under 10 bits of 16."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.rand(512, 4096, generator=generator).topk(2048, dim=1).indices
    weight = torch.zeros(512, 4096, dtype=BF16).scatter_(1, columns, 1.0)
    packed = gaps.pack_best(weight)
    assert packed.turns > 0
    assert packed.stream.numel() * 32 / weight.numel() < 9.9


@pytest.mark.parametrize("rows", [1024, 4096, 14336, 28672])
@pytest.mark.parametrize("longest", [1245, 2075, 7240])
def test_the_shape_keeps_loads_in_flight(rows: int, longest: int) -> None:
    shape = gaps.choose_shape({3: longest, 4: longest}, rows, 132)
    slices = rows // shape.rows
    together = min(gaps.MOST_WARPS[shape.bits] // shape.warps, -(-slices // 132))
    assert 16 <= shape.warps * together <= gaps.MOST_WARPS[shape.bits]
    turns = -(-longest // (shape.block * shape.parts))
    assert (shape.warps - 1) * -(-turns // shape.warps) < turns  # every warp has some


def test_the_shape_follows_rows_and_bytes() -> None:
    assert gaps.choose_shape({3: 2075, 4: 2060}, 1024).parts == 2  # or there were 32 blocks
    assert gaps.choose_shape({3: 2075, 4: 2060}, 28672).parts == 1
    assert gaps.choose_shape({3: 1330, 4: 1247}, 4096).bits == 4
    assert gaps.choose_shape({3: 5, 4: 4}, 64).warps == 1
    assert gaps.choose_shape({3: 0, 4: 0}, 64).warps == 1


def test_nearly_even_rows_stay_in_their_places() -> None:
    """A table of slices, and the order of rows, are for what saves bytes."""
    weight = torch.ones(320, 400, dtype=BF16)
    weight[77, :5] = 0
    shape = gaps.Shape(4, 1, 2)
    even = gaps.pack(weight, shape)
    assert even.turns == 13 and even.moved() is None
    weight[:, 320:] = 0
    weight[78, 330] = 1  # one more than ten blocks hold
    uneven = gaps.pack(weight, shape)
    assert uneven.turns == 0 and uneven.first.diff().tolist() == [11] + [10] * 9
    assert uneven.moved() is uneven.order and uneven.order[0] == 78
    assert torch.equal(gaps.unpack(uneven, 320, 400, BF16), weight)


def test_too_many_columns() -> None:
    with pytest.raises(ValueError, match="columns"):
        gaps.pack(torch.zeros(1, 60_001, dtype=BF16), gaps.Shape(3, 1, 1))


@pytest.mark.parametrize("columns", [333, 40_000])
def test_short_rows_beside_a_long_one_do_not_reach_far(columns: int) -> None:
    """Where a part begins is stored in 16 bits, and what lanes reach is held of x."""
    weight = torch.zeros(16, columns, dtype=BF16)
    weight[0] = 1
    weight[1, :3] = 2
    weight[2, -1] = 3
    shape = gaps.Shape(3, 2, 10)
    packed = gaps.pack(weight, shape)
    part = int(packed.first[-1]) * shape.block
    assert packed.reach <= columns + part
    assert torch.equal(gaps.unpack(packed, 16, columns, BF16), weight)
    if columns < 1000:
        x = torch.randn(columns, generator=torch.Generator().manual_seed(3)).double()
        assert torch.allclose(walk(packed, x, 16), weight.double() @ x, rtol=1e-12, atol=1e-12)
