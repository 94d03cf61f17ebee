"""AlphaPruning: blocks whose spectra have heavy tails keep more weights. Lu et al. (arXiv 2410.10912)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmsqueeze.errors import RecipeError
from llmsqueeze.methods.allocate import (
    MOST,
    block_sizes,
    block_targets,
    check_unstructured,
    scale_to_mean,
    unit_range,
)
from llmsqueeze.methods.base import Target

if TYPE_CHECKING:
    from torch import Tensor

    from llmsqueeze.numerics.stats import InputStats

# The histogram whose peak bounds λmin, as in the released code.
BINS = 100
ABOVE_PEAK = 1.5

# Candidates for λmin compared at once: their table of distances then stays in a CPU cache.
_CHUNK = 64


@dataclass(frozen=True)
class Config:
    alpha_range: float = field(
        default=0.3,
        metadata={"help": "block sparsities span 1 ± this, before they are scaled to the target"},
    )

    def __post_init__(self) -> None:
        if not 0 <= self.alpha_range < 1:
            raise RecipeError(
                f"alpha range {self.alpha_range} is outside [0, 1); the usual value is 0.3"
            )


def needs(config: Config) -> frozenset[str]:
    return frozenset()


def measure(
    sites: dict[str, tuple[Tensor, InputStats | None]], target: Target, config: Config
) -> float | None:
    """Mean over the linears of the power-law exponent of the spectrum of WᵀW (PL_Alpha_Hill).

    Linears without an exponent (a single row, say) do not count; None if no linear has one.
    """
    check_unstructured(target, "AlphaPruning")
    exponents = [tail_exponent(spectrum(weight)) for weight, _ in sites.values()]
    found = [exponent for exponent in exponents if exponent is not None]
    return math.fsum(found) / len(found) if found else None


def assign(
    measured: list[float | None],
    shapes: list[dict[str, tuple[int, int]]],
    target: Target,
    config: Config,
) -> dict[str, Target]:
    """Sparsities linear in the exponents, from 1 - ε to 1 + ε, scaled to the target (section 3.2).

    The mean is weighted by the weights of each block and met after clipping to [0, 0.99] as well; the
    released code does not clip. A block without an exponent is put midway. Raises RecipeError on a
    pattern.
    """
    check_unstructured(target, "AlphaPruning")
    raw = [1 + config.alpha_range * (2 * share - 1) for share in unit_range(measured)]
    high = max(MOST, target.sparsity)
    sparsities = scale_to_mean(raw, block_sizes(shapes), target.sparsity, 0.0, high)
    return block_targets(sparsities, shapes, target)


def spectrum(weight: Tensor) -> Tensor:
    """[min(out, in)] fp64 on the CPU: eigenvalues of WᵀW, less those that are zero for its shape.

    weight: [out, in], any float dtype. fp64 makes up for the squaring, and for less time than fp32
    singular values take (measured on an H100 and on a CPU) gives them more accurately.
    """
    import torch

    w = weight.double()
    small = w @ w.t() if w.shape[0] < w.shape[1] else w.t() @ w
    return torch.linalg.eigvalsh(small).cpu()


def tail_exponent(eigenvalues: Tensor) -> float | None:
    """α of the density λ^-α that fits the eigenvalues from some λmin up; None if none does.

    eigenvalues: [n] fp64 on the CPU, in any order; those that rounding cannot tell from zero are left
    out.
    Given λmin, the maximum likelihood (Hill) estimate over the k values from it up is
    α = 1 + k / Σ ln(λ/λmin). λmin is the one with the least Kolmogorov-Smirnov distance between that
    fit and the values, among those up to 1.5 times the peak of a histogram of log λ: the released
    code's "alpha_peak". Its lower bound near the peak is left out, since a slip makes it ineffective.
    """
    import torch

    floor = eigenvalues.max() * torch.finfo(torch.float64).eps * eigenvalues.numel()
    logs = eigenvalues[eigenvalues > floor].log().sort().values
    n = logs.numel()
    if n < 2 or logs[0] == logs[-1]:
        return None
    low, high = float(logs[0]), float(logs[-1])
    peak = low + int(torch.histc(logs, BINS, low, high).argmax()) * (high - low) / BINS
    # Values equal to the largest have no tail to fit.
    candidates = int(((logs <= peak + math.log(ABOVE_PEAK)) & (logs < high)).sum())
    place = torch.arange(n, dtype=torch.float64)
    kept = n - place
    sums = logs.flip(0).cumsum(0).flip(0)
    slope = kept / (sums - kept * logs)  # α - 1, were each value λmin
    distance = torch.empty(candidates, dtype=torch.float64)
    for start in range(0, candidates, _CHUNK):
        rows = slice(start, min(start + _CHUNK, candidates))
        # [candidate, value]: fitted against actual share of the tail that lies below the value.
        excess = logs[start:] - logs[rows, None]
        actual = (place[start:] - place[rows, None]) / kept[rows, None]
        gap = 1 - (-slope[rows, None] * excess).exp() - actual
        distance[rows] = gap.abs().triu().amax(dim=1)  # below the diagonal: outside the tail
    return 1 + float(slope[distance.argmin()])
