"""What launches of all operators share: x as kernels read it, and products with weights made dense."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmsqueeze.errors import EnvironmentFault
from llmsqueeze.ops import swiglu

# Bytes of weights that are expanded at a time. Panels of 33 MB, to stay in the L2 cache, took 15 to 36 %
# longer on an H100 than whole matrices, whose products cuBLAS divides better.
PANEL = 256 * 2**20


def matrix(x: Tensor, multiple: int) -> tuple[Tensor, int, int]:
    """x as kernels read it, its tokens and columns: those filled up with zeros, aligned to 16 bytes."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise EnvironmentFault(
            f"CUDA kernels compute in bfloat16 or float16, not {x.dtype}; choose --dtype bfloat16"
        )
    if x.shape[-1] % multiple:
        x = pad(x, (0, -x.shape[-1] % multiple))
    x = x.contiguous()
    if x.data_ptr() % 16:  # a view into something larger
        x = x.clone()
    return x, x.numel() // x.shape[-1], x.shape[-1]


def output(x: Tensor, rows: int, glu: bool) -> Tensor:
    """Room for the result of a kernel."""
    return x.new_empty(*x.shape[:-1], rows // 2 if glu else rows)


def addend(bias: Tensor | None) -> Tensor | None:
    """What is added to a product, [rows] or [tokens, rows], as kernels read it."""
    return (
        bias if bias is None or bias.dim() == 1 else bias.reshape(-1, bias.shape[-1]).contiguous()
    )


def bias_step(bias: Tensor | None) -> int:
    """Elements from one token's addends to those of the next."""
    return 0 if bias is None or bias.dim() == 1 else bias.shape[-1]


def bias_from(bias: Tensor | None, token: int) -> Tensor | None:
    """Of this token and those behind it."""
    return bias[token:] if bias is not None and bias.dim() > 1 else bias


def half(x: Tensor) -> int:
    return int(x.dtype == torch.float16)


def panel_rows(columns: int) -> int:
    """Of a panel: whole slices of every layout."""
    return max(32, PANEL // (2 * columns) // 32 * 32)


@torch.no_grad()
def expanded(
    x: Tensor,
    bias: Tensor | None,
    rows: int,
    expand: Callable[[int, int], Tensor],
    glu: bool = False,
) -> Tensor:
    """x times weights that `expand(begin, end)` makes dense, a panel of rows at a time."""
    y = x.new_empty(*x.shape[:-1], rows)
    given, found = x.view(-1, x.shape[-1]), y.view(-1, rows)
    panel = panel_rows(x.shape[-1])
    for begin in range(0, rows, panel):
        end = min(begin + panel, rows)
        weight, out = expand(begin, end).view(x.dtype).t(), found[:, begin:end]
        # Into its place: a copy of y would take as long as an eighth of the product.
        if bias is None:
            torch.mm(given, weight, out=out)
        else:
            torch.addmm(bias[..., begin:end], given, weight, out=out)
    return swiglu(y) if glu else y
