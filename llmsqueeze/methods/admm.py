"""ADMM pruning with gradual masking. Bóža, arXiv 2401.02938 (algorithm 2).

The weights are split into w, which fits the layer's output, and z, which has the wanted zeros; the
mask is chosen again and again from w while the share of zeros rises, and both are pulled together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmsqueeze.errors import CalibrationError, RecipeError
from llmsqueeze.methods.base import Pruned, Target
from llmsqueeze.methods.select import choose, relaxed

if TYPE_CHECKING:
    from torch import Tensor

    from llmsqueeze.numerics.stats import InputStats


@dataclass(frozen=True)
class Config:
    admm_steps: int = field(default=20, metadata={"help": "iterations"})
    admm_ramp: int = field(
        default=15, metadata={"help": "iterations over which the zeros reach their full share"}
    )
    admm_ridge: float = field(
        default=0.1,
        metadata={"help": "pull towards the original weights, inputs scaled to unit size"},
    )
    admm_penalty: float = field(
        default=1.0, metadata={"help": "how strongly w and z are pulled together"}
    )

    def __post_init__(self) -> None:
        if not 1 <= self.admm_ramp <= self.admm_steps <= 10_000:
            raise RecipeError("--admm-ramp and --admm-steps: 1 <= ramp <= steps <= 10000 is needed")
        if not 0 < self.admm_ridge <= 100 or not 0 < self.admm_penalty <= 1000:
            raise RecipeError("--admm-ridge must lie in (0, 100] and --admm-penalty in (0, 1000]")


def needs(config: Config) -> frozenset[str]:
    return frozenset({"gram", "product"})


def prune(weight: Tensor, stats: InputStats | None, target: Target, config: Config) -> Pruned:
    """Mask and weights together, any pattern; unstructured zeros are ranked within each output row.

    weight: [out, in]; computed in fp32 on inputs scaled to unit size, returned in its own dtype.
    stats: needs gram and product; held-out tokens are left out. Raises CalibrationError when the
    Gram matrix holds values that cannot be solved with.
    """
    import torch

    from llmsqueeze.numerics.masks import zero_removed

    assert stats is not None
    fitting = stats.fitting()
    size = fitting.rms.clamp_min(torch.finfo(torch.float32).tiny).double()
    # In place, here and below: large blocks are mapped anew each time, which takes longer than a sum.
    inverse = _inverse(fitting, size, config)
    wanted = fitting.product(weight).double().div_(fitting.count).div_(size).float()
    size = size.float()
    w = weight.float() * size
    wanted += config.admm_ridge * w  # the ridge pulls towards the original weights

    gap = torch.zeros_like(w)
    towards = torch.empty_like(w)
    keep = torch.ones_like(w, dtype=torch.bool)
    for step in range(config.admm_steps):
        moved = gap.add_(w)
        if step < config.admm_ramp:
            # Cubic, as in the paper: most zeros come early, the last ones slowly.
            share = 1 - (1 - (step + 1) / config.admm_ramp) ** 3
            now = relaxed(target, share)
            keep = choose(torch.abs(moved, out=towards), now) if now else keep
        # z is what is kept of `moved`, the gap the rest: z - gap differs from `moved` in signs.
        torch.neg(moved, out=towards)
        torch.where(keep, moved, towards, out=towards)
        gap = moved.masked_fill_(keep, 0)
        torch.mm(towards.mul_(config.admm_penalty).add_(wanted), inverse, out=w)
    result = zero_removed((gap.add_(w).div_(size)).to(weight.dtype), keep)
    if not bool(torch.isfinite(result).all()):
        raise CalibrationError(
            "ADMM diverged; use more calibration tokens or a larger --admm-ridge"
        )
    return Pruned(result, keep)


def _inverse(fitting: InputStats, size: Tensor, config: Config) -> Tensor:
    """(G + (ridge + penalty) I)⁻¹ of inputs in units of `size`, once for all linears of the group."""
    import torch

    key = ("admm", config.admm_ridge, config.admm_penalty)
    if key not in fitting.memo:
        gram = fitting.gram.double().div_(fitting.count)
        damped = gram.div_(size).div_(size.unsqueeze(1)).float()
        del gram
        damped.diagonal().add_(config.admm_ridge + config.admm_penalty)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed or not bool(torch.isfinite(lower).all()):
            raise CalibrationError(
                "the Gram matrix of the calibration tokens is not positive; check the activations "
                "with `llmsqueeze eval`, or use a larger --admm-ridge"
            )
        del damped
        fitting.memo[key] = torch.cholesky_inverse(lower)
    inverse: Tensor = fitting.memo[key]
    return inverse
