"""OWL: blocks with more outlying scores keep more weights. Yin et al. (arXiv 2310.05175)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmsqueeze.errors import RecipeError
from llmsqueeze.methods.allocate import (
    MOST,
    block_sizes,
    block_targets,
    check_unstructured,
    shift_to_mean,
    unit_range,
)
from llmsqueeze.methods.base import Target

if TYPE_CHECKING:
    from torch import Tensor

    from llmsqueeze.numerics.stats import InputStats


@dataclass(frozen=True)
class Config:
    owl_multiple: float = field(
        default=5.0, metadata={"help": "a score is an outlier above this multiple of the mean"}
    )
    owl_range: float = field(
        default=0.08, metadata={"help": "blocks differ by at most twice this in sparsity"}
    )

    def __post_init__(self) -> None:
        if not 1 <= self.owl_multiple <= 1000:
            raise RecipeError(
                f"outlier multiple {self.owl_multiple} is outside [1, 1000]; the usual value is 5"
            )
        if not 0 <= self.owl_range <= 0.5:
            raise RecipeError(
                f"OWL range {self.owl_range} is outside [0, 0.5]; the usual value is 0.08"
            )


def needs(config: Config) -> frozenset[str]:
    return frozenset({"sq_sum"})


def measure(
    sites: dict[str, tuple[Tensor, InputStats | None]], target: Target, config: Config
) -> float | None:
    """Share of Wanda scores |W|·‖x‖ above M × their mean, over all linears of the block (section 3.2).

    None for a block without sites. ‖x‖ is a root mean square, which scales all scores alike.
    """
    import torch

    check_unstructured(target, "OWL")
    weights = sum(weight.numel() for weight, _ in sites.values())
    if not weights:
        return None
    total = sum(float(_score(*site).sum(dtype=torch.float64)) for site in sites.values())
    threshold = config.owl_multiple * total / weights
    # Scored again rather than kept: in fp32 a block's scores take twice the memory of the block.
    return sum(int((_score(*site) > threshold).sum()) for site in sites.values()) / weights


def assign(
    measured: list[float | None],
    shapes: list[dict[str, tuple[int, int]]],
    target: Target,
    config: Config,
) -> dict[str, Target]:
    """Densities linear in the outlier shares, over a width of 2λ, around the target's.

    The mean is weighted by the weights of each block and met after clipping to [0, 0.99] as well;
    the released code takes the plain mean and does not clip. Raises RecipeError on a pattern.
    """
    check_unstructured(target, "OWL")
    raw = [-2 * config.owl_range * share for share in unit_range(measured)]
    high = max(MOST, target.sparsity)
    sparsities = shift_to_mean(raw, block_sizes(shapes), target.sparsity, 0.0, high)
    return block_targets(sparsities, shapes, target)


def _score(weight: Tensor, stats: InputStats | None) -> Tensor:
    assert stats is not None
    return weight.float().abs() * stats.rms
