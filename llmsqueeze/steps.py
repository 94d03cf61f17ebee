"""Several kinds of compression as one request: each step on what the one before made, one checkpoint out.

Pruning, rounding and thresholds are one walk over the model: a block's thresholds are calibrated as soon as
it is pruned and rounded, each step on activations of its own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmsqueeze.artifact import check_output
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.compress import BlockDone, Pruning, check_not_inside, prune
from llmsqueeze.device import exact_matmul, worker
from llmsqueeze.encode_recipe import EncodeRecipe
from llmsqueeze.encoded import encode
from llmsqueeze.quantize_kv import quantize_kv
from llmsqueeze.recipe import PruneRecipe
from llmsqueeze.sparsify import change_sparsity, sparsify
from llmsqueeze.sparsify_recipe import SparsifyRecipe, ThresholdsRecipe
from llmsqueeze.step_recipes import Step
from llmsqueeze.streamed import StreamedCheckpoint


@dataclass(frozen=True)
class Walk:
    """commands: of the steps that were done together."""

    commands: tuple[str, ...]
    seconds: float


def run_steps(
    checkpoint: Checkpoint,
    source_name: str,
    out: Path,
    steps: list[Step],
    device: torch.device,
    *,
    overwrite: bool = False,
    note: Callable[[str], None] = lambda message: None,
    on_block: Callable[[str, BlockDone], None] = lambda command, done: None,
) -> list[Walk]:
    """Do the steps.

    What lies between walks stands beside `out` until the end. The checkpoint is the one that the commands
    would have made one after another.
    """
    check_output(out, overwrite)
    check_not_inside(out, checkpoint.path)
    walks: list[Walk] = []
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=out.parent, prefix=f".{out.name}.", suffix=".steps"
    ) as directory:
        stages = _stages(steps)
        for index, stage in enumerate(stages):
            began = time.monotonic()
            last = index + 1 == len(stages)
            target = out if last else Path(directory) / str(index)
            _run(stage, checkpoint, source_name, target, device, overwrite and last, note, on_block)
            walks.append(Walk(tuple(step.command for step in stage), time.monotonic() - began))
            if not last:
                checkpoint = Checkpoint(target)
    return walks


def _stages(steps: list[Step]) -> list[list[Step]]:
    """Steps that are done in one walk over the model together: pruning and rounding, with a sparsify next."""
    stages: list[list[Step]] = []
    for step in steps:
        together: list[Step] = []
        if isinstance(step.recipe, SparsifyRecipe):
            if stages and isinstance(stages[-1][-1].recipe, EncodeRecipe):
                together = stages.pop()
            # A rotation rewrites all weights before it calibrates: it needs those of pruning in a file.
            before = stages[-1][-1].recipe if stages else None
            if isinstance(before, PruneRecipe) and not step.recipe.rotate:
                together = [*stages.pop(), *together]
        stages.append([*together, step])
    return stages


def _run(
    stage: list[Step],
    checkpoint: Checkpoint,
    source_name: str,
    out: Path,
    device: torch.device,
    overwrite: bool,
    note: Callable[[str], None],
    on_block: Callable[[str, BlockDone], None],
) -> None:
    step = stage[-1]
    recipe = step.recipe
    encoding = next((s.recipe for s in stage if isinstance(s.recipe, EncodeRecipe)), None)

    def done(block: BlockDone) -> None:
        on_block(step.command, block)

    common: dict[str, Any] = {"overwrite": overwrite, "on_block": done}
    first = stage[0].recipe
    if isinstance(recipe, SparsifyRecipe) and isinstance(first, PruneRecipe):
        pruning = Pruning(checkpoint, first, device, note=note)
        pruning.prepare()
        with worker() as hashing, exact_matmul():
            streamed = StreamedCheckpoint(
                pruning, source_name, hashing, lambda block: on_block("prune", block)
            )
            sparsify(
                streamed, source_name, out, recipe, device, encode=encoding, note=note, **common
            )
    elif isinstance(recipe, PruneRecipe):
        prune(checkpoint, source_name, out, recipe, device, note=note, **common)
    elif isinstance(recipe, SparsifyRecipe):
        sparsify(checkpoint, source_name, out, recipe, device, encode=encoding, note=note, **common)
    elif isinstance(recipe, EncodeRecipe):
        encode(checkpoint, source_name, out, recipe, note=note, **common)
    elif isinstance(recipe, ThresholdsRecipe):
        change_sparsity(
            checkpoint, source_name, out, recipe.sparsity, recipe.prefill, overwrite=overwrite
        )
    else:
        quantize_kv(checkpoint, source_name, out, recipe, device, **common)
