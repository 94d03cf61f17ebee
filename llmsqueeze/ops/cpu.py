"""Kernels for a CPU: C++ that was built with the package, where there was a compiler.

Functions have the names, arguments and meaning of the operators in ops. isa: a place in INSTRUCTIONS, not
beyond what the machine has [default: the best].
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from llmsqueeze import ops
from llmsqueeze.native import library as library  # of others too: whether there is one
from llmsqueeze.numerics import int8, kv_tiles
from llmsqueeze.ops import layer, packed_attention
from llmsqueeze.ops.scratch import scratch

# Instruction sets of the code in kernels.
INSTRUCTIONS = ("portable", "AVX2", "AVX-512", "AMX")
_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int8: 3}
# Up to so many rows of x meet the weights as they are; beyond, panels of rows are made dense. 16 rows on two
# cores of a Xeon, 4096 × 14336 in bf16: panels 17 ms, as they are 22, by AMX 6.
TOKENS = 16
WIDE_TOKENS = {torch.bfloat16: 8, torch.float16: 8, torch.float32: 16}
AMX_TOKENS = {**WIDE_TOKENS, torch.bfloat16: 32}
# The same behind a gate: more rows would keep different inputs.
GATED_TOKENS = 2


def instructions() -> str | None:
    """The best instruction set that there is code for on this machine; None without kernels."""
    loaded = library()
    return None if loaded is None else INSTRUCTIONS[loaded.llmsqueeze_isa()]


def most_tokens(dtype: torch.dtype) -> int:
    """Rows of x in this dtype that meet weights as they are."""
    return _most(dtype, None)


def bitmask_linear(
    x: Tensor, values: Tensor, mask: Tensor, row_offsets: Tensor, bias: Tensor | None, *,
    isa: int | None = None,
) -> Tensor:  # fmt: skip
    loaded = _library()
    columns, rows = x.shape[-1], len(mask)
    tokens = x.numel() // columns
    values, mask, row_offsets = _whole(values), _whole(mask), _whole(row_offsets)
    if tokens > _most(x.dtype, isa):
        panel = _Expander(loaded, x, values, mask, row_offsets, columns, isa)
        return ops.by_panels(x, rows, bias, panel.rows)
    group = Group([values], [mask], [row_offsets], [_NONE])
    return group.product(x, None, 0.0, bias, None, isa=isa)


def dense_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, isa: int | None = None
) -> Tensor:
    tokens = x.numel() // weight.shape[1]
    if tokens > _most(x.dtype, isa) or not weight.is_contiguous():
        return ops.linear(x, weight, bias)
    group = Group([weight], [_NONE], [_NONE], [_NONE])
    return group.product(x, None, 0.0, bias, None, isa=isa)


def linears(
    x: Tensor, norm: Tensor | None, epsilon: float, values: list[Tensor], masks: list[Tensor],
    row_offsets: list[Tensor], scales: list[Tensor], bias: Tensor | None, residual: Tensor | None,
    glu: bool = False, *, isa: int | None = None,
) -> Tensor:  # fmt: skip
    columns = x.shape[-1]
    if x.numel() > columns * _most(x.dtype, isa):
        return _many_tokens(
            x, norm, epsilon, values, masks, row_offsets, scales, bias, residual, glu, isa
        )
    group = Group(values, masks, row_offsets, scales)
    return group.product(x, norm, epsilon, bias, residual, glu, isa=isa)


class Group:
    """Weights of linears() made ready once: calls cost little. Few tokens only, see most_tokens()."""

    def __init__(
        self, values: list[Tensor], masks: list[Tensor], row_offsets: list[Tensor],
        scales: list[Tensor],
    ) -> None:  # fmt: skip
        # Copies of what is not in one piece live as long as the addresses.
        self._parts = [
            (_whole(part), *(_whole(p) if p.numel() else None for p in rest))
            for part, *rest in zip(values, masks, row_offsets, scales, strict=True)
        ]
        self._weights = (_Weight * len(values))(*(_weight(*part) for part in self._parts))
        self._rows = sum(weight.rows for weight in self._weights)
        self._kind = _KINDS[values[0].dtype]
        self._call = _library().llmsqueeze_linears

    def product(
        self, x: Tensor, norm: Tensor | None, epsilon: float, bias: Tensor | None,
        residual: Tensor | None, glu: bool = False, *, isa: int | None = None,
    ) -> Tensor:  # fmt: skip
        """As linears(): [..., out] in x's dtype."""
        seen, offset, added, factors = _seen(x), _fp32(bias), _fp32(residual), _fp32(norm)
        *batch, columns = x.shape
        y = torch.empty(*batch, self._weights[0].rows if glu else self._rows)
        self._call(
            self._weights, len(self._weights), _address(factors), epsilon, _address(offset),
            _address(added), seen.data_ptr(), y.data_ptr(), columns, x.numel() // columns,
            self._kind, glu, _best(isa), torch.get_num_threads(),
        )  # fmt: skip
        return y if x.dtype is torch.float32 else y.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    heads, width = x.shape[-2:]
    if x.dtype is not torch.float32 or x.stride()[-2:] != (width, 1) or not _flat(x):
        x = x.float().contiguous()
    turns, sines = _seen(cos), _seen(sin)
    y = torch.empty(x.shape)
    _library().llmsqueeze_rotate(
        x.data_ptr(), x.stride(-3), turns.data_ptr(), sines.data_ptr(), turns.numel() // width,
        y.data_ptr(), x.numel() // (heads * width), heads, width,
    )  # fmt: skip
    return y if cos.dtype is torch.float32 else y.to(cos.dtype)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, counters: Tensor, scale: float, *,
    isa: int | None = None,
) -> Tensor:  # fmt: skip
    if not attend_fits(q, k, v, mask):
        return ops.attend(q, k, v, mask, counters, scale)
    loaded, (batch, heads, _, width) = _library(), q.shape
    kv_heads, length = k.shape[1:3]
    seen, y = _seen(q), torch.empty(batch, 1, heads, width)
    if mask is not None:
        mask = mask.expand(batch, 1, 1, length)
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    strides = ctypes.c_int64 * 3
    loaded.llmsqueeze_attend(
        seen.data_ptr(), k.data_ptr(), strides(*k.stride()[:3]), v.data_ptr(),
        strides(*v.stride()[:3]), _address(mask), 0 if mask is None else mask.stride(0),
        y.data_ptr(), batch, heads, kv_heads, length, width, scale, _KINDS[k.dtype],
        _best(isa), torch.get_num_threads(),
    )  # fmt: skip
    return y if q.dtype is torch.float32 else y.to(q.dtype)


