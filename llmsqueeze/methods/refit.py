"""Refit: re-solve the weights that a mask left, on the Gram matrix of their inputs.

Least squares for a given support, by masked preconditioned conjugate gradient; the mask is not
touched. As the last stage of ALPS (Meng et al., arXiv 2406.07831) applies it to its own
mask, here for the mask of any method.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmsqueeze.errors import CalibrationError, RecipeError
from llmsqueeze.methods.base import Pruned

if TYPE_CHECKING:
    from torch import Tensor

    from llmsqueeze.numerics.stats import InputStats


@dataclass(frozen=True)
class Config:
    refit_steps: int = field(
        default=20, metadata={"help": "most conjugate gradient steps; held-out tokens stop earlier"}
    )
    refit_ridge: float = field(
        default=0.01,
        metadata={"help": "pull towards the original weights, as a fraction of the mean diagonal"},
    )

    def __post_init__(self) -> None:
        if not 1 <= self.refit_steps <= 10_000:
            raise RecipeError(f"--refit-steps {self.refit_steps} is outside [1, 10000]")
        if not 0 <= self.refit_ridge <= 10:
            raise RecipeError(f"--refit-ridge {self.refit_ridge} is outside [0, 10]")


def needs(config: Config) -> frozenset[str]:
    return frozenset({"gram", "product"})


def refit(weight: Tensor, pruned: Pruned, stats: InputStats, config: Config) -> Pruned:
    """The same support with the weights that fit best.

    weight: [out, in], uncompressed, any float dtype. stats: needs gram and product; the held-out
    part, if there is one, decides for every row after how many steps to stop, and is not fitted.
    Raises CalibrationError when the result is not finite.
    """
    import torch

    from llmsqueeze.numerics.masks import zero_removed
    from llmsqueeze.numerics.solve import Quadratic, masked_pcg

    original = weight.float()
    fitting, held_out = stats.fitting(), stats.held_out
    problem = Quadratic(fitting.gram, fitting.product(weight)).ridged(original, config.refit_ridge)
    judge = None
    if held_out is not None:
        judge = Quadratic(held_out.gram, held_out.product(weight))
    solution = masked_pcg(pruned.weight.float(), pruned.keep, problem, config.refit_steps, judge)
    fitted = zero_removed(solution.weight.to(weight.dtype), pruned.keep)
    if not bool(torch.isfinite(fitted).all()):
        raise CalibrationError(
            "refitting diverged; use more calibration tokens, a larger --refit-ridge or --refit none"
        )
    return Pruned(fitted, pruned.keep, {**pruned.report, "refit_steps": solution.steps})
