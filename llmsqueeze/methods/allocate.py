"""What allocations share: from a figure per block to a target per site that the whole model meets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from llmsqueeze.errors import RecipeError
from llmsqueeze.methods.base import Target

# A block that loses all its weights would no longer pass anything on.
MOST = 0.99

# Halvings of a bracket: more than an fp64 can tell apart, wherever in it the answer lies.
_HALVINGS = 200


def check_unstructured(target: Target, allocation: str) -> None:
    """RecipeError on a pattern: it fixes how much every site loses."""
    if target.pattern is not None:
        raise RecipeError(
            f"{allocation} moves sparsity between blocks, which pattern {target.pattern} fixes; "
            "use --pattern unstructured"
        )


def block_sizes(shapes: list[dict[str, tuple[int, int]]]) -> list[int]:
    """Weights to prune in each block."""
    return [sum(rows * columns for rows, columns in block.values()) for block in shapes]


def block_targets(
    sparsities: list[float], shapes: list[dict[str, tuple[int, int]]], target: Target
) -> dict[str, Target]:
    """The target of every site: all sites of a block get the sparsity of the block."""
    return {
        name: dataclasses.replace(target, sparsity=sparsity)
        for sparsity, block in zip(sparsities, shapes, strict=True)
        for name in block
    }


def unit_range(values: list[float | None]) -> list[float]:
    """values mapped linearly onto [0, 1]. None becomes 0.5, as does everything if all are equal."""
    known = [value for value in values if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    if low == high:
        return [0.5] * len(values)
    return [0.5 if value is None else (value - low) / (high - low) for value in values]


def shift_to_mean(
    raw: list[float], sizes: list[int], mean: float, low: float, high: float
) -> list[float]:
    """raw + c, clipped to [low, high], with the c that makes the mean weighted by `sizes` the wanted one.

    raw: finite, of order 1; sizes: not negative. Such a c exists, whatever raw is, if low <= mean <=
    high; ValueError otherwise. Keeps the order; equal values give `mean` to the bit.
    """
    _check_bounds(mean, low, high)
    if len(set(raw)) <= 1:
        return [mean] * len(raw)
    steps = low - max(raw), high - min(raw)
    return _meet(lambda c: [value + c for value in raw], steps, sizes, mean, low, high)


def scale_to_mean(
    raw: list[float], sizes: list[int], mean: float, low: float, high: float
) -> list[float]:
    """raw · c, clipped to [low, high]; otherwise like `shift_to_mean`. raw: positive; low: not negative."""
    _check_bounds(mean, low, high)
    if len(set(raw)) <= 1:
        return [mean] * len(raw)
    steps = low / max(raw), high / min(raw)
    return _meet(lambda c: [value * c for value in raw], steps, sizes, mean, low, high)


def _check_bounds(mean: float, low: float, high: float) -> None:
    if not low <= mean <= high:
        raise ValueError(f"no values within [{low}, {high}] have the mean {mean}")


def _meet(
    moved: Callable[[float], list[float]],
    steps: tuple[float, float],
    sizes: list[int],
    mean: float,
    low: float,
    high: float,
) -> list[float]:
    """Clipped moved(c), which grows with c, of the wanted mean: all `low` at steps[0], `high` at [1]."""

    def clipped(c: float) -> list[float]:
        return [min(max(value, low), high) for value in moved(c)]

    below, above = steps
    for _ in range(_HALVINGS):
        middle = (below + above) / 2
        total = math.fsum(v * n for v, n in zip(clipped(middle), sizes, strict=True))
        if total < mean * sum(sizes):
            below = middle
        else:
            above = middle
    return clipped(above)


def tile_areas(rows: int, columns: int, size: int) -> list[int]:
    """Weights in each size × size tile of a [rows, columns] matrix, row-major; edge tiles are ragged."""
    heights = [min(size, rows - top) for top in range(0, rows, size)]
    widths = [min(size, columns - left) for left in range(0, columns, size)]
    return [height * width for height in heights for width in widths]
