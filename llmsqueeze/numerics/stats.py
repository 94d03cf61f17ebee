"""Statistics of what enters a linear: plain sums, so batches and devices merge by addition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

STATISTICS = frozenset({"sq_sum", "gram"})

_SLICE = 64


class InputStats:
    """Sums over the tokens of one input group (all linears fed by the same tensor).

    count: tokens seen. sq_sum: [in] fp64, Σ x². gram: [in, in] fp32, Σ x xᵀ. What is not in `needs`
    is not gathered, and reading it raises AttributeError.
    """

    def __init__(self, width: int, needs: frozenset[str], device: torch.device) -> None:
        unknown = needs - STATISTICS
        if unknown:
            raise ValueError(f"unknown statistics: {sorted(unknown)}")
        self.count = 0
        self.needs = needs
        # What methods derive from these sums and share between the linears of the group.
        self.memo: dict[Any, Any] = {}
        if "sq_sum" in needs:
            # fp64 across batches: masks then do not depend on how samples were batched.
            self.sq_sum = torch.zeros(width, dtype=torch.float64, device=device)
        if "gram" in needs:
            self.gram = torch.zeros(width, width, dtype=torch.float32, device=device)

    def update(self, x: Tensor) -> None:
        """Add the tokens of x: [..., in], any float dtype."""
        x = x.reshape(-1, x.shape[-1]).float()
        self.count += x.shape[0]
        if "sq_sum" in self.needs:
            self.sq_sum += _sum_of_squares(x)
        if "gram" in self.needs:
            self.gram.addmm_(x.t(), x)

    def merge(self, other: InputStats) -> None:
        """Add the sums of `other`, gathered from other tokens of the same input."""
        self.count += other.count
        if "sq_sum" in self.needs:
            self.sq_sum += other.sq_sum
        if "gram" in self.needs:
            self.gram += other.gram

    def is_finite(self) -> bool:
        """False once any token held NaN or Inf, or a square left the range of fp32."""
        sums = [self.sq_sum] if "sq_sum" in self.needs else []
        if "gram" in self.needs:
            sums.append(self.gram.diagonal())
        return all(bool(torch.isfinite(s).all()) for s in sums)

    @property
    def rms(self) -> Tensor:
        """[in] fp32: root mean square of each input channel."""
        return (self.sq_sum / self.count).sqrt().float()


def _sum_of_squares(x: Tensor) -> Tensor:
    """[in]: Σ x² over the rows of x: [tokens, in] fp32."""
    if x.is_cuda:
        return x.square().sum(dim=0)
    # Row slices into one small accumulator: no temporary of x's size, which on a CPU costs more
    # than the arithmetic, and every fp32 sum stays short.
    partial = torch.zeros(min(_SLICE, x.shape[0]), x.shape[1])
    for rows in x.split(_SLICE):
        partial[: rows.shape[0]].addcmul_(rows, rows)
    return partial.sum(dim=0, dtype=torch.float64)