def attend_fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether attend has code for this: one token, a cache whose heads' tokens lie in one piece each."""
    return (
        q.shape[2] == 1
        and k.shape == v.shape
        and k.shape[-1] == q.shape[-1]
        and q.dtype == k.dtype == v.dtype
        and q.dtype in _KINDS
        and k.stride(-1) == v.stride(-1) == 1
        and (mask is None or (mask.dtype == torch.bool and mask.shape[1:3] == (1, 1)))
    )


def gated_linear(
    x: Tensor, threshold: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor | None,
    down: Tensor | None, glu: bool = False, *, isa: int | None = None,
) -> Tensor:  # fmt: skip
    if not _gated_fits(x, weight):
        return ops.gated_linear(x, threshold, weight, bias, up, down, glu)
    y = _input_major(x, threshold, weight, None, bias, isa)
    return _finished(y, x, threshold, up, down, glu)


def gated_int8_linear(
    x: Tensor, threshold: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None,
    up: Tensor | None, down: Tensor | None, glu: bool = False, *, isa: int | None = None,
) -> Tensor:  # fmt: skip
    if not _gated_fits(x, codes):
        return ops.gated_int8_linear(x, threshold, codes, scale, bias, up, down, glu)
    y = _input_major(x, threshold, codes, scale, bias, isa)
    return _finished(y, x, threshold, up, down, glu)


def int8_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, glu: bool = False, *,
    isa: int | None = None,
) -> Tensor:  # fmt: skip
    if _gated_fits(x, codes):
        y = _input_major(x, _NONE_DROPPED, codes, scale, bias, isa).to(x.dtype)
    else:
        y = ops.by_panels(
            x, len(codes), bias,
            lambda begin, end: int8.decode(codes[begin:end], scale[begin:end], x.dtype),
        )  # fmt: skip
    return ops.swiglu(y) if glu else y


