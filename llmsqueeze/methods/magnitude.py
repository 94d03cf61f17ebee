"""Magnitude pruning: remove the smallest |W|. Han et al. 2015 (arXiv 1506.02626)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsqueeze.methods.base import Pruned, Target
from llmsqueeze.methods.select import choose

if TYPE_CHECKING:
    from torch import Tensor

    from llmsqueeze.numerics.stats import InputStats


@dataclass(frozen=True)
class Config:
    pass


def needs(config: Config) -> frozenset[str]:
    return frozenset()


def prune(weight: Tensor, stats: InputStats | None, target: Target, config: Config) -> Pruned:
    """Remove the smallest |W| of the whole matrix, or of every group for n:m.

    weight: [out, in], any float dtype; kept entries come back bit-identical.
    """
    from llmsqueeze.numerics.masks import keep_highest, zero_removed

    score = weight.abs()
    if target.pattern:
        keep = choose(score, target)
    else:
        removed = target.removed_of(score.numel())
        keep = keep_highest(score.reshape(1, -1), removed).reshape(score.shape)
    return Pruned(zero_removed(weight, keep), keep)
