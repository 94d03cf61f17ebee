"""The operators of llmsqueeze. Their reference, in plain torch, is their specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmsqueeze.numerics import gaps, int8, mixed24, outputs24, panels, sparse24
from llmsqueeze.numerics.packing import unpack_bitmask
from llmsqueeze.ops import layer, packed_append, packed_attention
from llmsqueeze.ops.layer import linears, linears_shape, rotate, rotate_shape
from llmsqueeze.ops.packed_append import kv_append, kv_append_shape
from llmsqueeze.ops.packed_attention import kv_attend, kv_attend_shape

# Bytes of a weight that are made dense together where it is not meant to be whole.
PANEL = 16 * 2**20

_LIBRARY = torch.library.Library("llmsqueeze", "DEF")
_LIBRARY.define("gate(Tensor x, Tensor threshold) -> Tensor")
_LIBRARY.define(
    "gated_linear(Tensor x, Tensor threshold, Tensor weight, Tensor? bias, Tensor? up, Tensor? down,"
    " bool glu=False) -> Tensor"
)
_LIBRARY.define(
    "gated_int8_linear(Tensor x, Tensor threshold, Tensor codes, Tensor scale, Tensor? bias, Tensor? up,"
    " Tensor? down, bool glu=False) -> Tensor"
)
_LIBRARY.define(
    "gated_24_linear(Tensor x, Tensor threshold, Tensor values, Tensor keep, Tensor? index, Tensor? bias,"
    " Tensor? up, Tensor? down, int rows, bool glu=False) -> Tensor"
)
_LIBRARY.define(
    "int8_linear(Tensor x, Tensor codes, Tensor scale, Tensor? bias, bool glu=False) -> Tensor"
)
_LIBRARY.define(
    "outputs24_linear(Tensor x, Tensor values, Tensor keep, Tensor? index, Tensor? bias, int begin,"
    " int end) -> Tensor"
)
_LIBRARY.define(
    "mixed24_linear(Tensor x, Tensor stream, Tensor entries, Tensor metadata, Tensor starts, Tensor? bias,"
    " int rows, bool glu=False) -> Tensor"
)
_LIBRARY.define(
    "sparse24_linear(Tensor x, Tensor stream, Tensor? bias, int rows, bool glu=False) -> Tensor"
)
_LIBRARY.define(
    "gap_linear(Tensor x, Tensor stream, Tensor starts, Tensor first, Tensor? order, Tensor? bias,"
    " int rows, int bits, int parts, int warps, int turns, int reach, int[] spans,"
    " bool glu=False) -> Tensor"
)
_LIBRARY.define(
    "bitmask_linear(Tensor x, Tensor values, Tensor mask, Tensor row_offsets, Tensor? bias) -> Tensor"
)
_LIBRARY.define("dense_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.define(
    "gated_bitmask_linear(Tensor x, Tensor threshold, Tensor values, Tensor mask, Tensor row_offsets,"
    " Tensor? bias, Tensor? up, Tensor? down, int rows, bool glu=False) -> Tensor"
)
_LIBRARY.define(
    "panels_linear(Tensor x, Tensor values, Tensor mask, Tensor row_offsets, Tensor? bias, int begin,"
    " int end) -> Tensor"
)
_LIBRARY.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor counters, float scale) -> Tensor"
)
_LIBRARY.define(packed_attention.SCHEMA)
_LIBRARY.define(packed_append.SCHEMA)
_LIBRARY.define(layer.LINEARS)
_LIBRARY.define(layer.ROTATE)


def gate(x: Tensor, threshold: Tensor) -> Tensor:
    """x where |x_j| > threshold_j, compared in fp32, else 0.

    x: [..., in], any float dtype; threshold: [in], or [1] for all, fp32 or what round_down makes of it for
    x's dtype; -1 keeps all, inf none. NaN, and infinity that would be dropped, come out as NaN: they show
    instead of vanishing.
    """
    return keep_above(x, round_down(threshold, x.dtype))


def keep_above(x: Tensor, limit: Tensor) -> Tensor:
    """gate() with a threshold that is already in x's dtype; see round_down."""
    if x.requires_grad:
        return x * (x.abs() > limit)
    # Comparing into the result's own dtype and multiplying is vectorised; selecting by a boolean mask
    # is not, and took ten times as long on a CPU.
    return torch.gt(x.abs(), limit, out=torch.empty_like(x)).mul_(x)


