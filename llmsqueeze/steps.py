"""Several kinds of compression as one request: each step on what the one before made, one checkpoint out.

Pruning, rounding and thresholds are one walk over the model: a block's thresholds are calibrated as soon as
it is pruned and rounded, each step on activations of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmsqueeze.artifact import check_output
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.compress import BlockDone, Pruning, check_not_inside, prune, versions
from llmsqueeze.device import exact_matmul, worker
from llmsqueeze.encode_recipe import EncodeRecipe
from llmsqueeze.encoded import encode
from llmsqueeze.errors import RecipeError, Stopped
from llmsqueeze.fingerprint import Fingerprint
from llmsqueeze.kv_recipe import KvRecipe
from llmsqueeze.quantize_kv import quantize_kv
from llmsqueeze.recipe import PruneRecipe
from llmsqueeze.shards import hash_file
from llmsqueeze.sparsify import sparsify
from llmsqueeze.sparsify_recipe import SparsifyRecipe
from llmsqueeze.streamed import StreamedCheckpoint
from llmsqueeze.work import Work

# In the order in which they are done: thresholds and codebooks are calibrated on the weights that will run.
Recipe = PruneRecipe | EncodeRecipe | SparsifyRecipe | KvRecipe
RECIPES: dict[str, type[Recipe]] = {
    "prune": PruneRecipe,
    "encode": EncodeRecipe,
    "sparsify": SparsifyRecipe,
    "quantize-kv": KvRecipe,
}


@dataclass(frozen=True)
class Step:
    """command: of RECIPES; recipe: its recipe."""

    command: str
    recipe: Recipe


def parse_steps(raw: dict[str, Any]) -> list[Step]:
    """From a mapping of commands to their recipes, or from a checkpoint's manifest; RecipeError on others.

    A manifest says how its checkpoint was made, so the same is done again.
    """
    if isinstance(raw.get("steps"), list) and "format_version" in raw:
        given = [(entry.get("command"), entry.get("recipe")) for entry in raw["steps"]]
    else:
        given = list(raw.items())
    commands = [command for command, _ in given]
    for command, recipe in given:
        if command not in RECIPES:
            raise RecipeError(f"recipe: {command!r} is no step; steps are {', '.join(RECIPES)}")
        if commands.count(command) > 1:
            raise RecipeError(f"recipe: {command} is there twice; do the second by the command")
        if recipe is not None and not isinstance(recipe, dict):
            raise RecipeError(f"recipe: {command}: not a mapping of recipe keys to values")
        if recipe and recipe.get("method", "") is None:
            raise RecipeError(
                f"recipe: {command} only read thresholds off stored curves; name its method"
            )
    if not given:
        raise RecipeError(f"recipe: no step; steps are {', '.join(RECIPES)}")
    recipes = dict(given)
    return [
        Step(command, kind.from_dict(recipes[command] or {}))
        for command, kind in RECIPES.items()
        if command in recipes
    ]


def run_steps(
    checkpoint: Checkpoint,
    source_name: str,
    out: Path,
    steps: list[Step],
    device: torch.device,
    *,
    overwrite: bool = False,
    work: Work | None = None,
    note: Callable[[str], None] = lambda message: None,
    on_block: Callable[[str, BlockDone], None] = lambda command, done: None,
) -> dict[tuple[str, ...], float]:
    """Do the steps; seconds of each walk, by its commands: of those that an earlier run had not done.

    What lies between walks stands in the work folder until the end; see compress.prune for `work`. The
    checkpoint is the one that the commands would have made one after another.
    """
    check_output(out, overwrite)
    check_not_inside(out, checkpoint.path)
    seconds: dict[tuple[str, ...], float] = {}
    stages = _stages(steps)
    work = work or Work(out, device)
    with work, worker() as hashing:
        source = Fingerprint(checkpoint.identity, hashing)
        work.begin(lambda: {**_identity(steps), "source": source.sha256})
        for index, stage in enumerate(stages):
            began = time.monotonic()
            last = index + 1 == len(stages)
            command = stage[-1].command
            target = out if last else work.folder / command
            if target.exists() and not last:
                checkpoint = Checkpoint(target)
                continue
            part = work.child(command, target)
            _run(stage, checkpoint, source_name, part, device, overwrite and last, note, on_block)
            seconds[tuple(step.command for step in stage)] = time.monotonic() - began
            if not last:
                work.commit()
                checkpoint = Checkpoint(target)
                if work.stopping:
                    raise Stopped(f"stopped after {command}; the same command goes on from there")
    return seconds


def _identity(steps: list[Step]) -> dict[str, Any]:
    """What the steps depend on, the source's files aside; every step adds to that when it is done."""
    texts = {
        str(text)
        for step in steps
        if (text := getattr(getattr(step.recipe, "calibration", None), "text", None))
    }
    return {
        "command": "compress",
        "recipe": {step.command: step.recipe.to_dict() for step in steps},
        "texts": {text: hash_file(Path(text)) for text in sorted(texts) if Path(text).is_file()},
        "versions": versions(),
    }


def _stages(steps: list[Step]) -> list[list[Step]]:
    """Steps that are done in one walk over the model together: those before sparsify, with it."""
    stages: list[list[Step]] = []
    for index, step in enumerate(steps):
        if step.command == "sparsify":
            # A rotation rewrites all weights before it calibrates: it needs those of pruning in a file.
            assert isinstance(step.recipe, SparsifyRecipe)
            together = [s for s in steps[:index] if s.command == "encode" or not step.recipe.rotate]
            stages = [[s] for s in steps[:index] if s not in together]
            stages.append([*together, step])
        else:
            stages.append([step])
    return stages


def _run(
    stage: list[Step],
    checkpoint: Checkpoint,
    source_name: str,
    work: Work,
    device: torch.device,
    overwrite: bool,
    note: Callable[[str], None],
    on_block: Callable[[str, BlockDone], None],
) -> None:
    out = work.out
    step = stage[-1]
    recipe = step.recipe
    encoding = next((s.recipe for s in stage if isinstance(s.recipe, EncodeRecipe)), None)

    def done(block: BlockDone) -> None:
        on_block(step.command, block)

    common: dict[str, Any] = {
        "overwrite": overwrite,
        "work": work,
        "note": note,
        "on_block": done,
    }
    first = stage[0].recipe
    if isinstance(recipe, SparsifyRecipe) and isinstance(first, PruneRecipe):
        pruning = Pruning(checkpoint, first, device, work, note=note)
        pruning.prepare()
        with worker() as hashing, exact_matmul():
            streamed = StreamedCheckpoint(
                pruning, source_name, hashing, lambda block: on_block("prune", block)
            )
            sparsify(streamed, source_name, out, recipe, device, encode=encoding, **common)
    elif isinstance(recipe, PruneRecipe):
        prune(checkpoint, source_name, out, recipe, device, **common)
    elif isinstance(recipe, SparsifyRecipe):
        sparsify(checkpoint, source_name, out, recipe, device, encode=encoding, **common)
    elif isinstance(recipe, EncodeRecipe):
        encode(checkpoint, source_name, out, recipe, **common)
    else:
        quantize_kv(checkpoint, source_name, out, recipe, device, **common)
