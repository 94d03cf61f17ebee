"""Tiles stay dense where 2:4 would cost most, over the whole model: PATCH (arXiv 2509.23410) untrained."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsqueeze.errors import RecipeError
from llmsqueeze.methods.allocate import tile_areas
from llmsqueeze.methods.base import Target, Tile

if TYPE_CHECKING:
    from torch import Tensor

    from llmsqueeze.numerics.stats import InputStats

# Between all linears alike (0), which favours small ones, and all weights alike (1). Chosen by
# perplexity on SmolLM2-135M, together with blocks counting alike; no theory says a half.
SIZE_EXPONENT = 0.5


@dataclass(frozen=True)
class Config:
    pass


def needs(config: Config) -> frozenset[str]:
    return frozenset({"sq_sum"})


def measure(
    sites: dict[str, tuple[Tensor, InputStats | None]], target: Target, config: Config
) -> dict[str, Tensor]:
    """Share of the block's avoidable error that each tile avoids, per weight: [tiles] fp64 per site.

    Tiles row-major. Removing weight ij costs W_ij² E[x_j²] of output energy. That is divided by
    the linear's sum over all ij: a factor in its weights or inputs, which norms undo, does not move
    dense tiles. Linears count with a power of their size, blocks alike: relative output errors do not
    tell which block the model can spare.
    """
    import torch

    from llmsqueeze.numerics import masks

    size = _size(target)
    benefits = {}
    avoidable = 0.0
    for name, (weight, stats) in sites.items():
        assert stats is not None
        score = weight.float().abs() * stats.rms
        energy = float(score.square().sum(dtype=torch.float64))
        # fp64: the order within a linear stays what keep_tiles will find.
        benefit = masks.tile_benefit(score, size).reshape(-1).cpu().double()
        if energy:
            benefit *= weight.numel() ** SIZE_EXPONENT / energy
        rows, columns = weight.shape
        area = torch.tensor(tile_areas(rows, columns, size), dtype=torch.float64)
        avoidable += float(benefit @ area)
        benefits[name] = benefit
    return {name: b / avoidable for name, b in benefits.items()} if avoidable else benefits


def assign(
    measured: list[dict[str, Tensor]],
    shapes: list[dict[str, tuple[int, int]]],
    target: Target,
    config: Config,
) -> dict[str, Target]:
    """Dense tiles of every site: the best per weight of the whole model, up to the target's area.

    Sparsity s means a dense share 1 - 2s of the area, met to half the area of the largest tile.
    Raises RecipeError on other patterns than tiles.
    """
    import torch

    size = _size(target)
    names = [name for block in shapes for name in block]
    area_lists = [tile_areas(*shape, size) for block in shapes for shape in block.values()]
    benefit = torch.cat(
        [block[name] for block, s in zip(measured, shapes, strict=True) for name in s]
    )
    area = torch.tensor([a for areas in area_lists for a in areas])
    site = torch.repeat_interleave(torch.tensor([len(areas) for areas in area_lists]))
    # Backwards: among equals keep_tiles keeps the last.
    order = benefit.numel() - 1 - benefit.flip(0).argsort(descending=True, stable=True)
    dense_area = torch.cat([area.new_zeros(1), area[order].cumsum(0)])
    wanted = (1 - 2 * target.sparsity) * float(area.sum())
    dense = order[: int((dense_area - wanted).abs().argmin())]
    counts = site[dense].bincount(minlength=len(names)).tolist()
    return {
        name: dataclasses.replace(target, dense_tiles=count)
        for name, count in zip(names, counts, strict=True)
    }


def _size(target: Target) -> int:
    if not isinstance(target.pattern, Tile):
        raise RecipeError(
            f"the tile benefit spreads dense tiles, which pattern {target.pattern_name} lacks; "
            "use --pattern tile"
        )
    return target.pattern.size
