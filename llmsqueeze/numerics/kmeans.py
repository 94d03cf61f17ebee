"""Exact weighted k-means on a line: the codebook with the least weighted squared error."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 1024


class WeightedHistogram:
    """Weighted values between `low` and `high`, in BINS bins of equal width. Parts just add up.

    weight, moment: [BINS] fp64, the sums of w and w·x by bin.
    """

    def __init__(self, low: float, high: float, device: torch.device) -> None:
        self.low, self.high = low, high
        self.weight = torch.zeros(BINS, dtype=torch.float64, device=device)
        self.moment = torch.zeros_like(self.weight)

    def update(self, x: Tensor, weights: Tensor) -> None:
        """Add values of any shape with weights of the same shape; those out of range do not count."""
        at = (x - self.low) * (BINS / (self.high - self.low))
        outside = (x < self.low) | (x > self.high)
        # One more bin takes what does not count.
        at = at.clamp_(0, BINS - 1).masked_fill_(outside, BINS).long().flatten()
        for sums, added in ((self.weight, weights), (self.moment, weights * x)):
            sums += _by_bin(at, added.double().flatten())

    def merge(self, other: WeightedHistogram) -> None:
        """Add the sums of `other`, which has the same range."""
        self.weight += other.weight
        self.moment += other.moment

    def codebook(self, count: int) -> Tensor:
        """[count] fp64 on the CPU, ascending: weighted_kmeans of the bins, each at the mean of its values."""
        weight = self.weight.cpu()
        seen = weight > 0
        return weighted_kmeans(self.moment.cpu()[seen] / weight[seen], weight[seen], count)


def _by_bin(at: Tensor, added: Tensor) -> Tensor:
    """[BINS] fp64: the sums of `added`, [n] fp64, by its bins `at`."""
    if not added.is_cuda:
        return torch.bincount(at, added, minlength=BINS + 1)[:BINS]
    return _by_bin_in_any_order(at, added)


def _by_bin_in_any_order(at: Tensor, added: Tensor) -> Tensor:
    """The same, where additions come in an order that varies, as on a GPU: in whole numbers of a unit that is
    so small that 62 bits hold their sum."""
    most = float(added.abs().max()) * len(added) if len(added) else 0.0
    if not math.isfinite(most):  # which the result is to show
        return torch.bincount(at, added, minlength=BINS + 1)[:BINS]
    _, exponent = math.frexp(most)
    whole = torch.round(torch.ldexp(added, added.new_tensor(62 - exponent))).long()
    sums = torch.zeros(BINS + 1, dtype=torch.int64, device=added.device).index_add_(0, at, whole)
    return torch.ldexp(sums[:BINS].double(), added.new_tensor(exponent - 62))


def weighted_kmeans(values: Tensor, weights: Tensor, count: int) -> Tensor:
    """[count] fp64, ascending: the values c with the least Σ w·min_j (v − c_j)².

    values: [n] ascending; weights: [n], positive. Optimal cells are intervals, so dynamic programming over
    their borders finds the optimum (Bellman 1973; Wang and Song 2011): O(count · n²) time, O(n²) memory.
    With fewer than `count` values the last one is repeated.
    """
    n = values.numel()
    if n == 0:
        return torch.zeros(count, dtype=torch.float64)
    values, weights = values.double(), weights.double()
    if n <= count:
        return torch.cat([values, values[-1:].expand(count - n)])
    centre = (values * weights).sum() / weights.sum()
    shifted = values - centre  # sums of squares would cancel far from 0
    zero = values.new_zeros(1)
    sums = [torch.cat([zero, (weights * shifted**power).cumsum(0)]) for power in range(3)]
    # cost[a, b]: of one cell over a … b-1, infinite where that is empty.
    w, first, second = (s[None] - s[:, None] for s in sums)
    cost = (second - first.square() / w.clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(0)
    cost.masked_fill_(torch.ones_like(cost).tril().bool(), torch.inf)
    best, choices = cost[0], []
    for _ in range(count - 1):
        best, last = (best[:, None] + cost).min(dim=0)
        choices.append(last)
    borders = [n]
    for last in reversed(choices):
        borders.append(int(last[borders[-1]]))
    edges = torch.tensor([0, *borders[::-1]])
    return centre + (sums[1][edges[1:]] - sums[1][edges[:-1]]) / (
        sums[0][edges[1:]] - sums[0][edges[:-1]]
    )
