"""The Walsh-Hadamard transform, which spreads a vector's few large entries over all of them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def hadamard(x: Tensor) -> Tensor:
    """x [..., D] times an orthonormal, symmetric matrix: its own inverse. In x's dtype.

    D that is no power of two is turned in blocks of the largest power of two that divides it.
    """
    width = x.shape[-1]
    block = block_of(width)
    matrix = _matrix(block).to(x)
    return (x.unflatten(-1, (-1, block)) @ matrix).flatten(-2)


def block_of(width: int) -> int:
    """The largest power of two that divides the width."""
    return width & -width


@functools.lru_cache(maxsize=16)
def _matrix(size: int) -> Tensor:
    """[size, size] fp64, by Sylvester's construction."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5
