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
from llmsqueeze.blocks import Boundary, load_blocks
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.compress import (
    BlockDone,
    check_not_inside,
    copy_sides,
    copy_weights,
    peak_device_bytes,
    peak_rss_bytes,
)
from llmsqueeze.computing import computing, versions
from llmsqueeze.device import (
    calibration_dtype,
    exact_matmul,
    watch_peak,
    with_smaller_batches,
    worker,
)
from llmsqueeze.errors import RecipeError, Stopped
from llmsqueeze.fingerprint import Fingerprint
from llmsqueeze.kv_calibration import Seen, deal, gradient_places, gradients, observe_block, tables
from llmsqueeze.kv_recipe import DEFAULT_SEQLEN, KvRecipe
from llmsqueeze.kv_record import KvRecord
from llmsqueeze.methods import CALIBRATED_KV, kvquant
from llmsqueeze.numerics.kv_codecs import Codebook, TokenCodec
from llmsqueeze.parts import Split, cut_parts
from llmsqueeze.runtime import load
from llmsqueeze.runtime.spans import coded_spans
from llmsqueeze.work import Work


@dataclass(frozen=True)
class Report:
    """What happened. resumed: blocks that an earlier run had done."""

    recipe: KvRecipe
    manifest: Manifest
    record: KvRecord
    resumed: int
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
    work: Work | None = None,
    note: Callable[[str], None] = lambda message: None,
    on_block: Callable[[BlockDone], None] = lambda done: None,
    on_gradient: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Write a checkpoint with a way to quantise its KV cache to `out`; weights stay as they are.

    work: see compress.prune, of its ranks too. Raises RecipeError before any work when the request does not
    fit the checkpoint or `out`.
    """
    started = time.monotonic()
    check_output(out, overwrite)
    check_not_inside(out, checkpoint.path)
    record = _record(checkpoint, recipe)
    dtype = calibration_dtype(recipe.dtype, checkpoint.dtype, device)
    watch_peak(device)
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] | None = None
    tokens = None
    dtype = calibration_dtype(recipe.dtype, checkpoint.dtype, device)
    work = work or Work(out, device)
    team = work.team
    if team.size > 1 and recipe.method == CALIBRATED_KV and recipe.config.fisher:
        raise RecipeError(
            "--fisher takes gradients of the whole model in one process; leave out --gpus"
        )
    with (
        work,
        worker() as hashing,
        ArtifactWriter(out, overwrite=overwrite, directory=work.files, team=team) as writer,
        exact_matmul(),
    ):
        source = Fingerprint(checkpoint.identity if team.leads else (), hashing)
        if recipe.method == CALIBRATED_KV:
            asked = _resolve(checkpoint, recipe)
            calibration, windows = team.first(lambda: plan.calibration_tokens(checkpoint, asked))
            recipe = dataclasses.replace(recipe, calibration=calibration)
            described, tokens = windows.describe(), windows.tokens
        work.begin(
            lambda: {
                "command": "quantize-kv",
                "recipe": recipe.to_dict(),
                "calibration": described,
                **computing(device, dtype),
                "source": source.sha256,
            }
        )
        used = batch = plan.samples_at_once(recipe.batch, tokens, device)
        if tokens is not None:
            found = _gradients(checkpoint, tokens, recipe, record, dtype, device, work, on_gradient)

            def attempt(batch: int) -> tuple[dict[str, Tensor], int]:
                return _calibrate(
                    checkpoint, tokens, recipe, record, dtype, device, found, work, batch, on_block
                )

            tensors, used = with_smaller_batches(batch, attempt, note, team.size)
        writer.restore(None)
        copy_weights(writer, checkpoint)
        copy_sides(writer, checkpoint, kv_cache=False)
        record = writer.add_kv_cache(record, tensors)
        step: dict[str, Any] = {
            "command": "quantize-kv",
            "recipe": recipe.to_dict(),
            "source": {"name": source_name, "sha256": source.sha256},
            "calibration": described,
            "compute_dtype": str(dtype).removeprefix("torch."),
            "versions": versions(),
        }
        if used < batch:
            step["reduced_batch"] = used
        source.check()
        writer.write_text("README.md", card.quantized_kv_card(checkpoint, source_name, record))
        manifest = writer.publish(
            checkpoint.config, checkpoint.path, [*checkpoint.steps, step], checkpoint.stored_bytes
        )
        team.conclude()
    return Report(
        recipe,
        manifest,
        record,
        work.resumed,
        time.monotonic() - started,
        peak_rss_bytes(),
        peak_device_bytes(device),
    )


def _record(checkpoint: Checkpoint, recipe: KvRecipe) -> KvRecord:
    """What the checkpoint will say, its tensors aside."""
    known = coded_spans(checkpoint.model.config)
    full = [layer for layer, span in known.items() if not span.window]
    heads, width = checkpoint.cache_shape((full or list(known))[0])
    # One shape to a checkpoint: where layers of sliding attention have another, they stay as they are.
    layers = [layer for layer in known if checkpoint.cache_shape(layer) == (heads, width)]
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


def _gradients(
    checkpoint: Checkpoint,
    tokens: Tensor,
    recipe: KvRecipe,
    record: KvRecord,
    dtype: torch.dtype,
    device: torch.device,
    work: Work,
    on_gradient: Callable[[int, int], None],
) -> dict[int, Tensor]:
    """See kv_calibration.gradients; none unless the recipe weights by them. Kept once they are all there."""
    if not recipe.config.fisher:
        return {}
    trail = work.trail("gradients")
    if trail.found:
        return dict(trail.found["gradients"])
    model = load(checkpoint, dtype, device)
    turn = tables(model, tokens.shape[1], dtype, device)
    blocks = list(model.get_submodule(checkpoint.blocks_path))

    def done(sample: int, total: int) -> None:
        on_gradient(sample, total)
        if work.stopping and sample < total:
            raise Stopped(
                "stopped before the gradients were complete; the same command takes them anew"
            )

    found = gradients(model, blocks, tokens, turn, sinks=record.sinks, on_sample=done)
    trail.keep(Boundary(1), {"gradients": found})
    return found


def _calibrate(
    checkpoint: Checkpoint,
    tokens: Tensor,
    recipe: KvRecipe,
    record: KvRecord,
    dtype: torch.dtype,
    device: torch.device,
    found: dict[int, Tensor],
    work: Work,
    batch: int,
    on_block: Callable[[BlockDone], None],
) -> tuple[dict[str, Tensor], int]:
    """The tensors of all packed layers by full name, from the last state on.

    found: of _gradients. batch: samples per forward pass, at most; what it was is the second result.
    """
    samples, length = tokens.shape
    team, last = work.team, checkpoint.block_count - 1
    trail = work.trail("quantize-kv", checkpoint.block_count)
    tensors: dict[str, Tensor] = dict(trail.found.get("tensors", {}))
    batch = min(batch, trail.found.get("batch", batch))
    split = Split.of(cut_parts(tokens, batch, 0), team)
    tokens, which = split.own_tokens(tokens)
    turns: dict[int, Any] | None = None
    # What was seen of layers that are still to be fitted: as many as there are ranks, side by side.
    waiting: dict[int, Seen] = {}

    def capture() -> dict[str, Any]:
        return {"tensors": dict(tensors), "batch": batch}

    with torch.no_grad():
        for loaded in load_blocks(
            checkpoint, tokens, dtype, device, split.calls, start=trail.start, samples=which
        ):
            started = time.monotonic()
            if turns is None:
                turns = tables(loaded.model, length, dtype, device)
            packed = loaded.index in record.layers
            sensing = packed and not recipe.config.plain and not recipe.config.fisher
            turn = turns.get(loaded.index)
            seen = observe_block(loaded, split.batches, turn, sinks=record.sinks, sensing=sensing)
            if packed:
                if recipe.config.fisher:
                    senses = found[loaded.index].to(device)
                    places = gradient_places(samples, length - record.sinks, len(senses))
                    seen.at, seen.senses = [places.to(device)], [senses]
                waiting[loaded.index] = seen
            if len(waiting) == team.size or (waiting and loaded.index == last):
                tensors |= _fit_all(waiting, split, recipe, record, device)
                waiting = {}
            seconds = time.monotonic() - started
            on_block(BlockDone(loaded.index, checkpoint.block_count, seconds))
            if not waiting:
                trail.reached(loaded.after, capture)
    return tensors, batch


def _fit_all(
    waiting: dict[int, Seen], split: Split, recipe: KvRecipe, record: KvRecord, device: torch.device
) -> dict[str, Tensor]:
    """The tensors of some layers, each fitted by a rank of its own, on all of them."""
    seen = deal(list(waiting.values()), split, record.heads, record.width, device)
    own: dict[str, Tensor] = {}
    if seen:
        layer = list(waiting)[split.team.rank]
        own = {f"{layer}.{name}": t for name, t in _fit(seen, recipe, record).items()}
    return {name: t.cpu() for name, t in split.team.share(own, device).items()}


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
