"""From a score per weight to a keep mask of the wanted pattern: one place for all methods."""

from __future__ import annotations

import dataclasses
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


def relaxed(target: Target, share: float) -> Target | None:
    """`target` on the way: only this share of its zeros, in (0, 1]; None while nothing goes yet.

    N:M removes a growing number of every M. Tiles ask for all at once.
    """
    pattern = target.pattern
    if pattern is None:
        return dataclasses.replace(target, sparsity=target.sparsity * share)
    if not isinstance(pattern, NM):
        return target
    kept = pattern.m - round((pattern.m - pattern.n) * share)
    if kept == pattern.m:
        return None
    # A budget moves whole inputs and needs the final group, so it comes with the last step.
    budget = pattern.budget if kept == pattern.n else 0.0
    partial = dataclasses.replace(pattern, n=kept, budget=budget)
    return dataclasses.replace(target, sparsity=partial.sparsity, pattern=partial)