def round_down(threshold: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest values of `dtype` up to these fp32 thresholds: numbers of that dtype exceed both or none.

    Negative thresholds may round up, but stay negative, and every magnitude exceeds them.
    """
    rounded = threshold.to(dtype)
    if dtype.itemsize >= threshold.dtype.itemsize:
        return rounded
    # One step down is one less in the bits of a positive float.
    above = (rounded.to(threshold.dtype) > threshold) & (rounded > 0)
    return (rounded.view(torch.int16) - above.to(torch.int16)).view(dtype)


def gated_linear(
    x: Tensor,
    threshold: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    down: Tensor | None,
    glu: bool = False,
) -> Tensor:
    """W gate(x) + b, and for what the gate dropped the low-rank branch up · down · (x - gate(x)).

    weight: [out, in]; bias: [out], or a residual of every token, [..., out], or None; up: [out, rank] and
    down: [rank, in], both or neither. Everything but the threshold, and on a CPU the weight, in x's dtype.
    Returns [..., out], or with glu what swiglu() makes of that. Of bias and glu so for all operators that
    have glu.
    """
    kept = gate(x, threshold)
    y = linear(kept, weight, bias)
    if up is not None and down is not None:
        y = y + (x - kept) @ down.t() @ up.t()
    return swiglu(y) if glu else y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W x + b; b: [out], or [..., out] of every token.

    A weight of another dtype becomes x's a panel of rows at a time, never the whole matrix.
    """
    if bias is not None and bias.dim() > 1:
        return linear(x, weight, None) + bias
    if weight.dtype == x.dtype:
        return torch.nn.functional.linear(x, weight, bias)
    return by_panels(x, weight.shape[0], bias, lambda begin, end: weight[begin:end])


def by_panels(
    x: Tensor, rows: int, bias: Tensor | None, part: Callable[[int, int], Tensor]
) -> Tensor:
    """W x + b where W, of so many rows, exists PANEL bytes at a time: part(begin, end) gives some."""
    if bias is not None and bias.dim() > 1:
        return by_panels(x, rows, None, part) + bias
    panel = max(1, PANEL // (x.element_size() * x.shape[-1]))
    if rows <= panel:
        return torch.nn.functional.linear(x, part(0, rows).to(x.dtype), bias)
    y = x.new_empty(*x.shape[:-1], rows)
    # Outputs of a long text are many: BLAS can put them where they belong, in fp32.
    placed = x.device.type == "cpu" and x.dtype == torch.float32
    flat = x.reshape(-1, x.shape[-1])
    for begin in range(0, rows, panel):
        end = min(begin + panel, rows)
        weight, offset = part(begin, end).to(x.dtype), None if bias is None else bias[begin:end]
        if not placed:
            y[..., begin:end] = torch.nn.functional.linear(x, weight, offset)
        elif offset is None:
            torch.mm(flat, weight.t(), out=y.view(-1, rows)[:, begin:end])
        else:
            torch.addmm(offset, flat, weight.t(), out=y.view(-1, rows)[:, begin:end])
    return y


def swiglu(y: Tensor) -> Tensor:
    """[..., 2 n] → [..., n]: silu(gate) · up, of 8 gates, then 8 ups, then 8 gates, ….

    n: divisible by 8. The order lets a kernel find the two that belong together beside one another, before
    they are rounded.
    """
    gate, up = y.unflatten(-1, (-1, 2, 8)).unbind(-2)
    return (torch.nn.functional.silu(gate) * up).flatten(-2)


def in_pairs(gate: Tensor, up: Tensor) -> Tensor:
    """[2 n, ...]: the rows of two [n, ...] tensors in the order that swiglu() expects."""
    return torch.stack([gate.unflatten(0, (-1, 8)), up.unflatten(0, (-1, 8))], dim=1).flatten(0, 2)


def gated_int8_linear(
    x: Tensor, threshold: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None,
    up: Tensor | None, down: Tensor | None, glu: bool = False,
) -> Tensor:  # fmt: skip
    """gated_linear for W as numerics.int8.encode gives it: codes [out, in] int8, scale [out] fp32."""
    weight = int8.decode(codes, scale, x.dtype)
    return gated_linear(x, threshold, weight, bias, up, down, glu)


def gated_24_linear(
    x: Tensor, threshold: Tensor, values: Tensor, keep: Tensor, index: Tensor | None, bias: Tensor | None,
    up: Tensor | None, down: Tensor | None, rows: int, glu: bool = False,
) -> Tensor:  # fmt: skip
    """gated_linear for W [rows, in] as numerics.outputs24.pack gives it."""
    weight = outputs24.unpack(outputs24.Columns(values, keep, index), rows, x.shape[-1])
    return gated_linear(x, threshold, weight, bias, up, down, glu)


def int8_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, glu: bool = False
) -> Tensor:
    """W x + b for W as numerics.int8.encode gives it. x: [..., columns]; returns [..., rows]."""
    y = linear(x, int8.decode(codes, scale, x.dtype), bias)
    return swiglu(y) if glu else y


def outputs24_linear(
    x: Tensor, values: Tensor, keep: Tensor, index: Tensor | None, bias: Tensor | None, begin: int,
    end: int,
) -> Tensor:  # fmt: skip
    """Rows begin to end of W x, + bias [end - begin], for W as numerics.outputs24.pack gives it.

    What many tokens at once take: no input is skipped.
    """
    weight = outputs24.unpack(outputs24.Columns(values, keep, index), end, x.shape[-1])
    return torch.nn.functional.linear(x, weight[begin:], bias)


def input_major(weight: Tensor) -> Tensor:
    """The same [rows, columns] matrix, laid out so that each column lies in one piece, padded to 16 bytes.

    What the CUDA kernels behind gates read: they skip whole columns. Of int8 or a 16-bit float.
    """
    rows, columns = weight.shape
    span = 16 // weight.element_size()
    stored = weight.new_zeros(columns, -(-rows // span) * span)
    stored[:, :rows] = weight.t()
    return stored[:, :rows].t()


def is_input_major(weight: Tensor) -> bool:
    """Whether a matrix is laid out as input_major lays it out."""
    piece = weight.stride(1) * weight.element_size()
    return weight.stride(0) == 1 and piece % 16 == 0 and weight.data_ptr() % 16 == 0


def sparse24_linear(
    x: Tensor, stream: Tensor, bias: Tensor | None, rows: int, glu: bool = False
) -> Tensor:
    """W x + b for W as numerics.sparse24.pack lays it out. x: [..., columns]; returns [..., rows]."""
    y = linear(x, sparse24.unpack(stream, rows, x.shape[-1], x.dtype), bias)
    return swiglu(y) if glu else y


def mixed24_linear(
    x: Tensor, stream: Tensor, entries: Tensor, metadata: Tensor, starts: Tensor,
    bias: Tensor | None, rows: int, glu: bool = False,
) -> Tensor:  # fmt: skip
    """W x + b for W as numerics.mixed24.pack lays it out. x: [..., columns]; returns [..., rows]."""
    packed = mixed24.Mixed(stream, entries, metadata, starts)
    y = linear(x, mixed24.unpack(packed, rows, x.shape[-1], x.dtype), bias)
    return swiglu(y) if glu else y


def gap_linear(
    x: Tensor, stream: Tensor, starts: Tensor, first: Tensor, order: Tensor | None, bias: Tensor | None,
    rows: int, bits: int, parts: int, warps: int, turns: int, reach: int, spans: list[int],
    glu: bool = False,
) -> Tensor:  # fmt: skip
    """W x + b for W as numerics.gaps.pack lays it out. x: [..., columns]; returns [..., rows].

    order: None where rows are in their own order; the rest: the fields of Gaps.
    """
    if order is None:
        order = torch.arange((len(first) - 1) * (gaps.LANES // parts), device=x.device)
        order[rows:] = -1
    shape = gaps.Shape(bits, parts, warps)
    packed = gaps.Gaps(shape, stream, starts, first, order, turns, reach, tuple(spans))
    y = linear(x, gaps.unpack(packed, rows, x.shape[-1], x.dtype), bias)
    return swiglu(y) if glu else y


def bitmask_linear(
    x: Tensor, values: Tensor, mask: Tensor, row_offsets: Tensor, bias: Tensor | None
) -> Tensor:
    """W x + b for W as numerics.packing.pack_bitmask gives it, of 16 bits or fp32 whatever x is.

    x: [..., columns], float; bias: [rows] in x's dtype or None; returns [..., rows] in x's dtype.
    """
    weight = unpack_bitmask(values, mask, row_offsets, x.shape[-1]).to(x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W x + b for W of 16 bits or fp32 whatever x is."""
    return linear(x, weight, bias)


def gated_bitmask_linear(
    x: Tensor, threshold: Tensor, values: Tensor, mask: Tensor, row_offsets: Tensor, bias: Tensor | None,
    up: Tensor | None, down: Tensor | None, rows: int, glu: bool = False,
) -> Tensor:  # fmt: skip
    """gated_linear for W [rows, in] as numerics.panels.pack gives it, of 16 bits or fp32 whatever x is."""
    weight = panels.unpack(panels.Panels(values, mask, row_offsets), rows).to(x.dtype)
    return gated_linear(x, threshold, weight, bias, up, down, glu)


def panels_linear(
    x: Tensor, values: Tensor, mask: Tensor, row_offsets: Tensor, bias: Tensor | None, begin: int, end: int
) -> Tensor:  # fmt: skip
    """Rows begin to end of W x, + bias [end - begin], for W as numerics.panels.pack gives it."""
    weight = panels.unpack(panels.Panels(values, mask, row_offsets), end).to(x.dtype)
    return torch.nn.functional.linear(x, weight[begin:], bias)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, counters: Tensor, scale: float
) -> Tensor:
    """One new token's attention over its cache, grouped queries included.

    q: [batch, heads, 1, width]; k, v: [batch, kv heads, length, width]; mask: [batch, 1, 1, length] bool,
    True where a token is seen, or None: all are. counters: int32, zeros that the kernel works with and
    leaves zero; at least batch · kv heads. Returns [batch, 1, heads, width].
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return y.transpose(1, 2).contiguous()


def attend_fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether attend has a CUDA kernel for this: 16 bits, heads to 256 wide, up to 8 queries to a kv head."""
    width, group = q.shape[-1], q.shape[1] // k.shape[1]
    return (
        q.shape[2] == 1
        and k.shape == v.shape
        and k.shape[-1] == width
        and width % 8 == 0
        and width <= 256
        and group <= 8
        and group * width <= 1024
        and q.dtype == k.dtype == v.dtype
        and q.dtype in (torch.bfloat16, torch.float16)
        and all(t.stride(-1) == 1 and t.stride(d) % 8 == 0 for t in (k, v) for d in (0, 1, 2))
        and (mask is None or (mask.dtype == torch.bool and mask.shape[1:3] == (1, 1)))
    )


def _attend_shape(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, counters: Tensor, scale: float
) -> Tensor:
    return q.new_empty(q.shape[0], 1, q.shape[1], q.shape[3])


def _like(x: Tensor, rows: int, glu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows // 2 if glu else rows)


def _gate_shape(x: Tensor, threshold: Tensor) -> Tensor:
    return torch.empty_like(x)


def _gated_linear_shape(
    x: Tensor,
    threshold: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    down: Tensor | None,
    glu: bool = False,
) -> Tensor:
    return _like(x, weight.shape[0], glu)


def _int8_shape(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, glu: bool = False
) -> Tensor:
    return _like(x, codes.shape[0], glu)


def _gated_int8_shape(
    x: Tensor, threshold: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None,
    up: Tensor | None, down: Tensor | None, glu: bool = False,
) -> Tensor:  # fmt: skip
    return _like(x, codes.shape[0], glu)


def _gated_24_shape(
    x: Tensor, threshold: Tensor, values: Tensor, keep: Tensor, index: Tensor | None, bias: Tensor | None,
    up: Tensor | None, down: Tensor | None, rows: int, glu: bool = False,
) -> Tensor:  # fmt: skip
    return _like(x, rows, glu)


def _outputs24_shape(
    x: Tensor, values: Tensor, keep: Tensor, index: Tensor | None, bias: Tensor | None, begin: int,
    end: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], end - begin)


def _sparse24_shape(
    x: Tensor, stream: Tensor, bias: Tensor | None, rows: int, glu: bool = False
) -> Tensor:
    return _like(x, rows, glu)


def _mixed24_shape(
    x: Tensor, stream: Tensor, entries: Tensor, metadata: Tensor, starts: Tensor,
    bias: Tensor | None, rows: int, glu: bool = False,
) -> Tensor:  # fmt: skip
    return _like(x, rows, glu)


def _gap_shape(
    x: Tensor, stream: Tensor, starts: Tensor, first: Tensor, order: Tensor | None, bias: Tensor | None,
    rows: int, bits: int, parts: int, warps: int, turns: int, reach: int, spans: list[int],
    glu: bool = False,
) -> Tensor:  # fmt: skip
    return _like(x, rows, glu)


def _bitmask_shape(
    x: Tensor, values: Tensor, mask: Tensor, row_offsets: Tensor, bias: Tensor | None
) -> Tensor:
    return _like(x, mask.shape[0], False)


def _dense_shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _like(x, weight.shape[0], False)


def _gated_bitmask_shape(
    x: Tensor, threshold: Tensor, values: Tensor, mask: Tensor, row_offsets: Tensor, bias: Tensor | None,
    up: Tensor | None, down: Tensor | None, rows: int, glu: bool = False,
) -> Tensor:  # fmt: skip
    return _like(x, rows, glu)


def _panels_shape(
    x: Tensor, values: Tensor, mask: Tensor, row_offsets: Tensor, bias: Tensor | None, begin: int, end: int
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], end - begin)


def _on_cpu(function: Any) -> Any:
    """The kernel of an operator, or its reference where none was built."""

    def run(*arguments: Any) -> Tensor:
        from llmsqueeze.ops import cpu

        built = cpu.library() is not None
        return (getattr(cpu, function.__name__) if built else function)(*arguments)

    return run


def _on_cuda(function: Any) -> Any:
    """The kernel of an operator; its module is loaded when it is first needed."""

    def run(*arguments: Any) -> Tensor:
        from llmsqueeze.ops import kernels

        return getattr(kernels, function.__name__)(*arguments)

    return run


_CUDA, _CPU = ("CUDA", _on_cuda), ("CPU", _on_cpu)
# A gate is a line of torch on every device. The others run their reference where they have no kernel.
_LIBRARY.impl("gate", gate, "CompositeExplicitAutograd")
torch.library.register_fake("llmsqueeze::gate", _gate_shape, lib=_LIBRARY)
for _function, _shape, *_kernels in (
    (gated_linear, _gated_linear_shape, _CUDA, _CPU),
    (gated_int8_linear, _gated_int8_shape, _CUDA, _CPU),
    (gated_24_linear, _gated_24_shape, _CUDA),
    (int8_linear, _int8_shape, _CUDA, _CPU),
    (outputs24_linear, _outputs24_shape, _CUDA),
    (sparse24_linear, _sparse24_shape, _CUDA),
    (mixed24_linear, _mixed24_shape, _CUDA),
    (gap_linear, _gap_shape, _CUDA),
    (attend, _attend_shape, _CUDA, _CPU),
    (kv_attend, kv_attend_shape, _CUDA, _CPU),
    (kv_append, kv_append_shape, _CUDA, _CPU),
    (bitmask_linear, _bitmask_shape, _CPU),
    (dense_linear, _dense_shape, _CPU),
    (linears, linears_shape, _CPU),
    (rotate, rotate_shape, _CPU),
    (gated_bitmask_linear, _gated_bitmask_shape, _CPU),
    (panels_linear, _panels_shape, _CPU),
):
    _name = _function.__name__
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    for _key, _kernel in _kernels:
        _LIBRARY.impl(_name, _kernel(_function), _key)
    torch.library.register_fake(f"llmsqueeze::{_name}", _shape, lib=_LIBRARY)
