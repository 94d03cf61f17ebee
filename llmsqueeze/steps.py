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
from llmsqueeze.compress import BlockDone, Pruning, check_not_inside, prune
from llmsqueeze.computing import versions
from llmsqueeze.device import exact_matmul, worker
from llmsqueeze.encode_recipe import EncodeRecipe
from llmsqueeze.encoded import encode
from llmsqueeze.errors import Stopped
from llmsqueeze.fingerprint import Fingerprint
from llmsqueeze.plan import check_gates
from llmsqueeze.quantize_kv import quantize_kv
from llmsqueeze.recipe import PruneRecipe
from llmsqueeze.shards import hash_file
from llmsqueeze.sparsify import change_sparsity, sparsify
from llmsqueeze.sparsify_recipe import SparsifyRecipe, ThresholdsRecipe
from llmsqueeze.step_recipes import Step, resolved
from llmsqueeze.streamed import StreamedCheckpoint
from llmsqueeze.work import Work


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
    work: Work | None = None,
    note: Callable[[str], None] = lambda message: None,
    on_block: Callable[[str, BlockDone], None] = lambda command, done: None,
) -> list[Walk]:
    """Do the steps; the walks that an earlier run had not done.

    What lies between walks stands in the work folder until the end; see compress.prune for `work`. The
    checkpoint is the one that the commands would have made one after another.
    """
    check_output(out, overwrite)
    check_not_inside(out, checkpoint.path)
    if any(isinstance(step.recipe, SparsifyRecipe) for step in steps):
        check_gates(checkpoint)
    walks: list[Walk] = []
    stages = _stages(steps)
    work = work or Work(out, device)
    with work, worker() as hashing:
        source = Fingerprint(checkpoint.identity, hashing)
        work.begin(lambda: {**_identity(steps), "source": source.sha256})
        for index, stage in enumerate(stages):
            began = time.monotonic()
            last = index + 1 == len(stages)
            command = stage[-1].command
            name = f"{index}-{command}"  # a manifest may have done one twice
            target = out if last else work.folder / name
            if target.exists() and not last:
                checkpoint = Checkpoint(target)
                continue
            part = work.child(name, target)
            _run(stage, checkpoint, source_name, part, device, overwrite and last, note, on_block)
            walks.append(Walk(tuple(step.command for step in stage), time.monotonic() - began))
            if not last:
                work.commit()
                checkpoint = Checkpoint(target)
                if work.stopping:
                    raise Stopped(f"stopped after {command}; the same command goes on from there")
    return walks


def _identity(steps: list[Step]) -> dict[str, Any]:
    """What the steps depend on, the source's files aside; every step adds to that when it is done."""
    texts = {
        str(text)
        for step in steps
        if (text := getattr(getattr(step.recipe, "calibration", None), "text", None))
    }
    return {
        "command": "compress",
        "recipe": resolved(steps),
        "texts": {text: hash_file(Path(text)) for text in sorted(texts) if Path(text).is_file()},
        "versions": versions(),
    }


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
    elif isinstance(recipe, ThresholdsRecipe):
        change_sparsity(
            checkpoint,
            source_name,
            out,
            recipe.sparsity,
            recipe.prefill,
            overwrite=overwrite,
            work=work,
        )
    else:
        quantize_kv(checkpoint, source_name, out, recipe, device, **common)
