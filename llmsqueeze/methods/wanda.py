"""Wanda: score |W|·‖x‖ within each output row, no weight update. Sun et al. (arXiv 2306.11695)."""

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
    return frozenset({"sq_sum"})


def prune(weight: Tensor, stats: InputStats | None, target: Target, config: Config) -> Pruned:
    """Remove the lowest S_ij = |W_ij|·‖x_j‖ (eq. 1): a fixed share of each row, or of each n:m group.

    weight: [out, in], any float dtype; kept entries come back bit-identical.
    stats: needs sq_sum of the inputs. ‖x_j‖ is used as a root mean square: the order is the same.
    """
    from llmsqueeze.numerics.masks import zero_removed

    assert stats is not None
    keep = choose(weight.float().abs() * stats.rms, target)
    return Pruned(zero_removed(weight, keep), keep)
