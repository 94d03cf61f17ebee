"""Learned tile masks of a checkpoint: Wanda's masks and tile benefits first, then training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llmsqueeze.calibrate import walk
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.methods import tile_benefit
from llmsqueeze.methods.base import Target, Tile
from llmsqueeze.methods.select import choose
from llmsqueeze.recipe import PruneRecipe
from llmsqueeze.runtime import load
from llmsqueeze.train import StepDone, TrainedMasks, train_masks


def learn_masks(
    checkpoint: Checkpoint,
    sites: set[str],
    tokens: Tensor,
    recipe: PruneRecipe,
    dtype: torch.dtype,
    device: torch.device,
    batch: int,
    state: Path | None,
    on_step: Callable[[StepDone], None],
    stop: Callable[[], bool],
) -> TrainedMasks:
    """Keep masks for every site, trained on the calibration tokens. The whole model is on `device`.

    batch: samples per forward pass before training. state: a directory that training is saved to and goes on
    from. stop: see train.train_masks.
    """
    pattern = recipe.target.pattern
    assert isinstance(pattern, Tile)
    whole = Target(pattern.inner.sparsity, pattern.inner)
    keeps: dict[str, Tensor] = {}
    benefits: dict[str, Tensor] = {}
    config = tile_benefit.Config()
    needs = tile_benefit.needs(config)
    for block in walk(checkpoint, tokens, needs, dtype, device, batch, "block", sites=sites):
        seen = {s.name: (s.weight, s.stats) for s in block.sites if s.name in sites}
        measured = tile_benefit.measure(seen, recipe.target, config)
        for name, (weight, stats) in seen.items():
            assert stats is not None
            keeps[name] = choose(weight.float().abs() * stats.rms, whole).cpu()
            down = -(-weight.shape[0] // pattern.size)
            benefits[name] = measured[name].reshape(down, -1).float()
    model = load(checkpoint, dtype, device)
    return train_masks(
        model,
        keeps,
        tokens,
        recipe.target,
        recipe.tiles_config,
        device,
        benefits=benefits,
        state=state,
        on_step=on_step,
        stop=stop,
    )
