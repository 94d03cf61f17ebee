"""The fewest bytes read per token that a perplexity allows: what is tried, in which order, what is kept.

What is free follows from the recipe:

- `sparsify` (but rsparse's): its sparsity, in hundredths, by bisection. It is calibrated once, at what the
  recipe says; other sparsities are read off the stored curves, which keeps the proportions of the gates.
- `prune` (unstructured, or tiles chosen by score): its sparsity, and its allocation unless the recipe names
  one. Every point is pruned anew. Alone, by bisection in steps of PRUNE_STEP; with `sparsify`, downhill in
  steps of COARSE and then half of that, at the best sparsity of activations each, and once not at all.
- All else stays as the recipe says, the bits of the KV cache too: bytes per token are those of weights.

Bisection takes perplexity to rise with sparsity, going downhill takes bytes to have one minimum besides. A
point is a checkpoint as it would be published, and measured as such.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsqueeze.artifact import add_to_last_step, check_output, publish_directory
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.compress import BlockDone, check_not_inside
from llmsqueeze.errors import RecipeError
from llmsqueeze.evaluate import perplexity
from llmsqueeze.methods.base import Target, Tile
from llmsqueeze.methods.greedy import MOST
from llmsqueeze.policy import DEFAULT_GATE, Policy
from llmsqueeze.recipe import PruneRecipe
from llmsqueeze.runtime import load
from llmsqueeze.runtime.gates import gating_of
from llmsqueeze.runtime.kv_cache import attached_cache
from llmsqueeze.sparsify import change_sparsity
from llmsqueeze.sparsify_recipe import SparsifyRecipe
from llmsqueeze.step_recipes import Step
from llmsqueeze.steps import run_steps
from llmsqueeze.traffic import bytes_per_token

PRUNE_STEP = 0.0125
COARSE = 0.1
# No row keeps less: beyond, what is left is no model that a perplexity near 1 could ask for.
MOST_PRUNED, MOST_TILES = 0.9, 0.5
SHAPED = {"unstructured": ("uniform", "owl", "alpha"), "tile": ("benefit", "uniform")}


@dataclass(frozen=True)
class Goal:
    """ratio: of perplexities, compressed to dense, at most. tokens: [windows, L] to measure on."""

    ratio: float
    tokens: Tensor
    dtype: torch.dtype
    kernels: bool


@dataclass(frozen=True)
class Point:
    """What was tried. settings: keys of the recipe and their values; ratio: of perplexities."""

    settings: dict[str, Any]
    bytes_per_token: int
    ratio: float
    within: bool


@dataclass(frozen=True)
class Found:
    """best: None if no point was within the goal; then nothing was written. verified: the ratio of the best
    in its final form, measured again."""

    points: list[Point]
    best: Point | None
    dense_token_ppl: float
    verified: float | None


def bisect(values: Sequence[float], within: Callable[[float], bool], first: float) -> float | None:
    """The largest of ascending `values` that is within, if all smaller ones are; None if the least is not.

    first: the value to begin with, where something is known already.
    """
    low, high = -1, len(values)  # within up to low, not from high on
    at = min(range(len(values)), key=lambda i: abs(values[i] - first))
    while low + 1 < high:
        if within(values[at]):
            low = at
        else:
            high = at
        at = (low + high) // 2
    return values[low] if low >= 0 else None


def descend(
    cost: Callable[[float], float], first: float, step: float, low: float, high: float
) -> float:
    """The value in [low, high] of least cost if there is one minimum: from `first` in steps, then half ones.

    Where `first` has no finite cost, down to the first that has.
    """
    best = first
    while math.isinf(cost(best)) and best > low:
        best = round(max(best - step, low), 6)
    for width in (step, step / 2):
        for direction in (-width, width):
            while True:
                after = round(min(max(best + direction, low), high), 6)
                if after == best or not cost(after) < cost(best):
                    break
                best = after
    return best


def free_settings(steps: list[Step]) -> tuple[PruneRecipe | None, SparsifyRecipe | None]:
    """The recipes whose sparsity may be changed. RecipeError if there are none."""
    prune, gates = None, None
    for step in steps:
        recipe = step.recipe
        if isinstance(recipe, PruneRecipe) and recipe.tiles == "score":
            prune = recipe if recipe.target.pattern_name in SHAPED else None
        if isinstance(recipe, SparsifyRecipe) and recipe.method != "rsparse":
            gates = recipe
    if not (prune or gates):
        raise RecipeError(
            "--target-ppl-ratio: this recipe has no sparsity to search; it needs sparsify (not rsparse), or "
            "prune with pattern unstructured or tile"
        )
    return prune, gates


class Search:
    """One search. names: allocations of pruning to try, besides the recipe's."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        source_name: str,
        steps: list[Step],
        goal: Goal,
        device: torch.device,
        directory: Path,
        note: Callable[[str], None],
        on_block: Callable[[str, BlockDone], None],
        on_point: Callable[[Point], None],
    ) -> None:
        self.checkpoint, self.source_name, self.steps = checkpoint, source_name, steps
        self.goal, self.device, self.directory = goal, device, directory
        self.note, self.on_block, self.on_point = note, on_block, on_point
        self.prune, self.gates = free_settings(steps)
        self.points: list[Point] = []
        self.best: Point | None = None
        self.kept = directory / "best"
        self.dense = self.measure(checkpoint)
        self._costs: dict[tuple[float, str], float] = {}

    def run(self, allocations: Sequence[str]) -> None:
        """Try points; afterwards `best` is the best of them, and lies at `kept`."""
        if self.prune is None:
            self.cost(0.0, "")
            return
        target, allocation = self.prune.target, self.prune.allocation
        most = MOST_TILES if isinstance(target.pattern, Tile) else MOST_PRUNED
        if self.gates:
            at = descend(
                lambda p: self.cost(p, allocation), round(target.sparsity, 6), COARSE, 0.0, most
            )
            # Where few zeros save nothing, bytes have a second minimum: at none.
            if self.cost(0.0, allocation) < self.cost(at, allocation):
                at = 0.0
            for other in allocations if at else ():
                self.cost(at, other)
            return

        def within(allocation: str) -> Callable[[float], bool]:
            return lambda pruned: self.cost(pruned, allocation) < math.inf

        grid = [round(i * PRUNE_STEP, 6) for i in range(1, round(most / PRUNE_STEP) + 1)]
        found = bisect(grid, within(allocation), target.sparsity)
        for other in allocations:
            beyond = [p for p in grid if found is None or p > found]
            # Only what is more than before is of use: one step further tells whether there is any.
            if beyond and within(other)(beyond[0]):
                found = bisect(beyond, within(other), beyond[0])

    def cost(self, pruned: float, allocation: str) -> float:
        """Bytes per token of the best point with so much pruned; infinite if none is within the goal."""
        key = (pruned, allocation)
        if key not in self._costs:
            self._costs[key] = self._try(pruned, allocation)
        return self._costs[key]

    def measure(self, checkpoint: Checkpoint) -> float:
        """token_ppl as `eval` has it: its gates, and every update of the KV cache quantised."""
        model = load(checkpoint, self.goal.dtype, self.device, kernels=self.goal.kernels)
        gating = gating_of(model)
        if gating:
            gating.policy = Policy.parse(DEFAULT_GATE)

        def new_cache() -> Any:
            return attached_cache(model)

        cache = new_cache if checkpoint.kv_cache else None
        return perplexity(model, self.goal.tokens, cache=cache).token_ppl

    def _try(self, pruned: float, allocation: str) -> float:
        """Do the steps, then, if there are gates, find how much they may drop."""
        settings: dict[str, Any] = {}
        steps = self.steps
        if self.prune:
            settings = {"prune.target.sparsity": pruned, "prune.allocation": allocation}
            changed = [self._changed(step, pruned, allocation) for step in steps]
            steps = [step for step in changed if step]
        base = self.directory / "base"
        try:
            run_steps(
                self.checkpoint, self.source_name, base, steps, self.device,
                note=self.note, on_block=self.on_block,
            )  # fmt: skip
            if self.gates is None:
                point = self._point(base, settings)
                return float(point.bytes_per_token) if point.within else math.inf
            return self._drop(base, settings, self.gates.sparsity)
        finally:
            shutil.rmtree(base, ignore_errors=True)

    def _drop(self, base: Path, settings: dict[str, Any], calibrated: float) -> float:
        """The fewest bytes within the goal that the gates of `base` can be set to."""
        grid = sorted({*(i / 100 for i in range(round(MOST * 100) + 1)), calibrated})
        known: dict[float, Point] = {}

        def within(share: float) -> bool:
            path = base
            if share != calibrated:
                path = self.directory / "changed"
                change_sparsity(
                    Checkpoint(base), self.source_name, path, share, None, overwrite=path.exists()
                )
            known[share] = self._point(path, {**settings, "sparsify.sparsity": share})
            return known[share].within

        found = bisect(grid, within, calibrated)
        return float(known[found].bytes_per_token) if found is not None else math.inf

    def _point(self, path: Path, settings: dict[str, Any]) -> Point:
        """Measure a checkpoint, and keep it if none before was better."""
        made = Checkpoint(path)
        ratio = self.measure(made) / self.dense
        point = Point(settings, bytes_per_token(made), ratio, ratio <= self.goal.ratio)
        self.points.append(point)
        self.on_point(point)
        if point.within and (
            self.best is None or point.bytes_per_token < self.best.bytes_per_token
        ):
            self.best = point
            shutil.rmtree(self.kept, ignore_errors=True)
            shutil.copytree(path, self.kept)
        return point

    def _changed(self, step: Step, pruned: float, allocation: str) -> Step | None:
        """A step at this point; None for pruning nothing."""
        recipe = step.recipe
        if not isinstance(recipe, PruneRecipe):
            return step
        if not pruned:
            return None
        target = Target(pruned, recipe.target.pattern)
        raw = dataclasses.replace(recipe, target=target).to_dict()
        raw["allocation"] = allocation
        if allocation != recipe.allocation:
            raw.pop("allocation_config", None)
        return Step(step.command, PruneRecipe.from_dict(raw))


