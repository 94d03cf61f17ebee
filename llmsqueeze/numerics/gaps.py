"""Sparse rows as their non-zeros and the gaps between them, for lanes that each follow one row.

A gap counts the zeros before a non-zero, in 3 or 4 bits; a longer one is bridged by stored zeros. Every row
is divided into as many parts of equal length as lanes work on it; a part is whole blocks of 40 (3 bits) or
32 (4 bits) entries: values of 16 bits, then the gaps in words of 32 bits. A warp's lanes have rows in turn,
and where lanes share rows, upper lanes the parts behind those of lower ones. All lanes take a block at every
turn: turns go once through the columns of every lane, and are for any number of warps to share. Rows with
fewer entries than others get zeros between their non-zeros too, so that all lanes of a warp are about where
the others are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

LANES = 32
# Where a part begins is stored in 16 bits.
MAX_COLUMNS = 60_000
# Bits of a gap → warps of the kernel for few tokens, in one block or several, that fit a multiprocessor.
MOST_WARPS = {3: 28, 4: 32}
LEAST_WARPS = 6
# Turns that a round of gaps_tensor.cu may have: warps that take one after another.
TURNS = tuple(range(2, 17))
# Columns that it multiplies at a time.
UNIT = 32
# Rows of a matrix that are packed at a time: the work needs some 60 bytes a weight.
PANEL = 2048


@dataclass(frozen=True)
class Shape:
    """How rows are divided. bits: of a gap; parts: lanes to a row; warps: that share the turns of a slice of
    32 / parts rows when tokens are few."""

    bits: int
    parts: int
    warps: int

    @property
    def block(self) -> int:
        """Entries of a block."""
        return 40 if self.bits == 3 else 32

    @property
    def rows(self) -> int:
        """Of a slice."""
        return LANES // self.parts


@dataclass(frozen=True)
class Gaps:
    """A packed matrix.

    stream: [turns of all slices, quads, 32, 4] int32; starts: [as many, 32] uint16, the column at which a
    lane's block begins; first: [slices + 1] int32, turns before each slice; order: [slices · rows of one]
    int32, which row is where, -1 for none; turns: of every slice, 0 if slices differ; reach: columns that a
    lane may touch, those beyond the last being zero; spans: for each of TURNS, within how many columns a
    round of so many turns stays, from the unit that the slowest lane is in.
    """

    shape: Shape
    stream: Tensor
    starts: Tensor
    first: Tensor
    order: Tensor
    turns: int
    reach: int
    spans: tuple[int, ...]

    def moved(self) -> Tensor | None:
        """order, or None where every row is in its own place."""
        own = torch.arange(int((self.order >= 0).sum()), device=self.order.device)
        return None if torch.equal(self.order[: len(own)], own.int()) else self.order

    def arguments(self) -> tuple[int, int, int, int, int, list[int]]:
        """What the operator gap_linear is told besides tensors."""
        shape = self.shape
        return shape.bits, shape.parts, shape.warps, self.turns, self.reach, list(self.spans)


def choose_shape(longest: Mapping[int, int], rows: int, multiprocessors: int = 132) -> Shape:
    """The shape whose kernels are expected to be fastest.

    longest: bits of a gap → entries of the longest row, bridging zeros included. The microseconds were fitted
    to 480 timings on an H100, 50 to 70 % of 1024 to 28672 rows and of 576 to 28672 columns being zero: what
    they choose takes 1 % longer than the fastest on average, and 7 at most.
    """

    def microseconds(shape: Shape) -> float:
        turns = _turns_for(longest[shape.bits], shape)
        slices = -(-rows // shape.rows)
        megabytes = slices * turns * LANES * (2 * shape.block + 16) / 1e6
        together = MOST_WARPS[shape.bits] // shape.warps
        in_flight = min(slices / multiprocessors, together) * shape.warps
        waves = -(-slices // (multiprocessors * together))
        found = megabytes * (0.24 + 0.8 / in_flight) + waves * (
            0.5 + 0.5 * -(-turns // shape.warps)
        )
        if shape.bits == 3 and together == 1:  # the next kernel finds no room to begin
            found += 0.5
        # Several tokens are faster with lanes on rows of their own: x is read half as often.
        return found * (1.04 if shape.parts == 2 else 1)

    # Of bits those that take fewer bytes.
    bits = min(longest, key=lambda n: longest[n] * (2 + 16 / Shape(n, 1, 1).block))
    shapes = []
    for parts in (1, 2):
        turns = _turns_for(longest[bits], Shape(bits, parts, 1))
        some = range(min(LEAST_WARPS, turns), min(MOST_WARPS[bits], turns) + 1)
        # With as many turns to a warp fewer warps may do.
        shapes += [Shape(bits, parts, -(-turns // -(-turns // n))) for n in some]
    return min(shapes, key=microseconds)


def _turns_for(entries: int, shape: Shape) -> int:
    return max(1, -(-entries // (shape.block * shape.parts)))


def pack_best(weight: Tensor, multiprocessors: int = 132, together: int = 1) -> Gaps:
    """pack() in the shape that choose_shape() prefers."""
    lengths = {bits: entries(weight, bits) for bits in (3, 4)}
    longest = {bits: int(found.max()) for bits, found in lengths.items()}
    shape = choose_shape(longest, len(weight), multiprocessors)
    return pack(weight, shape, lengths[shape.bits], together)


def entries(weight: Tensor, bits: int) -> Tensor:
    """[rows] int64: entries of every row, bridging zeros included."""
    found = [_columns(weight[i : i + PANEL] != 0, bits)[3] for i in range(0, len(weight), PANEL)]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)


def pack(weight: Tensor, shape: Shape, lengths: Tensor | None = None, together: int = 1) -> Gaps:
    """Of a [rows, columns] bf16 or fp16 matrix; ValueError beyond 60,000 columns.

    lengths: of entries(), if they are known. Rows of like length are put together, when that saves turns;
    together: of which so many stay as they are, 1 or 16. They divide the rows.
    """
    rows, columns = weight.shape
    if columns > MAX_COLUMNS:
        raise ValueError(f"{columns} columns are more than {MAX_COLUMNS}")
    if lengths is None:
        lengths = entries(weight, shape.bits)
    slices = -(-rows // shape.rows)
    unit = shape.block * shape.parts
    order = torch.arange(slices * shape.rows, device=weight.device)
    order[rows:] = -1
    need = _turns(lengths, order, shape.rows, unit)
    # Slices of one length need no table to be found, nor an order; worth 2 % more bytes.
    if not (uniform := _uniform(need)):
        longest_of = lengths.view(-1, together).amax(1)
        ranked = longest_of.argsort(descending=True, stable=True) * together
        order[:rows] = (ranked[:, None] + order[:together]).flatten()
        need = _turns(lengths, order, shape.rows, unit)
        uniform = _uniform(need)
    longest = int(need.max())
    if uniform:
        need = torch.full_like(need, longest)
    first = torch.zeros(slices + 1, dtype=torch.int64, device=weight.device)
    torch.cumsum(need, 0, out=first[1:])
    streams, starts, reach, spans = [], [], columns, [0] * len(TURNS)
    for begin, end in _runs(need, max(1, PANEL // shape.rows)):
        these = order[begin * shape.rows : end * shape.rows]
        stream, start, touched, wide = _pack_slices(weight, these, int(need[begin]), shape)
        streams.append(stream)
        starts.append(start)
        reach = max(reach, touched)
        spans = [max(pair) for pair in zip(spans, wide, strict=True)]
    return Gaps(
        shape, torch.cat(streams), torch.cat(starts), first.int(), order.int(),
        longest if uniform else 0, reach, tuple(spans),
    )  # fmt: skip


def unpack(packed: Gaps, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The [rows, columns] matrix: inverse of pack."""
    shape, device = packed.shape, packed.stream.device
    weight = torch.zeros(rows, columns, dtype=dtype, device=device)
    lanes = torch.arange(LANES, device=device)
    slices = torch.arange(len(packed.first) - 1, device=device)
    slice_of = slices.repeat_interleave(packed.first.diff())
    per_word = shape.block // 4
    shifts = shape.bits * torch.arange(per_word, device=device)
    for begin in range(0, len(slice_of), PANEL):
        some = slice(begin, begin + PANEL)
        part = packed.stream[some]  # [block, quad, lane, word]
        values = part[:, :-1].contiguous().view(dtype).transpose(1, 2).flatten(2)
        gaps = (part[:, -1].long().unsqueeze(-1) >> shifts & (1 << shape.bits) - 1).flatten(2)
        start = packed.starts[some].view(torch.int16).long() & 0xFFFF
        at = start.unsqueeze(-1) + (gaps + 1).cumsum(-1) - 1
        place = slice_of[some, None] * shape.rows + lanes % shape.rows
        row = packed.order[place].long()[..., None].expand_as(at)
        wanted = (at < columns) & (row >= 0)
        # Entries that bridge a gap are zero and may share a place with nothing else.
        weight.index_put_((row[wanted], at[wanted]), values[wanted])
    return weight


