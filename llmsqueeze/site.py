"""One linear at a time: its mask, what stays solved again, and what is said of it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from llmsqueeze.calibrate import Site
from llmsqueeze.methods import refit_method, weight_method
from llmsqueeze.methods.base import Pruned, Target, Tile
from llmsqueeze.numerics.masks import zero_removed
from llmsqueeze.numerics.solve import relative_error
from llmsqueeze.recipe import PruneRecipe

# The norms of fewer inputs may tell less of a weight than its magnitude does: with 16 tokens wanda lost less
# than that on three of four linears of MLPs in SmolLM2-135M, and 7 % more on the fourth.
LEAST_TOKENS = 32


def prune_site(
    site: Site, target: Target, recipe: PruneRecipe, keep: Tensor | None = None
) -> Pruned:
    """Mask (by the method, unless `keep` is given), then refit one linear.

    Nothing to remove: nothing changes, whatever the method. An expert's linear with too few tokens is pruned
    by a method that needs fewer, and the report says so.
    """
    weight, stats = site.weight, site.stats
    if target.sparsity == 0:
        return Pruned(weight, torch.ones_like(weight, dtype=torch.bool))
    instead = _instead(site, recipe)
    if keep is not None:
        keep = keep.to(weight.device)
        pruned = Pruned(zero_removed(weight, keep), keep)
    elif instead:
        method = weight_method(instead)
        pruned = method.prune(weight, stats, target, method.Config())
    else:
        pruned = weight_method(recipe.method).prune(weight, stats, target, recipe.config)
    refit = refit_method(recipe.refit)
    if refit is not None and stats is not None and not instead:
        pruned = refit.refit(weight, pruned, stats, recipe.refit_config)
    report = dict(pruned.report)
    if stats is not None and len(probe := stats.probe()):
        report["relative_error"] = relative_error(weight, pruned.weight, probe)
    if site.routed and stats is not None:
        report |= {"routed_tokens": stats.count, **({f"by_{instead}": 1} if instead else {})}
    if isinstance(target.pattern, Tile):
        report["dense_tiles"] = target.dense_of(target.pattern.count(*weight.shape))
    return dataclasses.replace(pruned, report=report)


def _instead(site: Site, recipe: PruneRecipe) -> str | None:
    """The method for an expert's linear that has too few tokens for the recipe's; None if it has enough."""
    stats = site.stats
    if stats is None or not site.routed:
        return None
    if stats.count < LEAST_TOKENS:
        return "magnitude"
    fitted = "gram" in recipe.needs  # and if it is, held-out tokens do not count
    few = fitted and stats.fitting().count < recipe.expert_tokens * site.weight.shape[1]
    return "wanda" if few else None
