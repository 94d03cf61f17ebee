"""Kernels for a CPU: C++ that was built with the package, where there was a compiler."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from llmsqueeze.numerics.packing import unpack_bitmask

# Instruction sets of kernels/bitmask.cpp.
INSTRUCTIONS = ("portable", "AVX2", "AVX-512")
_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
# Up to so many rows of x meet the weights as they are; beyond, a panel of rows at a time is made dense.
TOKENS = 16
PANEL = 16 * 2**20


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None if they were not built."""
    found = sorted(Path(__file__).parent.parent.glob("_bitmask.*"))
    if not found:
        return None
    loaded = ctypes.CDLL(str(found[0]))
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    loaded.llmsqueeze_bitmask_linear.argtypes = [pointer] * 6 + [size] * 3 + [number] * 3
    loaded.llmsqueeze_bitmask_linear.restype = None
    loaded.llmsqueeze_bitmask_expand.argtypes = [pointer] * 4 + [size] * 3 + [number] * 4
    loaded.llmsqueeze_bitmask_expand.restype = None
    return loaded


def instructions() -> str | None:
    """The best instruction set that there is code for on this machine; None without kernels."""
    loaded = library()
    return None if loaded is None else INSTRUCTIONS[loaded.llmsqueeze_isa()]


def bitmask_linear(
    x: Tensor, values: Tensor, mask: Tensor, row_offsets: Tensor, bias: Tensor | None, *,
    isa: int | None = None,
) -> Tensor:  # fmt: skip
    """See ops.bitmask_linear. isa: place in INSTRUCTIONS, not beyond what the machine has."""
    loaded = library()
    columns, rows = x.shape[-1], len(mask)
    tokens = x.numel() // columns
    if loaded is None:
        weight = unpack_bitmask(values, mask, row_offsets, columns).to(x.dtype)
        return torch.nn.functional.linear(x, weight, bias)
    kind, threads = _KINDS[values.dtype], torch.get_num_threads()
    parts = values.contiguous(), mask.contiguous(), row_offsets.contiguous()
    chosen = loaded.llmsqueeze_isa() if isa is None else isa
    if tokens > TOKENS:
        return _expanded(loaded, x, parts, bias, kind, chosen, threads)
    seen = x.float().contiguous()
    offset = None if bias is None else bias.float().contiguous()
    y = torch.empty(*x.shape[:-1], rows)
    loaded.llmsqueeze_bitmask_linear(
        *(part.data_ptr() for part in parts), None if offset is None else offset.data_ptr(),
        seen.data_ptr(), y.data_ptr(), rows, columns, tokens, kind, chosen, threads,
    )  # fmt: skip
    return y.to(x.dtype)


@torch.no_grad()
def _expanded(
    loaded: ctypes.CDLL, x: Tensor, parts: tuple[Tensor, ...], bias: Tensor | None, kind: int, isa: int,
    threads: int,
) -> Tensor:  # fmt: skip
    values, mask, row_offsets = parts
    rows, columns = len(mask), x.shape[-1]
    dtype = values.dtype if values.dtype == x.dtype else torch.float32
    y = x.new_empty(*x.shape[:-1], rows)
    panel = min(rows, max(1, PANEL // (dtype.itemsize * columns)))
    held = torch.empty(panel, columns, dtype=dtype)
    for begin in range(0, rows, panel):
        end = min(begin + panel, rows)
        weight = held[: end - begin]
        loaded.llmsqueeze_bitmask_expand(
            values.data_ptr(), mask[begin:].data_ptr(), row_offsets[begin:].data_ptr(),
            weight.data_ptr(), end - begin, columns, len(values), kind, dtype == torch.float32, isa,
            threads,
        )  # fmt: skip
        part = None if bias is None else bias[begin:end]
        y[..., begin:end] = torch.nn.functional.linear(x, weight.to(x.dtype), part)
    return y