def _turns(lengths: Tensor, order: Tensor, rows: int, unit: int) -> Tensor:
    """Turns that every slice needs."""
    of_place = torch.where(order >= 0, lengths[order.clamp_min(0)], 0)
    return ((of_place.view(-1, rows).amax(1) + unit - 1) // unit).clamp_min(1)


def _uniform(need: Tensor) -> bool:
    return int(need.max()) * len(need) <= 1.02 * int(need.sum())


def _runs(need: Tensor, most: int) -> Iterator[tuple[int, int]]:
    """Ranges of slices that need equally many turns, at most so many at once."""
    counts = need.tolist()
    begin = 0
    for end in range(1, len(counts) + 1):
        if end == len(counts) or counts[end] != counts[begin] or end - begin == most:
            yield begin, end
            begin = end


def _columns(taken: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of every entry its row, gap and number within the row; entries of every row. taken: where they are."""
    rows, columns = taken.nonzero(as_tuple=True)
    gap = columns.clone()
    same = rows[1:] == rows[:-1]
    gap[1:] -= torch.where(same, columns[:-1] + 1, 0)
    # An entry and the zeros that bridge the way to it.
    steps = (gap >> bits) + 1
    total = steps.cumsum(0)
    lengths = torch.zeros(len(taken), dtype=torch.int64, device=taken.device)
    lengths.index_add_(0, rows, steps)
    begin = lengths.cumsum(0) - lengths
    return rows, gap, total - 1 - begin[rows], lengths


def _filled(nonzero: Tensor, spare: Tensor) -> Tensor:
    """Where entries are when zeros among a row's non-zeros become entries too. spare: [rows], of how many.

    As many as belong before the last non-zero when they are spread over all of the row's zeros. None of them
    lengthens a row by more than one: what bridges a gap gets less.
    """
    columns = nonzero.shape[1]
    number = torch.arange(1, columns + 1, device=nonzero.device)
    length = (nonzero * number).amax(1)  # up to the last non-zero
    count = nonzero.sum(1)
    inside = length - count
    fill = (spare * inside // (columns - count).clamp_min(1)).minimum(inside)[:, None]
    rank = (~nonzero).cumsum(1)  # of a zero, from 1 on
    inside = inside.clamp_min(1)[:, None]
    chosen = rank * fill // inside != (rank - 1) * fill // inside
    return nonzero | chosen & (number <= length[:, None])


def _pack_slices(
    weight: Tensor, order: Tensor, turns: int, shape: Shape
) -> tuple[Tensor, Tensor, int, list[int]]:
    """Stream, starts, the columns that lanes reach, and spans, of slices of equally many turns."""
    columns, device = weight.shape[1], weight.device
    part = weight[order.clamp_min(0)] * (order >= 0)[:, None]
    most = (1 << shape.bits) - 1
    total = shape.parts * turns * shape.block
    taken = part != 0
    rows, gap, entry, lengths = _columns(taken, shape.bits)
    spare = total - lengths
    if int(spare.max()) > 4 * shape.block:
        taken = _filled(taken, spare)
        rows, gap, entry, lengths = _columns(taken, shape.bits)
    # What bridges a gap steps over as much as fits; what is left behind the last goes evenly to the end.
    index = torch.arange(total, device=device)[None]
    ends = (taken * torch.arange(1, columns + 1, device=device)).amax(1, keepdim=True)
    behind = index - lengths[:, None]
    rest, left = columns - ends, (total - lengths).clamp_min(1)[:, None]
    even = (behind + 1) * rest // left - behind * rest // left - 1
    gaps = torch.where(behind < 0, most, even.clamp(0, most))
    gaps[rows, entry] = gap & most
    values = torch.zeros(len(part), total, dtype=weight.dtype, device=device)
    values[rows, entry] = part[taken]
    steps = (gaps + 1).view(len(part), -1, shape.block).sum(-1)
    # What begins beyond the last column has no non-zero: it may begin right behind it. Else the short rows of
    # a slice would reach far, and so would what is held of x.
    starts = (steps.cumsum(1) - steps).clamp_max(columns)
    # [slice, turn, half of the lanes, row]
    split = (-1, shape.rows, shape.parts, turns)
    starts, steps = (t.view(split).permute(0, 3, 2, 1) for t in (starts, steps))
    piece = -(-turns // shape.warps)  # turns that a warp goes through without looking at starts
    along = pad(steps, (0, 0) * 2 + (0, -turns % piece)).unflatten(1, (-1, piece)).sum(2)
    reach = int((starts[:, ::piece] + along).max())
    ends = starts + steps
    # All columns are multiplied in the end, whole units at a time.
    ends[:, -1, -1].clamp_min_(columns)
    ends[:, -1] += -ends[:, -1] % UNIT
    spans = [_span(starts, ends, count) for count in TURNS]
    per_word = shape.block // 4
    shifts = shape.bits * torch.arange(per_word, device=device)
    words = (gaps.view(len(part), -1, 4, per_word) << shifts).sum(-1)
    words = words.to(torch.int32).view(*split, 1, 4)
    quads = values.view(*split, shape.block // 8, 8).view(torch.int32)
    stream = torch.cat([quads, words], dim=4).permute(0, 3, 4, 2, 1, 5)
    stream = stream.reshape(-1, shape.block // 8 + 1, LANES, 4)
    starts = starts.reshape(-1, LANES).to(torch.int32).to(torch.int16).view(torch.uint16)
    return stream, starts, reach, spans


def _span(starts: Tensor, ends: Tensor, count: int) -> int:
    """Columns within which every round of `count` turns stays. starts, ends: [slice, turn, half, row]."""
    first = starts[:, ::count].amin(-1) // UNIT * UNIT
    rounds = first.shape[1]
    last = pad(ends.amax(-1), (0, 0, 0, rounds * count - ends.shape[1]))
    return int((last.unflatten(1, (rounds, count)).amax(2) - first).max())
