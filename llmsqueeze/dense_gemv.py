"""A dense matrix times a vector in Triton: at one token faster than cuBLAS, hence the rival to beat."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[misc]
def _gemv(weight, x, y, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < columns
        at = weight + row[:, None].to(tl.int64) * columns + column[None, :]
        if EVEN:
            part = tl.load(x + column).to(tl.float32)
            values = tl.load(at, eviction_policy="evict_first")
        else:
            part = tl.load(x + column, mask=inside, other=0).to(tl.float32)
            values = tl.load(at, mask=inside[None, :], other=0, eviction_policy="evict_first")
        sums += values.to(tl.float32) * part[None, :]
    tl.store(y + row, tl.sum(sums, axis=1).to(y.dtype.element_ty))


def gemv(weight: Tensor, x: Tensor, rows: int, columns: int, warps: int) -> Tensor:
    """[N] from [N, K] and [K]; `rows` by `columns` a program, rows dividing N."""
    y = torch.empty(len(weight), dtype=x.dtype, device=x.device)
    _gemv[(len(weight) // rows,)](
        weight, x, y, weight.shape[1], ROWS=rows, COLUMNS=columns,
        EVEN=weight.shape[1] % columns == 0, num_warps=warps,
    )  # fmt: skip
    return y
