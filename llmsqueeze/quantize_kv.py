"""KV-cache quantisation: checkpoint → codebooks calibrated block by block → the same weights, with them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsqueeze import card, plan
from llmsqueeze.artifact import ArtifactWriter, Manifest, check_output
from llmsqueeze.blocks import batch_samples, cut_batches, load_blocks
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.compress import (
    BlockDone,
    check_not_inside,
    copy_sides,
    copy_weights,
    peak_device_bytes,
    peak_rss_bytes,
    versions,
)
from llmsqueeze.device import calibration_dtype, exact_matmul
from llmsqueeze.errors import RecipeError
from llmsqueeze.kv_calibration import Seen, gradient_places, gradients, observe_block, tables
from llmsqueeze.kv_recipe import DEFAULT_SEQLEN, KvRecipe
from llmsqueeze.kv_record import KvRecord
from llmsqueeze.methods import CALIBRATED_KV, kvquant
from llmsqueeze.numerics.kv_codecs import Codebook, TokenCodec
from llmsqueeze.runtime import load
from llmsqueeze.runtime.spans import coded_spans
from llmsqueeze.shards import hash_file


@dataclass(frozen=True)
class Report:
    recipe: KvRecipe
    manifest: Manifest
    record: KvRecord
    seconds: float
    peak_rss_bytes: int
    peak_device_bytes: int | None


def quantize_kv(
    checkpoint: Checkpoint,
    source_name: str,
    out: Path,
    recipe: KvRecipe,
    device: torch.device,
    *,
    overwrite: bool = False,
    on_block: Callable[[BlockDone], None] = lambda done: None,
    on_gradient: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Write a checkpoint with a way to quantise its KV cache to `out`; weights stay as they are.

    Raises RecipeError before any work when the request does not fit the checkpoint or `out`.
    """
    started = time.monotonic()
    check_output(out, overwrite)
    check_not_inside(out, checkpoint.path)
    record = _record(checkpoint, recipe)
    dtype = calibration_dtype(recipe.dtype, checkpoint.dtype, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    tensors: dict[str, Tensor] = {}
    described = None
    with ArtifactWriter(out, overwrite=overwrite) as writer, exact_matmul():
        if recipe.method == CALIBRATED_KV:
            calibration, windows = plan.calibration_tokens(checkpoint, _resolve(checkpoint, recipe))
            recipe = dataclasses.replace(recipe, calibration=calibration)
            described = windows.describe()
            tensors = _calibrate(
                checkpoint, windows.tokens, recipe, record, dtype, device, on_block, on_gradient
            )
        copy_weights(writer, checkpoint)
        copy_sides(writer, checkpoint, kv_cache=False)
        record = writer.add_kv_cache(record, tensors)
        step = {
            "command": "quantize-kv",
            "recipe": recipe.to_dict(),
            "source": {
                "name": source_name,
                "sha256": {file.name: hash_file(file) for file in checkpoint.identity},
            },
            "calibration": described,
            "compute_dtype": str(dtype).removeprefix("torch."),
            "versions": versions(),
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_device_bytes": peak_device_bytes(device),
        }
        writer.write_text("README.md", card.quantized_kv_card(checkpoint, source_name, record))
        manifest = writer.publish(
            checkpoint.config, checkpoint.path, [*checkpoint.steps, step], checkpoint.stored_bytes
        )
    return Report(
        recipe,
        manifest,
        record,
        time.monotonic() - started,
        peak_rss_bytes(),
        peak_device_bytes(device),
    )


def _record(checkpoint: Checkpoint, recipe: KvRecipe) -> KvRecord:
    """What the checkpoint will say, its tensors aside."""
    known = coded_spans(checkpoint.model.config)
    full = [layer for layer, span in known.items() if not span.window]
    heads, width = _shape(checkpoint, (full or list(known))[0])
    # One shape to a checkpoint: where layers of sliding attention have another, they stay as they are.
    layers = [layer for layer in known if _shape(checkpoint, layer) == (heads, width)]
    record = KvRecord(recipe.method, recipe.bits, tuple(layers), heads, width)
    if recipe.method != CALIBRATED_KV:
        return record
    plain = recipe.config.plain
    slots = kvquant.slots(recipe.outliers, width)
    if slots >= width:
        raise RecipeError(
            f"--outliers {recipe.outliers}: leaves nothing of {width} entries to code"
        )
    return dataclasses.replace(
        record,
        key_slots=slots,
        # A rotation leaves no outliers, so slots would be wasted on turned values.
        value_slots=slots if plain else 0,
        sinks=recipe.sinks,
        turned=not plain,
        rank=0 if plain else min(kvquant.RANK, width),
    )


def _shape(checkpoint: Checkpoint, layer: int) -> tuple[int, int]:
    """Key-value heads and their width, as the attention module has them: configs carry unused ones."""
    config = checkpoint.model.config.get_text_config(decoder=True)
    attention: Any = next(m for m in checkpoint.blocks[layer].modules() if hasattr(m, "scaling"))
    groups = getattr(attention, "num_key_value_groups", 1)
    width = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    queries = config.num_attention_heads
    return queries // groups, width or config.hidden_size // queries


def _calibrate(
    checkpoint: Checkpoint,
    tokens: Tensor,
    recipe: KvRecipe,
    record: KvRecord,
    dtype: torch.dtype,
    device: torch.device,
    on_block: Callable[[BlockDone], None],
    on_gradient: Callable[[int, int], None],
) -> dict[str, Tensor]:
    """The tensors of all packed layers by full name."""
    samples, length = tokens.shape
    batches = cut_batches(tokens, recipe.batch or batch_samples(length, device), 0)
    found: dict[int, Tensor] = {}
    if recipe.config.fisher:
        model = load(checkpoint, dtype, device)
        turns = tables(model, length, dtype, device)
        blocks = list(model.get_submodule(checkpoint.blocks_path))
        found = gradients(model, blocks, tokens, turns, sinks=record.sinks, on_sample=on_gradient)
        del model
    tensors: dict[str, Tensor] = {}
    turns = {}
    with torch.no_grad():
        for loaded in load_blocks(checkpoint, tokens, dtype, device, batches):
            started = time.monotonic()
            if loaded.index == 0:
                turns = tables(loaded.model, length, dtype, device)
            packed = loaded.index in record.layers
            sensing = packed and not recipe.config.plain and not recipe.config.fisher
            turn = turns.get(loaded.index)
            seen = observe_block(loaded, batches, turn, sinks=record.sinks, sensing=sensing)
            if packed:
                if recipe.config.fisher:
                    senses = found.pop(loaded.index).to(device)
                    places = gradient_places(samples, length - record.sinks, len(senses))
                    seen.at, seen.senses = [places.to(device)], [senses]
                fitted = _fit(seen, recipe, record)
                tensors |= {f"{loaded.index}.{name}": t.cpu() for name, t in fitted.items()}
            seconds = time.monotonic() - started
            on_block(BlockDone(loaded.index, checkpoint.block_count, seconds))
    return tensors


def _fit(seen: Seen, recipe: KvRecipe, record: KvRecord) -> dict[str, Tensor]:
    keys = torch.cat(seen.keys).transpose(0, 1).flatten(1, 2)
    if seen.senses:
        at, senses = torch.cat(seen.at, dim=1), torch.cat(seen.senses, dim=1)
    else:  # every entry counts the same
        at = torch.arange(keys.shape[1], device=keys.device).expand(len(keys), -1)
        senses = torch.ones_like(keys)
    fitted = kvquant.fit_keys(keys, at, senses, recipe.bits, record.key_slots, recipe.config)
    none = torch.zeros(2**recipe.bits, dtype=torch.float64)
    codec = TokenCodec(Codebook(recipe.bits, none, none), record.value_slots, record.turned)
    return fitted | kvquant.fit_values(torch.cat(seen.values), codec)


def _resolve(checkpoint: Checkpoint, recipe: KvRecipe) -> Any:
    asked = recipe.calibration
    seqlen = asked.seqlen or min(DEFAULT_SEQLEN, plan.window_length(checkpoint, None))
    if recipe.sinks + 2 > seqlen:
        raise RecipeError(
            f"--sinks {recipe.sinks} leaves nothing of windows of {seqlen} tokens to calibrate on"
        )
    return dataclasses.replace(asked, seqlen=seqlen)
