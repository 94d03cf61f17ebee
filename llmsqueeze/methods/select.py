"""From a score per weight to a keep mask of the wanted pattern: one place for all methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmsqueeze.methods.base import NM, Target

if TYPE_CHECKING:
    from torch import Tensor


def choose(score: Tensor, target: Target) -> Tensor:
    """Keep mask [out, in] that fits `target`.

    score: [out, in], not negative; its square is read as the error that removing the weight causes,
    as in Wanda's |W|·‖x‖. Unstructured: the same count from every row.
    """
    from llmsqueeze.numerics.masks import keep_highest, keep_nm, keep_nm_out, keep_tiles

    pattern = target.pattern
    if pattern is None:
        return keep_highest(score, target.removed_of(score.shape[1]))
    if isinstance(pattern, NM):
        if pattern.axis == "out":
            return keep_nm_out(score, pattern.n, pattern.m, pattern.budget)
        return keep_nm(score, pattern.n, pattern.m)
    dense = target.dense_of(pattern.count(*score.shape))
    return keep_tiles(score, pattern.size, dense)
