"""gap_linear on CUDA. A few tokens: lanes that each follow a row; more: tensor cores; many: made dense."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from llmsqueeze.numerics.gaps import MOST_WARPS, TURNS
from llmsqueeze.ops import cuda, operands, swiglu
from llmsqueeze.ops.operands import addend, bias_from, bias_step, half, matrix, output

# Tokens of a launch of gaps.cu, and of gaps_tensor.cu.
FEW, TENSOR = 4, 32


def gap_linear(
    x: Tensor, stream: Tensor, starts: Tensor, first: Tensor, order: Tensor | None, bias: Tensor | None,
    rows: int, bits: int, parts: int, warps: int, turns: int, reach: int, spans: list[int],
    glu: bool = False,
) -> Tensor:  # fmt: skip
    x, tokens, columns = matrix(x, 8)
    bias = addend(bias)
    slices, index = len(first) - 1, x.device.index
    # Where two blocks of gaps.cu to a multiprocessor would hold too much of x, tensor cores are faster.
    few = tokens <= 2 or (tokens <= FEW and 2 * _held(tokens, reach) <= cuda.most_shared(index))
    ring = None
    if not few and tokens <= TENSOR:
        ring = choose_ring(spans, len(starts) // slices, slices, tokens, index)
    if not few and not ring and tokens > 2 * FEW:
        expand = functools.partial(_expand, stream, starts, first, bits, parts, columns, spans)
        if order is None or rows <= operands.panel_rows(columns):
            return operands.expanded(x, bias, rows, functools.partial(expand, order), glu)
        # A panel is some of the slices: rows come in their order, and are moved in the result.
        places = slices * (32 // parts)
        if bias is not None:  # added before the result is rounded
            bias = bias[..., order.clamp_min(0)]
        y = operands.expanded(x, bias, places, functools.partial(expand, None))[..., :rows]
        y = torch.empty_like(y).index_copy_(-1, order[:rows].long(), y)
        return swiglu(y) if glu else y
    y = output(x, rows, glu)
    given, found = x.view(tokens, columns), y.view(tokens, y.shape[-1])
    weight = stream, starts, None if turns else first, order
    macros = {"GAP": bits, "PARTS": parts, "HALF": half(x), "PDL": int(cuda.is_hopper(index))}
    if ring:
        tiles = next(n for n in (1, 2, 4) if tokens <= 8 * n)
        more = {"TILES": tiles, "RING": ring.columns, "WARPS": ring.most, "BLOCKS": ring.blocks}
        cuda.launch(
            "gaps_tensor", macros | more, x,
            (*weight, x, y, bias, rows, columns, tokens, turns, 0, int(glu),
             bias_step(bias)),
            grid=(slices, 1), block=32 * ring.warps, shared=ring.shared,
        )  # fmt: skip
        return y
    # Wide layers take fewer tokens at a time.
    most = FEW
    while most > 1 and _held(most, reach) > cuda.most_shared(index):
        most //= 2
    for begin in range(0, tokens, most):
        some = min(most, tokens - begin)
        more = {"TOKENS": next(n for n in (1, 2, 4) if some <= n), "WARPS": MOST_WARPS[bits]}
        cuda.launch(
            "gaps", macros | more, x,
            (*weight, given[begin:], found[begin:], bias_from(bias, begin), rows, columns, _padded(reach),
             some, turns, int(glu), bias_step(bias)),
            grid=(slices, 1), block=32 * warps, shared=_held(some, reach),
        )  # fmt: skip
    return y


def _padded(reach: int) -> int:
    return (reach + 8) // 8 * 8


def _held(tokens: int, reach: int) -> int:
    """Bytes of x in shared memory, see gaps.cu."""
    return 2 * next(n for n in (1, 2, 4) if tokens <= n) * _padded(reach)


@dataclass(frozen=True)
class Ring:
    """A launch of gaps_tensor.cu. columns: of the ring; warps of a block, at most `most`; blocks to a
    multiprocessor that registers are divided for; shared: bytes that a block asks for."""

    columns: int
    warps: int
    most: int
    blocks: int
    shared: int


def choose_ring(spans: list[int], turns: int, slices: int, tokens: int, index: int) -> Ring | None:
    """On an H100 the fastest of those tried; None: no ring holds a round.

    Several blocks to a multiprocessor with a small ring each overlap what each waits for, but with fewer
    than six warps they do not keep it busy.
    """
    shared = cuda.most_shared(index)

    def fit(columns: int, most: int) -> int:
        """Warps for as few rounds as can be; 0: none."""
        found = [n for n, span in zip(TURNS, spans, strict=True) if span <= columns and n <= most]
        if not found or 64 * columns > shared:
            return 0
        rounds = -(-turns // found[-1])
        return next(n for n in found if -(-turns // n) == rounds)

    small, large = fit(1024, 8), fit(2048, 16)
    each = -(-slices // cuda.architecture(index)[1])  # blocks for a multiprocessor
    if large and (small < 6 or (each == 1 and large > small)):
        return Ring(2048, large, 16, 1, 64 * 2048)
    if not small:
        return None
    asked = 64 * 1024
    if each < 3:  # no more at once than each gets, or others get fewer
        # A multiprocessor has 5 KB more than most_shared(), and keeps 1 KB for each block.
        asked = max(asked, (shared + 5120) // (each + 1))
    return Ring(1024, small, 8, min(2 if tokens else 3, shared // (64 * 1024)), asked)


def _expand(
    stream: Tensor, starts: Tensor, first: Tensor, bits: int, parts: int, columns: int, spans: list[int],
    order: Tensor | None, begin: int, end: int,
) -> Tensor:  # fmt: skip
    """[end - begin, columns]: with an order all rows, else what is at places begin to end."""
    held, index = 32 // parts, stream.device.index
    slices = -(-(end - begin) // held)
    macros = {"GAP": bits, "PARTS": parts, "HALF": 0, "PDL": 0}
    ring = choose_ring(spans, len(starts) // (len(first) - 1), slices, 0, index)
    make = torch.empty if ring else torch.zeros
    panel = make(end - begin, columns, dtype=torch.bfloat16, device=stream.device)
    if ring:
        more = {"TILES": 0, "RING": ring.columns, "WARPS": ring.most, "BLOCKS": ring.blocks}
        cuda.launch(
            "gaps_tensor", macros | more, stream,
            (stream, starts, first, order, None, panel, None, len(panel), columns, 0, 0,
             begin // held, 0, 0),
            grid=(slices, 1), block=32 * ring.warps, shared=ring.shared,
        )  # fmt: skip
    else:
        cuda.launch(
            "gaps_expand", macros, stream,
            (stream, starts, first, order, panel, len(panel), columns, begin // held),
            grid=(slices, 1), block=256, shared=0,
        )  # fmt: skip
    return panel
