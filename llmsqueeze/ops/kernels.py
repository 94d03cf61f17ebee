"""The operators on CUDA: which variant of a kernel runs, and how it is launched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from llmsqueeze.errors import EnvironmentFault
from llmsqueeze.numerics import int8
from llmsqueeze.ops import attend_fits, cuda, is_input_major, round_down, swiglu
from llmsqueeze.ops.append_kernel import kv_append as kv_append
from llmsqueeze.ops.gap_kernels import gap_linear as gap_linear
from llmsqueeze.ops.kv_kernels import kv_attend as kv_attend
from llmsqueeze.ops.operands import addend, bias_step, expanded, half, matrix, output

# Beyond so many rows of x weights are expanded, and cuBLAS multiplies them.
SPARSE24_TOKENS = 64
INT8_TOKENS = 2
_LOG2_E = 1.4426950408889634
# FORMAT of gated.cu.
PLAIN, INT8, OUTPUTS24 = range(3)
# Tiles of 8 tokens (0: up to four tokens) → bands of 16 rows to a block, warps to a band: the fastest on an
# H100 for matrices of many rows, and of fewer than _WIDE.
SPARSE24_WIDE = {0: (1, 8), 1: (2, 4), 2: (4, 2), 4: (4, 2), 8: (8, 1)}
SPARSE24_NARROW = {0: (1, 8), 1: (2, 4), 2: (2, 4), 4: (2, 4), 8: (4, 2)}
# The same where some of the weights are dense: a band's pieces are fewer, and shared by more warps.
MIXED_WIDE = {0: (2, 7), 1: (2, 7), 2: (4, 2), 4: (4, 2), 8: (8, 1)}
MIXED_NARROW = {0: (1, 14), 1: (2, 7), 2: (2, 6), 4: (2, 4), 8: (4, 2)}
_WIDE = 8192
# Bytes of x in shared memory: of all of it, and of two stages; so that several blocks fit a multiprocessor.
_ALL, _STAGE = 112 * 1024, 48 * 1024


def sparse24_linear(
    x: Tensor, stream: Tensor, bias: Tensor | None, rows: int, glu: bool = False
) -> Tensor:
    return _on_tensor_cores(x, bias, rows, stream.shape[1], (stream, None, None, None), glu)


def mixed24_linear(
    x: Tensor, stream: Tensor, entries: Tensor, metadata: Tensor, starts: Tensor,
    bias: Tensor | None, rows: int, glu: bool = False,
) -> Tensor:  # fmt: skip
    chunks = -(-x.shape[-1] // 256)
    return _on_tensor_cores(x, bias, rows, chunks, (stream, entries, metadata, starts), glu)


def _on_tensor_cores(
    x: Tensor, bias: Tensor | None, rows: int, chunks: int, weight: tuple[Tensor | None, ...],
    glu: bool,
) -> Tensor:  # fmt: skip
    """weight: stream, entries, metadata and starts of sparse24.cu; the last three None if all is 2:4."""
    x, tokens, columns = matrix(x, 8)
    bias = addend(bias)
    if tokens > SPARSE24_TOKENS:
        expand = functools.partial(_expand_sparse24, weight, columns, chunks)
        return expanded(x, bias, rows, expand, glu)
    y = output(x, rows, glu)
    if not tokens:
        return y
    tiles = next(n for n in (1, 2, 4, 8) if tokens <= 8 * n)
    if tokens <= 4 and chunks * 512 * tokens <= _ALL:
        tiles = 0
    wide, narrow = (
        (MIXED_WIDE, MIXED_NARROW) if _mixed(weight) else (SPARSE24_WIDE, SPARSE24_NARROW)
    )
    bands, splits = (wide if rows >= _WIDE else narrow)[tiles]
    # Chunks of x in shared memory: all, or two stages of a multiple of the splits.
    span, stages = chunks, 1
    stage = _STAGE if rows >= _WIDE and tiles < 8 else cuda.most_shared(x.device.index) * 7 // 8
    if tiles and span * 512 * tokens > stage:
        span = max(splits, stage // (2 * 512 * tokens) // splits * splits)
        stages = 1 if span >= chunks else 2
    macros = {
        "BANDS": bands, "SPLITS": splits, "TILES": tiles, "BLOCKS": 1 if tiles == 8 else 2,
        "MIXED": _mixed(weight), "HALF": half(x), "PDL": int(cuda.is_hopper(x.device.index)),
    }  # fmt: skip
    held = 16 + stages * tokens * (span * 32 + 1) * 16
    cuda.launch(
        "sparse24", macros, x, (*weight, x, y, bias, rows, columns, tokens, chunks, span, int(glu),
             bias_step(bias)),
        grid=(-(-rows // (16 * bands)), 1), block=32 * bands * splits,
        shared=max(held, bands * splits * tokens * 64),
    )  # fmt: skip
    return y


def _mixed(weight: tuple[Tensor | None, ...]) -> int:
    return int(weight[1] is not None)


def gated_linear(
    x: Tensor, threshold: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor | None,
    down: Tensor | None, glu: bool = False,
) -> Tensor:  # fmt: skip
    """weight: [rows, columns] as a view of an input-major matrix, see input_major."""
    _check_input_major(weight)
    rows, columns = weight.shape
    stride = weight.stride(1) // 8
    product = functools.partial(_gated, PLAIN, x, threshold, weight, bias, rows, columns, stride)
    return _with_branch(product, x, threshold, up, down, glu)


def gated_int8_linear(
    x: Tensor, threshold: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None,
    up: Tensor | None, down: Tensor | None, glu: bool = False,
) -> Tensor:  # fmt: skip
    """codes: [rows, columns] as a view of an input-major matrix, see input_major."""
    product = functools.partial(_gated_int8, x, threshold, codes, scale, bias)
    return _with_branch(product, x, threshold, up, down, glu)


def gated_24_linear(
    x: Tensor, threshold: Tensor, values: Tensor, keep: Tensor, index: Tensor | None,
    bias: Tensor | None, up: Tensor | None, down: Tensor | None, rows: int, glu: bool = False,
) -> Tensor:  # fmt: skip
    stored, spans = keep.shape
    product = functools.partial(
        _gated, OUTPUTS24, x, threshold, values, bias, rows, stored, spans, meta=keep, index=index
    )
    return _with_branch(product, x, threshold, up, down, glu)


def int8_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, glu: bool = False
) -> Tensor:
    """codes: as gated_int8_linear."""
    x, tokens, _ = matrix(x, 1)
    bias = addend(bias)
    if tokens <= INT8_TOKENS and is_input_major(codes):
        return _gated_int8(x, None, codes, scale, bias, glu=glu)

    def expand(begin: int, end: int) -> Tensor:
        return int8.decode(codes[begin:end], scale[begin:end], x.dtype)

    return expanded(x, bias, len(codes), expand, glu)


def outputs24_linear(
    x: Tensor, values: Tensor, keep: Tensor, index: Tensor | None, bias: Tensor | None, begin: int,
    end: int,
) -> Tensor:  # fmt: skip
    x, _, columns = matrix(x, 1)
    before = begin % 16  # rows are expanded in spans of 16

    def expand(first: int, last: int) -> Tensor:
        panel = _expand_outputs24(
            values, keep, index, columns, begin - before + first, begin + last
        )
        return panel[before:] if before else panel

    if before:
        return linear(x, expand(0, end - begin).view(x.dtype), bias)
    return expanded(x, bias, end - begin, expand)


def _gated_int8(
    x: Tensor, threshold: Tensor | None, codes: Tensor, scale: Tensor, bias: Tensor | None, *,
    glu: bool,
) -> Tensor:  # fmt: skip
    _check_input_major(codes)
    rows, columns = codes.shape
    stride = codes.stride(1) // 16
    return _gated(INT8, x, threshold, codes, bias, rows, columns, stride, scale=scale, glu=glu)


def _check_input_major(weight: Tensor) -> None:
    if weight.stride(0) != 1 or weight.stride(1) * weight.element_size() % 16:
        raise EnvironmentFault("gated weights on CUDA must be input-major: ops.input_major")


def _gated(
    format: int, x: Tensor, threshold: Tensor | None, weight: Tensor, bias: Tensor | None, rows: int,
    columns: int, stride: int, *, scale: Tensor | None = None, meta: Tensor | None = None,
    index: Tensor | None = None, glu: bool,
) -> Tensor:  # fmt: skip
    """format, stride and the rest: see gated.cu. columns: stored ones."""
    common, limits = threshold, None
    if threshold is not None and threshold.numel() > 1:
        common, limits = None, round_down(threshold, x.dtype)
        if len(limits) % 2:
            limits = pad(limits, (0, 1), value=torch.inf)
    x, tokens, inputs = matrix(x, 2)
    y = output(x, rows, glu)
    if not tokens:
        return y
    device = x.device.index
    shape = gated_shape(format, rows, columns, cuda.architecture(device)[1], cuda.is_hopper(device))
    share = -(-columns // (2 * shape.cluster)) * 2
    if share > 65536:
        raise EnvironmentFault(f"gated weights of {columns} inputs are too wide for the kernel")
    warps, tile = shape.warps, shape.tile
    macros = {
        "FORMAT": format, "WARPS": warps, "TILE": tile, "CLUSTER": shape.cluster,
        "DEPTH": shape.depth, "ITEMS": max(1, -(-share // (64 * warps))), "BLOCKS": shape.blocks,
        "HALF": half(x), "PDL": int(shape.early),
    }  # fmt: skip
    cuda.launch(
        "gated", macros, x,
        (weight, x, common, limits, y, bias, scale, meta, index, rows, columns, inputs, stride,
         int(glu), bias_step(bias)),
        grid=(-(-rows // tile) * shape.cluster, tokens), block=32 * warps,
        shared=4 * share + 4 * warps * tile, cluster=shape.cluster,
    )  # fmt: skip
    return y


def _with_branch(
    product: Callable[..., Tensor], x: Tensor, threshold: Tensor, up: Tensor | None,
    down: Tensor | None, glu: bool,
) -> Tensor:  # fmt: skip
    if up is None or down is None:
        return product(glu=glu)
    dropped = x - torch.ops.llmsqueeze.gate(x, threshold)
    y = product(glu=False) + dropped @ down.t() @ up.t()
    return swiglu(y) if glu else y


@dataclass(frozen=True)
class GatedShape:
    """warps of a block, rows of a tile, blocks of a cluster, loads in flight, blocks to a multiprocessor.

    early: whether to start while the kernel before is still at work.
    """

    warps: int
    tile: int
    cluster: int
    depth: int
    blocks: int = 2
    early: bool = False


def gated_shape(
    format: int, rows: int, columns: int, multiprocessors: int, clusters: bool
) -> GatedShape:
    """On an H100 the fastest of those tried."""
    wide = columns >= 8192
    if not clusters:
        tile = 32
        while tile < 256 and rows // tile > 2 * multiprocessors:
            tile *= 2
        return GatedShape(16, tile, 1, 4, 1 if wide else 2)
    if rows >= 128 * multiprocessors:
        return GatedShape(8, 128, 1, 6, 3)
    if format == OUTPUTS24:
        if rows >= 64 * multiprocessors:
            return GatedShape(16, 128, 1, 4, 2)
        if wide:
            return GatedShape(8, 128, 8, 4, 4)
        if rows > 32 * multiprocessors:
            return GatedShape(8, 256, 8, 6, 3)
        return GatedShape(8, 128, 8, 4, 3, early=True)
    if rows >= 64 * multiprocessors:
        return GatedShape(8, 64, 1, 6, 3)
    if wide:
        return GatedShape(8, 128, 8, 6, 3)
    if rows > 32 * multiprocessors or format == INT8:
        return GatedShape(8, 32, 1, 6, 3)
    return GatedShape(16, 32, 1, 6, 2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, counters: Tensor, scale: float
) -> Tensor:
    """EnvironmentFault where ops.attend_fits() is False."""
    aligned = k.data_ptr() % 16 == 0 and v.data_ptr() % 16 == 0
    enough = counters.numel() >= len(q) * k.shape[1]
    if not (aligned and enough and attend_fits(q, k, v, mask)):
        raise EnvironmentFault(f"attend: no kernel for {tuple(q.shape)} over {tuple(k.shape)}")
    batch, heads, _, width = q.shape
    kv_heads, length = k.shape[1:3]
    group, device = heads // kv_heads, q.device.index
    q = q.contiguous()
    if mask is not None and mask.stride(-1) != 1:
        mask = mask.contiguous()
    y = q.new_empty(batch, 1, heads, width)
    # Blocks for two to a multiprocessor, each with 64 tokens or more.
    most = -(-2 * cuda.architecture(device)[1] // (batch * kv_heads))
    # The last one has room for the shares of so many.
    splits = max(1, min(-(-length // 64), most, 64 + 8 * width))
    shape = (batch * kv_heads * splits, group * (width + 2))
    partial = q.new_empty(shape, dtype=torch.float32) if splits > 1 else None
    macros = {
        "D": width, "GROUP": group, "BLOCKS": 2 if group * width <= 512 else 1, "HALF": half(q),
        "PDL": int(cuda.is_hopper(device)),
    }  # fmt: skip
    strides = (t.stride(d) // 8 for t in (k, v) for d in (0, 1, 2))
    cuda.launch(
        "attend", macros, q,
        (q, k, v, mask, y, partial, counters, scale * _LOG2_E, length, kv_heads, *strides,
         0 if mask is None else mask.stride(0)),
        grid=(splits, batch * kv_heads), block=256, shared=4 * group * (64 + 8 * width),
    )  # fmt: skip
    return y


def _expand_sparse24(
    weight: tuple[Tensor | None, ...], columns: int, chunks: int, begin: int, end: int
) -> Tensor:
    stream = weight[0]
    assert stream is not None
    mixed, rows = _mixed(weight), end - begin
    make = torch.zeros if mixed else torch.empty  # columns of zeros are in no piece
    panel = make(rows, columns, dtype=torch.bfloat16, device=stream.device)
    bands = -(-rows // 16)
    grid, block, shared = (bands, 256, 0) if mixed else (-(-bands * chunks // 2), 64, 2 * 16 * 544)
    early = int(not mixed and cuda.is_hopper(stream.device.index))
    cuda.launch(
        "sparse24_expand", {"MIXED": mixed, "HALF": 0, "PDL": early}, stream,
        (*weight, panel, rows, columns, chunks, begin // 16), grid=(grid, 1), block=block,
        shared=shared,
    )  # fmt: skip
    return panel


def _expand_outputs24(
    values: Tensor, keep: Tensor, index: Tensor | None, columns: int, begin: int, end: int
) -> Tensor:
    """[end - begin, columns], input-major. begin: divisible by 16."""
    stored, spans = keep.shape
    first, count = begin // 16, -(-(end - begin) // 16)
    panel = torch.zeros(columns, 16 * count, dtype=torch.bfloat16, device=values.device)
    cuda.launch(
        "outputs24_expand", {"HALF": 0, "PDL": 0}, values,
        (values, keep, index, panel, stored, spans, first, count),
        grid=(-(-stored * count // 256), 1), block=256, shared=0,
    )  # fmt: skip
    return panel[:, : end - begin].t()
