"""What is decided before the first weight changes: sites, tokens, how much goes where, how much memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from llmsqueeze import footprint
from llmsqueeze.allocator import trim
from llmsqueeze.blocks import batch_samples
from llmsqueeze.calibrate import walk
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.data import Windows, calibration_windows, load_tokenizer
from llmsqueeze.errors import CheckpointError, RecipeError
from llmsqueeze.methods import allocation_method
from llmsqueeze.methods.base import Target
from llmsqueeze.parking import ON_DEVICE, Parking
from llmsqueeze.parts import cut_parts
from llmsqueeze.ranks import ALONE, Team
from llmsqueeze.recipe import Calibration, PruneRecipe, allocation_needs, is_ignored
from llmsqueeze.work import Trail

DEFAULT_SEQLEN = 2048


def choose_sites(checkpoint: Checkpoint, recipe: PruneRecipe) -> set[str]:
    """Names of the linears to prune: those of the blocks less the ignored, checked against the pattern.

    RecipeError where the recipe does not fit the checkpoint.
    """
    if checkpoint.mixture and recipe.tiles != "score":
        raise RecipeError(
            f"--tiles {recipe.tiles} trains no masks of experts yet; leave it out to choose tiles by score"
        )
    unused = set(recipe.ignore)
    for name, _ in checkpoint.model.named_modules():
        unused -= set(is_ignored(name, recipe.ignore))
    if unused:
        raise RecipeError(f"--ignore {sorted(unused)[0]}: no module of this checkpoint matches")
    sites: set[str] = set()
    pattern = recipe.target.pattern
    for index in range(checkpoint.block_count):
        for name, linear in checkpoint.linears(index).items():
            if is_ignored(name, recipe.ignore):
                continue
            misfit = pattern.misfit(linear.out_features, linear.in_features) if pattern else None
            if misfit:
                raise RecipeError(
                    f"{misfit} of {name}; choose another pattern, or leave it dense with --ignore"
                )
            sites.add(name)
    if not sites:
        raise RecipeError("--ignore leaves nothing to prune")
    return sites


def check_gates(checkpoint: Checkpoint) -> None:
    """RecipeError when no activation gates can be put into the checkpoint."""
    if checkpoint.mixture:
        raise RecipeError(
            "sparsify has no gates for experts yet, which most weights belong to; prune and quantize-kv take "
            "such checkpoints"
        )


def samples_at_once(asked: int, tokens: Tensor | None, device: torch.device) -> int:
    """Samples per forward pass: what was asked, or what suits the device; never more than there are."""
    if tokens is None:
        return 1
    return min(asked or batch_samples(tokens.shape[1], device), tokens.shape[0])


def held_out_samples(recipe: PruneRecipe) -> int:
    """Calibration samples that a refit is judged on instead of fitted to: an eighth, at least one."""
    samples = recipe.calibration.samples
    return max(1, samples // 8) if recipe.refit != "none" and samples > 1 else 0


def largest_share(tokens: Tensor, batch: int, recipe: PruneRecipe, ranks: int) -> Tensor:
    """As many samples as the rank has that has most: parts of them go round whole."""
    parts = cut_parts(tokens, batch, held_out_samples(recipe))
    return tokens[: max(sum(len(p.samples) for p in parts[i::ranks]) for i in range(ranks))]


def memory_estimate(
    checkpoint: Checkpoint,
    recipe: PruneRecipe,
    tokens: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    *,
    parked: bool = False,
) -> int:
    """Bytes that calibration will hold on `device` at its peak, from shapes alone. parked: activations wait
    elsewhere."""
    followed = 2 if "product" in recipe.needs and recipe.dense_share else 1
    samples, seqlen = tokens.shape
    walk = footprint.Walk.of(samples, seqlen, recipe.batch, dtype, device, followed, parked)
    held = footprint.prune_bytes(checkpoint, recipe, walk, held_out_samples(recipe))
    if recipe.order == "block":  # the sums of all experts of a block are gathered together
        sums = 4 if "product" in recipe.needs else 1 if "gram" in recipe.needs else 0
        blocks = (routed_inputs(checkpoint, i) for i in range(checkpoint.block_count))
        held += sums * 4 * max(sum(width**2 for width, _ in inputs) for inputs in blocks)
    return max(footprint.embedding_bytes(checkpoint, walk), held)


def routed_inputs(checkpoint: Checkpoint, index: int) -> list[tuple[int, float]]:
    """Width and share of all tokens of every input group of one block's experts."""
    if not checkpoint.mixture:
        return []
    shares = checkpoint.routed_shares
    return [
        (module.in_features, shares[f"{name}.weight"])
        for name, module in checkpoint.linears(index).items()
        if f"{name}.weight" in shares and not name.endswith("." + checkpoint.mixture.up)
    ]