def gated_bitmask_linear(
    x: Tensor, threshold: Tensor, values: Tensor, mask: Tensor, row_offsets: Tensor, bias: Tensor | None,
    up: Tensor | None, down: Tensor | None, rows: int, glu: bool = False, *, isa: int | None = None,
) -> Tensor:  # fmt: skip
    loaded, columns = _library(), x.shape[-1]
    tokens = x.numel() // columns
    if tokens > GATED_TOKENS:
        return ops.gated_bitmask_linear(
            x, threshold, values, mask, row_offsets, bias, up, down, rows, glu
        )
    residual, bias = (bias, None) if bias is not None and bias.dim() > 1 else (None, bias)
    seen, limit, offset = _seen(x), _seen(threshold), _fp32(bias)
    parts = _whole(values), _whole(mask), _whole(row_offsets)
    y = torch.empty(*x.shape[:-1], rows)
    loaded.llmsqueeze_gated_bitmask_linear(
        *(part.data_ptr() for part in parts), 8 * mask.shape[2], limit.data_ptr(), len(limit),
        _address(offset), seen.data_ptr(), y.data_ptr(), rows, columns, tokens,
        _KINDS[values.dtype], _best(isa), torch.get_num_threads(),
    )  # fmt: skip
    if residual is not None:
        y += residual
    return _finished(y, x, threshold, up, down, glu)


