"""Streaming histograms of magnitudes, and the quantiles read off them."""

from __future__ import annotations

import torch
from torch import Tensor

# Bins are the leading bits of an fp32: 128 to the octave, so that a quantile is off by at most 0.4 %
# of itself. Smaller and larger magnitudes share one bin at each end.
LOWEST, HIGHEST = -30, 24
_MANTISSA_BITS = 7
_SHIFT = 23 - _MANTISSA_BITS
_FIRST = (127 + LOWEST) << _MANTISSA_BITS
BINS = (HIGHEST - LOWEST) << _MANTISSA_BITS

# The shares that a stored curve gives thresholds for: 0 % to 95 %.
CURVE_STEP = 0.01
CURVE_POINTS = 96


class MagnitudeHistogram:
    """How often which magnitude occurred. Counts are exact, so parts gathered apart just add up.

    counts: [BINS + 2] int64 on `device`; first exact zeros, last NaN and what exceeds the range.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(BINS + 2, dtype=torch.int64, device=device)

    def update(self, magnitudes: Tensor) -> None:
        """Add values that are not negative: fp32 of any shape."""
        bits = magnitudes.contiguous().view(torch.int32).flatten()
        index = (bits >> _SHIFT).sub_(_FIRST - 1).clamp_(1, BINS + 1)
        index.masked_fill_(bits == 0, 0)
        self.counts += torch.bincount(index, minlength=BINS + 2)

    def merge(self, other: MagnitudeHistogram) -> None:
        """Add the counts of `other`."""
        self.counts += other.counts

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def zeros(self) -> float:
        """The share of exact zeros."""
        return int(self.counts[0]) / max(1, self.total)

    def quantiles(self, shares: Tensor) -> Tensor:
        """The threshold below or at which so large a share of the magnitudes lies.

        shares: [n] in [0, 1], any float dtype. Returns [n] fp32, interpolated within bins; 0 as long as
        exact zeros alone make up the share.
        """
        counts = self.counts.cpu().double()
        below = counts.cumsum(0)
        wanted = shares.double().cpu() * below[-1]
        # The first bin that ends at or beyond what is wanted.
        at = torch.searchsorted(below, wanted).clamp_max(BINS + 1)
        into = ((wanted - (below[at] - counts[at])) / counts[at].clamp_min(1)).clamp(0, 1)
        edges = _edges()
        result = edges[at] + into * (edges[at + 1] - edges[at])
        return result.masked_fill(wanted <= below[0], 0).float()

    def curve(self) -> Tensor:
        """[CURVE_POINTS] fp32: the thresholds of the shares 0, CURVE_STEP, …"""
        return self.quantiles(torch.arange(CURVE_POINTS, dtype=torch.float64) * CURVE_STEP)


def read_curve(curve: Tensor, share: float) -> float:
    """The threshold of a share between 0 and 0.95, linear between the points of a stored curve."""
    place = share / CURVE_STEP
    left = min(int(place + 1e-9), CURVE_POINTS - 2)
    values = curve.double()
    return float(values[left] + (place - left) * (values[left + 1] - values[left]))


def _edges() -> Tensor:
    """[BINS + 3] fp64: where each bin of `counts` begins, and the last one ends."""
    bits = (torch.arange(BINS + 1, dtype=torch.int32) + _FIRST) << _SHIFT
    inner = bits.view(torch.float32).double()
    inner[0] = 0  # smaller magnitudes lie in the first bin
    return torch.cat([torch.zeros(1, dtype=torch.float64), inner, 2 * inner[-1:]])