def allocate(
    checkpoint: Checkpoint,
    sites: set[str],
    tokens: Tensor | None,
    recipe: PruneRecipe,
    dtype: torch.dtype,
    device: torch.device,
    batch: int,
    trail: Trail,
    team: Team = ALONE,
    parking: Parking = ON_DEVICE,
) -> dict[str, Target]:
    """A target for every site. An allocation other than uniform looks at the dense model first.

    batch: samples per forward pass. trail: what that look is kept in, and goes on from. team, parking: see
    walk.
    """
    allocation = allocation_method(recipe.allocation)
    if allocation is None or recipe.target.sparsity == 0:
        return dict.fromkeys(sites, recipe.target)
    measured: list[Any] = list(trail.found.get("measured", ()))
    shapes: list[dict[str, tuple[int, int]]] = list(trail.found.get("shapes", ()))

    def capture() -> dict[str, Any]:
        return {"measured": list(measured), "shapes": list(shapes)}

    needs = allocation.needs(recipe.allocation_config)
    for block in walk(
        checkpoint,
        tokens,
        needs,
        dtype,
        device,
        batch,
        "block",
        sites=sites,
        start=trail.start,
        team=team,
        parking=parking,
    ):
        seen = {s.name: (s.weight, s.stats) for s in block.sites if s.name in sites}
        if seen:
            measured.append(allocation.measure(seen, recipe.target, recipe.allocation_config))
            shapes.append({name: tuple(weight.shape) for name, (weight, _) in seen.items()})
        if block.after.done == checkpoint.block_count:
            trail.keep(block.after, capture())
        else:
            trail.reached(block.after, capture)
    return allocation.assign(measured, shapes, recipe.target, recipe.allocation_config)


def calibration(
    checkpoint: Checkpoint, recipe: PruneRecipe
) -> tuple[PruneRecipe, Tensor | None, dict[str, Any] | None]:
    """The recipe with its window length resolved, the tokens, and their description."""
    if not recipe.needs and not allocation_needs(recipe):
        return recipe, None, None
    resolved, windows = calibration_tokens(checkpoint, recipe.calibration)
    recipe = dataclasses.replace(recipe, calibration=resolved)
    return recipe, windows.tokens, windows.describe()


def calibration_tokens(checkpoint: Checkpoint, asked: Calibration) -> tuple[Calibration, Windows]:
    """What was asked for with its window length resolved, and the windows."""
    seqlen = window_length(checkpoint, asked.seqlen)
    windows = calibration_windows(
        asked.text,
        load_tokenizer(checkpoint.path),
        samples=asked.samples,
        seqlen=seqlen,
        seed=asked.seed,
        bos=asked.bos,
    )
    check_vocabulary(windows.tokens, checkpoint)
    trim()  # texts as lists of tokens leave much behind
    return dataclasses.replace(asked, seqlen=seqlen), windows


def window_length(checkpoint: Checkpoint, asked: int | None) -> int:
    """Tokens per window: what was asked, else 2048 or the most positions the model has.

    Never simply max_position_embeddings: 131072 tokens a sample help no statistic and fill memory.
    """
    longest = checkpoint.config.get("max_position_embeddings")
    if not isinstance(longest, int):
        return asked or DEFAULT_SEQLEN
    if asked is not None and asked > longest:
        raise RecipeError(
            f"--seqlen {asked} exceeds the {longest} positions this model was built for"
        )
    return asked or min(DEFAULT_SEQLEN, longest)


def check_vocabulary(tokens: Tensor, checkpoint: Checkpoint) -> None:
    """CheckpointError when the tokenizer produces ids that the embedding does not have."""
    rows = checkpoint.model.get_input_embeddings().weight.shape[0]
    if int(tokens.max()) >= rows:
        raise CheckpointError(
            f"{checkpoint.path}: the tokenizer gives id {int(tokens.max())}, the embedding has "
            f"{rows} rows; tokenizer and weights do not belong together"
        )
