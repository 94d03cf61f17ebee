"""R-Sparse: what the gate drops goes through a low-rank copy of the weights. Zhang et al. (2504.19449).

y = W (m ⊙ x) + W_r ((1 - m) ⊙ x), W_r the best rank-r approximation of W, here of the stacked members.
At sparsity s a share α of the weights that may be read goes to the gate and the rest to the rank:
(1 - s) α of the inputs are kept, and r = (1 - s)(1 - α) m n / (m + n) with the true m, n of the stack
(the published code takes the hidden size for both, which under grouped queries exceeds the budget).
α = 1 is WINA.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmsqueeze.errors import RecipeError
from llmsqueeze.methods.gating import BlockParts, Branch, GateSpec, column_norms, input_gates

if TYPE_CHECKING:
    from torch import Tensor

    from llmsqueeze.numerics.histogram import MagnitudeHistogram

SVDS = ("auto", "exact", "randomized")
# Tried for every gate; the one with the smallest error of the linear's output is taken.
RATIOS = (1.0, 0.98, 0.95, 0.9, 0.8, 0.65, 0.5)
# Wider inputs get a randomised decomposition unless an exact one is asked for.
EXACT_WIDTH = 4096
_OVERSAMPLING, _POWER_STEPS = 16, 4


@dataclass(frozen=True)
class Config:
    rsparse_ratio: float = field(
        default=0.0,
        metadata={
            "help": "α, the share of the budget that the gate gets; 0: searched for every gate"
        },
    )
    rsparse_svd: str = field(
        default="auto",
        metadata={
            "help": f"exact, randomized, or auto: exact up to {EXACT_WIDTH} inputs",
            "choices": SVDS,
        },
    )

    def __post_init__(self) -> None:
        if not 0 <= self.rsparse_ratio <= 1:
            raise RecipeError(f"--rsparse-ratio {self.rsparse_ratio} is outside [0, 1]")
        if self.rsparse_svd not in SVDS:
            raise RecipeError(
                f"unknown --rsparse-svd {self.rsparse_svd!r}; choose from {', '.join(SVDS)}"
            )


def gates(parts: BlockParts, config: Config) -> list[GateSpec]:
    """All inputs of all linears; those fed by one tensor share a gate and a branch."""
    return input_gates(parts)


def scale(
    spec: GateSpec, weights: list[Tensor], companion: Tensor | None, config: Config
) -> Tensor:
    """‖W_:j‖ of the stacked members; the published code's ‖(V S)_j:‖ is the same."""
    return column_norms(weights)


def rank_of(sparsity: float, ratio: float, rows: int, columns: int) -> int:
    """The rank that the low-rank part of the budget pays for, rounded down."""
    return int((1 - sparsity) * (1 - ratio) * rows * columns / (rows + columns) + 1e-9)


def branch(
    weight: Tensor,
    scale: Tensor,
    x: Tensor,
    histogram: MagnitudeHistogram,
    sparsity: float,
    config: Config,
) -> Branch:
    """The ratio with the smallest error on calibration tokens, and the low-rank factors it pays for.

    weight: [out, in], the members stacked; scale: [in] fp32; x: [tokens, in], some of the tokens that
    the histogram of |x|·scale was made from.
    """
    import torch

    weight, x = weight.float(), x.float()
    rows, columns = weight.shape
    ratios = (config.rsparse_ratio,) if config.rsparse_ratio else RATIOS
    ranks = [rank_of(sparsity, ratio, rows, columns) for ratio in ratios]
    basis, energy = _right_vectors(weight, max(ranks), config)
    drops = [1 - (1 - sparsity) * ratio for ratio in ratios]
    thresholds = histogram.quantiles(torch.tensor(drops)).tolist()
    scored = x.abs() * scale
    best, least = 0, float("inf")
    for index, (rank, threshold) in enumerate(zip(ranks, thresholds, strict=True)):
        dropped = torch.where(scored > threshold, torch.zeros_like(x), x)
        # ‖W d‖² less what the leading directions carry of it.
        carried = ((dropped @ basis[:, :rank]).square() * energy[:rank]).sum()
        error = float((dropped @ weight.t()).square().sum() - carried)
        if error < least:
            best, least = index, error
    fixed = config.rsparse_ratio > 0
    rank, ratio, drop = ranks[best], ratios[best], drops[best]
    if rank == 0:
        return Branch(ratio, drop, None, None, fixed)
    down = basis[:, :rank].t().contiguous()
    return Branch(ratio, drop, weight @ down.t(), down, fixed)


def _right_vectors(weight: Tensor, count: int, config: Config) -> tuple[Tensor, Tensor]:
    """The leading right singular vectors [in, count] and squared singular values [count], fp32."""
    import torch

    columns = weight.shape[1]
    count = min(count, *weight.shape)
    exact = config.rsparse_svd == "exact" or (
        config.rsparse_svd == "auto" and columns <= EXACT_WIDTH
    )
    if exact:
        values, vectors = torch.linalg.eigh(weight.t() @ weight)
        return vectors.flip(1)[:, :count], values.flip(0)[:count].clamp_min(0)
    generator = torch.Generator(weight.device).manual_seed(0)
    width = min(count + _OVERSAMPLING, columns)
    probe = torch.randn(columns, width, generator=generator, device=weight.device)
    for _ in range(_POWER_STEPS):
        probe, _ = torch.linalg.qr(weight.t() @ (weight @ probe))
    small = weight @ probe
    values, turn = torch.linalg.eigh(small.t() @ small)
    vectors = probe @ turn.flip(1)
    return vectors[:, :count], values.flip(0)[:count].clamp_min(0)