def panels_linear(
    x: Tensor, values: Tensor, mask: Tensor, row_offsets: Tensor, bias: Tensor | None, begin: int,
    end: int, *, isa: int | None = None,
) -> Tensor:  # fmt: skip
    loaded = _library()
    _, columns, eighth = mask.shape
    width = 8 * eighth
    runs = mask.reshape(-1, eighth)
    panel = _Expander(loaded, x, values.contiguous(), runs, row_offsets.contiguous(), width, isa)
    y = x.new_empty(*x.shape[:-1], end - begin)
    for index in range(begin // width, -(-end // width)):
        first, last = max(begin, index * width), min(end, (index + 1) * width)
        # [columns, width]: of this panel, every input's weights.
        weight = panel.rows(index * columns, (index + 1) * columns).to(x.dtype)
        part = weight[:, first - index * width : last - index * width]
        offset = None if bias is None else bias[first - begin : last - begin]
        y[..., first - begin : last - begin] = torch.nn.functional.linear(x, part.t(), offset)
    return y


def kv_attend(
    q: Tensor, tiles: Tensor, length: Tensor, padding: Tensor | None, books: Tensor | None,
    channels: Tensor | None, inverse: Tensor | None, angles: Tensor | None, steps: Tensor | None,
    key_sinks: Tensor | None, value_sinks: Tensor | None, counters: Tensor, format: list[int],
    window: int, scale: float, skip: float = 0.0, *, isa: int | None = None,
) -> Tensor:  # fmt: skip
    """ValueError where tiles or angles are of fewer tokens than the length."""
    loaded, tokens = _library(), int(length)
    batch, heads, _, width = q.shape
    kv_heads = tiles.shape[1]
    _check_tiles(tiles, format, tokens, angles, window, batch, kv_heads, width)
    if key_sinks is not None and value_sinks is not None and key_sinks.dtype != value_sinks.dtype:
        raise ValueError("kv_attend: sinks of two dtypes")
    tiles = _whole(tiles)
    seen, sinks = _seen(q), [None if s is None else _whole(s) for s in (key_sinks, value_sinks)]
    start = None if padding is None else _whole(padding.int())
    given = [None if t is None else _whole(t) for t in (books, channels, inverse, angles)]
    y = torch.empty(batch, 1, heads, width)
    loaded.llmsqueeze_kv_attend(
        seen.data_ptr(), tiles.data_ptr(), tokens, _address(start),
        *(_address(t) for t in (*given, *sinks)), y.data_ptr(), _fields(format), batch, kv_heads,
        heads // kv_heads, tiles.shape[2], 0 if key_sinks is None else key_sinks.shape[2], window,
        scale, skip, 0 if key_sinks is None else _KINDS[key_sinks.dtype], _best(isa),
        torch.get_num_threads(),
    )  # fmt: skip
    return y if q.dtype is torch.float32 else y.to(q.dtype)


def kv_append(
    key: Tensor, value: Tensor, tiles: Tensor, length: Tensor, padding: Tensor | None,
    books: Tensor | None, offset: Tensor | None, scale: Tensor | None, order: Tensor | None,
    steps: Tensor | None, angles: Tensor | None, key_sinks: Tensor | None, value_sinks: Tensor | None,
    format: list[int], window: int = 0,
) -> None:  # fmt: skip
    """ValueError as for kv_attend, and where tiles or sinks could not be written in place."""
    tokens = int(length)
    batch, heads, _, width = key.shape
    _check_tiles(tiles, format, tokens, angles, window, batch, heads, width)
    written = [t for t in (tiles, key_sinks, value_sinks) if t is not None]
    if not all(t.is_contiguous() for t in written) or any(
        s.dtype != key.dtype for s in written[1:]
    ):
        raise ValueError("kv_append: tiles and sinks in one piece, sinks of the key's dtype")
    count = key.shape[2]
    # Token after token: [tokens, batch, heads, D].
    key, value = (_whole(x.to(key.dtype).permute(2, 0, 1, 3)) for x in (key, value))
    start = None if padding is None else _whole(padding.int())
    given = [None if t is None else _whole(t) for t in (books, offset, scale, order, steps, angles)]
    for index in range(count):
        _library().llmsqueeze_kv_append(
            key[index].data_ptr(), value[index].data_ptr(), tiles.data_ptr(), tokens - count + index,
            _address(start), *(_address(t) for t in (*given, key_sinks, value_sinks)),
            _fields(format), batch, heads, tiles.shape[2],
            0 if key_sinks is None else key_sinks.shape[2], 0 if steps is None else steps.shape[1],
            _KINDS[key.dtype],
        )  # fmt: skip


def _check_tiles(
    tiles: Tensor, format: list[int], tokens: int, angles: Tensor | None, window: int, batch: int,
    kv_heads: int, width: int,
) -> None:  # fmt: skip
    form, capacity = kv_tiles.TileFormat.from_arguments(format), tiles.shape[2]
    fine = form.width == width and width in kv_tiles.WIDTHS
    fine &= tiles.shape[:2] == (batch, kv_heads) and tiles.shape[3] == form.record
    fine &= max(form.key_slots, form.value_slots) <= kv_tiles.MOST_SLOTS
    ring = window and capacity >= packed_attention.ring_tiles(window)
    if not fine or tokens < 1 or not (ring or tokens <= kv_tiles.TOKENS * capacity):
        raise ValueError(f"{tokens} tokens in tiles {tuple(tiles.shape)}: they do not fit {form}")
    needed = max(capacity, -(-tokens // kv_tiles.TOKENS))
    if angles is not None and len(angles) < kv_tiles.TOKENS + needed:
        raise ValueError(f"angles of {len(angles)} rows for {needed} tiles")


def _fields(format: list[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(format))(*format)


class _Expander:
    """Makes rows of a bitmask dense, in one buffer: what rows() returned last is overwritten."""

    def __init__(
        self, loaded: ctypes.CDLL, x: Tensor, values: Tensor, mask: Tensor, row_offsets: Tensor,
        columns: int, isa: int | None,
    ) -> None:  # fmt: skip
        self._loaded, self._isa = loaded, _best(isa)
        self._values, self._mask, self._row_offsets = values, mask, row_offsets
        self._columns = columns
        self._dtype = values.dtype if values.dtype == x.dtype else torch.float32

    def rows(self, begin: int, end: int) -> Tensor:
        weight = scratch(end - begin, self._columns, self._dtype, keep=ops.PANEL)
        self._loaded.llmsqueeze_bitmask_expand(
            self._values.data_ptr(), self._mask[begin:].data_ptr(),
            self._row_offsets[begin:].data_ptr(), weight.data_ptr(), end - begin, self._columns,
            len(self._values), _KINDS[self._values.dtype], self._dtype == torch.float32, self._isa,
            torch.get_num_threads(),
        )  # fmt: skip
        return weight


class _Weight(ctypes.Structure):
    """As bitmask.cpp knows it."""

    _fields_ = (
        ("values", ctypes.c_void_p), ("mask", ctypes.c_void_p), ("offsets", ctypes.c_void_p),
        ("scale", ctypes.c_void_p), ("rows", ctypes.c_int64),
    )  # fmt: skip


def _weight(
    values: Tensor, mask: Tensor | None, row_offsets: Tensor | None, scale: Tensor | None
) -> _Weight:
    rows = len(values if mask is None else mask)
    return _Weight(values.data_ptr(), _address(mask), _address(row_offsets), _address(scale), rows)


def _many_tokens(
    x: Tensor, norm: Tensor | None, epsilon: float, values: list[Tensor], masks: list[Tensor],
    row_offsets: list[Tensor], scales: list[Tensor], bias: Tensor | None, residual: Tensor | None,
    glu: bool, isa: int | None,
) -> Tensor:  # fmt: skip
    """linears() where weights are made dense, one after another."""
    x = x if norm is None else layer.rms_norm(x, norm, epsilon)
    found = []
    for part, mask, starts, scale in zip(values, masks, row_offsets, scales, strict=True):
        if mask.numel():
            found.append(bitmask_linear(x, part, mask, starts, None, isa=isa))
        elif scale.numel():
            found.append(_row_major_int8(x, part, scale))
        else:
            found.append(dense_linear(x, part, None, isa=isa))
    return layer.combined(found, bias, residual, glu)


def _row_major_int8(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """W x for W as it lies on disk."""
    return ops.by_panels(
        x, len(codes), None,
        lambda begin, end: int8.decode(codes[begin:end], scale[begin:end], x.dtype),
    )  # fmt: skip


def _flat(x: Tensor) -> bool:
    """Whether tokens [..., heads, width] of a tensor lie at equal distances."""
    return all(
        x.stride(d) == x.stride(d + 1) * x.shape[d + 1]
        for d in range(x.dim() - 3)
        if x.shape[d] > 1
    )


_NONE = torch.empty(0)
# No magnitude is below.
_NONE_DROPPED = torch.full((1,), -1.0)


def _gated_fits(x: Tensor, weight: Tensor) -> bool:
    """Whether there is code for this: few tokens, each input's weights in one piece."""
    few = x.numel() <= GATED_TOKENS * x.shape[-1]
    return few and weight.stride(0) == 1


def _input_major(
    x: Tensor, threshold: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None,
    isa: int | None,
) -> Tensor:  # fmt: skip
    """scale · W gate(x) + bias, in fp32. bias: [out], or [..., out] of every token."""
    if bias is not None and bias.dim() > 1:
        return _input_major(x, threshold, weight, scale, None, isa).add_(bias)
    loaded = _library()
    rows, columns = weight.shape
    seen, limit = _seen(x), _seen(threshold)
    offset, step = _fp32(bias), _fp32(scale)
    y = torch.empty(*x.shape[:-1], rows)
    loaded.llmsqueeze_gated_linear(
        weight.data_ptr(), weight.stride(1), limit.data_ptr(), len(limit), _address(step),
        _address(offset), seen.data_ptr(), y.data_ptr(), rows, columns, x.numel() // columns,
        _KINDS[weight.dtype], _best(isa), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _finished(
    y: Tensor, x: Tensor, threshold: Tensor, up: Tensor | None, down: Tensor | None, glu: bool
) -> Tensor:
    """y in x's dtype, with what the gate dropped by the low-rank branch, and the activation."""
    if up is not None and down is not None:
        y += (x - ops.gate(x, threshold)) @ down.t() @ up.t()
    return (ops.swiglu(y) if glu else y).to(x.dtype)


def _library() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None, "operators ask before they come here"
    return loaded


def _most(dtype: torch.dtype, isa: int | None) -> int:
    """Rows of x that kernels take; all that they can, if instructions are asked for."""
    best = "" if isa is not None else INSTRUCTIONS[_best(None)]
    return {"AVX-512": WIDE_TOKENS, "AMX": AMX_TOKENS}.get(best, {}).get(dtype, TOKENS)


def _best(isa: int | None) -> int:
    return _isa() if isa is None else isa


@functools.cache
def _isa() -> int:
    return int(_library().llmsqueeze_isa())


def _fp32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _seen(tensor)


def _seen(x: Tensor) -> Tensor:
    """x in fp32 and in one piece. Asking costs less than a call that changes nothing."""
    x = x if x.dtype is torch.float32 else x.float()
    return x if x.is_contiguous() else x.contiguous()


def _whole(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