def search(
    checkpoint: Checkpoint,
    source_name: str,
    out: Path,
    steps: list[Step],
    goal: Goal,
    device: torch.device,
    *,
    named_allocation: bool,
    describe: dict[str, Any],
    overwrite: bool = False,
    note: Callable[[str], None] = lambda message: None,
    on_block: Callable[[str, BlockDone], None] = lambda command, done: None,
    on_point: Callable[[Point], None] = lambda point: None,
) -> Found:
    """Write the checkpoint with the fewest bytes per token within the goal to `out`; nothing if none is.

    named_allocation: whether the recipe says how pruning is allocated. describe: of goal and text, for the
    manifest. What is to be published is measured once more, and is not if that misses the goal.
    """
    check_output(out, overwrite)
    check_not_inside(out, checkpoint.path)
    free_settings(steps)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=out.parent, prefix=f".{out.name}.", suffix=".search"
    ) as directory:
        run = Search(
            checkpoint, source_name, steps, goal, device, Path(directory), note, on_block, on_point
        )
        others: list[str] = []
        if run.prune and not named_allocation:
            shapes = SHAPED[run.prune.target.pattern_name]
            others = [name for name in shapes if name != run.prune.allocation]
        run.run(others)
        verified = None
        if run.best:
            points = [dataclasses.asdict(point) for point in run.points]
            add_to_last_step(
                run.kept, "search", {**describe, "dense_token_ppl": run.dense, "points": points}
            )
            verified = run.measure(Checkpoint(run.kept)) / run.dense
            if verified > goal.ratio:  # a device that does not compute the same twice
                return Found(run.points, None, run.dense, verified)
            check_output(out, overwrite)
            publish_directory(run.kept, out)
    return Found(run.points, run.best, run.dense, verified)
