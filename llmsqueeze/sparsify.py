"""Activation sparsity: checkpoint → thresholds calibrated block by block → the same weights, gated."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsqueeze import card, plan
from llmsqueeze.activation import ActivationRecord, GateRecord
from llmsqueeze.artifact import ArtifactWriter, Manifest, check_output
from llmsqueeze.blocks import batch_samples, cut_batches, find_groups, load_blocks
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.compress import (
    BlockDone,
    check_not_inside,
    copy_sides,
    copy_weights,
    note_losses,
    peak_device_bytes,
    peak_rss_bytes,
    store_block,
    versions,
)
from llmsqueeze.device import calibration_dtype, exact_matmul, worker
from llmsqueeze.encode_recipe import EncodeRecipe
from llmsqueeze.encoded import EncodedCheckpoint
from llmsqueeze.errors import RecipeError
from llmsqueeze.gate_calibration import ALREADY_SPARSE, calibrate_block, choose_gates
from llmsqueeze.methods.greedy import MOST
from llmsqueeze.numerics.histogram import read_curve
from llmsqueeze.policy import Policy
from llmsqueeze.recipe import Calibration, is_ignored
from llmsqueeze.rotation import rotate
from llmsqueeze.shards import hash_file
from llmsqueeze.sparsify_recipe import DEFAULT_SEQLEN, SparsifyRecipe, ThresholdsRecipe


@dataclass(frozen=True)
class Report:
    """What happened. already_sparse: gates whose inputs are mostly exact zeros."""

    recipe: SparsifyRecipe
    manifest: Manifest
    already_sparse: list[str]
    seconds: float
    peak_rss_bytes: int
    peak_device_bytes: int | None


def sparsify(
    checkpoint: Checkpoint,
    source_name: str,
    out: Path,
    recipe: SparsifyRecipe,
    device: torch.device,
    *,
    encode: EncodeRecipe | None = None,
    overwrite: bool = False,
    note: Callable[[str], None] = lambda message: None,
    on_block: Callable[[BlockDone], None] = lambda done: None,
) -> Report:
    """Calibrate gates on the weights of a checkpoint and write it with them to `out`.

    Weights stay as they are, bit for bit, unless the recipe rotates them or `encode` has them rounded
    first. Raises RecipeError before any work when the request does not fit the checkpoint or `out`.
    """
    started = time.monotonic()
    check_output(out, overwrite)
    check_not_inside(out, checkpoint.path)
    Policy.parse(recipe.prefill)
    _check_ignore(checkpoint, recipe)
    identity, source = checkpoint.identity, checkpoint
    with (
        worker() as hashing,
        ArtifactWriter(out, overwrite=overwrite) as writer,
        _rotated(checkpoint, out, recipe) as checkpoint,
        exact_matmul(),
        torch.no_grad(),
    ):
        hashes = {file.name: hashing.submit(hash_file, file) for file in identity}
        if encode:
            note_losses(source, note)
            checkpoint = source = EncodedCheckpoint(checkpoint, source_name, encode)
        asked = _resolve(checkpoint, recipe)
        calibration, windows = plan.calibration_tokens(checkpoint, asked)
        recipe = dataclasses.replace(recipe, calibration=calibration)
        tokens = windows.tokens
        dtype = calibration_dtype(recipe.dtype, checkpoint.dtype, device)
        batches = cut_batches(tokens, recipe.batch or batch_samples(tokens.shape[1], device), 0)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for name in checkpoint.outer_parameters:
            writer.add(checkpoint.stored_name(name), checkpoint.read([name])[name])
        gates: dict[str, GateRecord] = {}
        tensors: dict[str, Tensor] = {}
        groups: dict[tuple[str, ...], list[list[str]]] = {}
        for loaded in load_blocks(checkpoint, tokens, dtype, device, batches):
            block_started = time.monotonic()
            assert loaded.run is not None
            kind = tuple(loaded.linears)
            if kind not in groups:
                groups[kind] = find_groups(loaded.run, batches[0], loaded.linears)
            specs = choose_gates(loaded, groups[kind], checkpoint.mlp, recipe)
            for state in calibrate_block(loaded, specs, recipe, batches):
                gates[loaded.prefix + state.spec.at] = state.record(loaded.prefix)
                tensors |= {n: t.cpu() for n, t in state.tensors(loaded.prefix).items()}
            known = checkpoint.site_reports
            # Not a set operation on its keys: a reader may be adding those of the next block.
            sites = [n.removesuffix(".weight") for n in loaded.tensors]
            store_block(
                writer,
                checkpoint,
                {name: tensor.cpu() for name, tensor in loaded.tensors.items()},
                {name: known[name] for name in sites if name in known},
            )
            seconds = time.monotonic() - block_started
            on_block(BlockDone(loaded.index, checkpoint.block_count, seconds))
        if not gates:
            raise RecipeError("--ignore leaves nothing to gate")
        step = {
            "command": "sparsify",
            "recipe": recipe.to_dict(),
            "source": {"name": source_name, "sha256": {n: h.result() for n, h in hashes.items()}},
            "calibration": windows.describe(),
            "compute_dtype": str(dtype).removeprefix("torch."),
            "versions": versions(),
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_device_bytes": peak_device_bytes(device),
        }
        record = writer.add_activation(recipe.method, recipe.prefill, gates, tensors)
        copy_sides(writer, source, activation=False)  # a rotation changes neither keys nor values
        manifest = _publish(writer, checkpoint, source_name, step, record)
    sparse = [name for name, gate in gates.items() if gate.zeros >= ALREADY_SPARSE]
    if sparse:
        note(
            f"{len(sparse)} of {len(gates)} gates see mostly exact zeros already (up to "
            f"{max(gates[n].zeros for n in sparse):.0%}); up to that share they lose nothing"
        )
    return Report(
        recipe,
        manifest,
        sparse,
        time.monotonic() - started,
        peak_rss_bytes(),
        peak_device_bytes(device),
    )


def change_sparsity(
    checkpoint: Checkpoint,
    source_name: str,
    out: Path,
    sparsity: float,
    prefill: str | None,
    *,
    overwrite: bool = False,
) -> Manifest:
    """Write the checkpoint with other thresholds, read off its stored curves: no calibration.

    Uniform shares stay uniform, greedily allocated ones are scaled (see _scaled_share). RecipeError for
    R-Sparse, whose branches were sized for one sparsity.
    """
    check_output(out, overwrite)
    check_not_inside(out, checkpoint.path)
    old = checkpoint.activation
    assert old is not None and checkpoint.manifest is not None
    if any(gate.rank for gate in old.gates.values()):
        raise RecipeError(
            "low-rank branches were made for one sparsity; name --method to calibrate again"
        )
    if not 0 <= sparsity <= MOST:
        raise RecipeError(f"sparsity {sparsity} is outside [0, {MOST}]")
    policy = str(Policy.parse(prefill or old.prefill))
    tensors = checkpoint.read_activation()
    steps = checkpoint.manifest.steps
    before = next(s["recipe"]["sparsity"] for s in reversed(steps) if s["command"] == "sparsify")
    gates = {}
    for name, gate in old.gates.items():
        # A gate that only drops exact zeros has forgotten which share it was given.
        share = before if gate.sparsity == gate.zeros else gate.sparsity
        share = _scaled_share(share, before, sparsity)
        gates[name] = dataclasses.replace(
            gate,
            sparsity=max(share, gate.zeros),
            threshold=read_curve(tensors[f"{name}.curve"], share),
        )
    with ArtifactWriter(out, overwrite=overwrite) as writer:
        copy_weights(writer, checkpoint)
        step = {
            "command": "sparsify",
            "recipe": ThresholdsRecipe(sparsity, policy).to_dict(),
            "source": {
                "name": source_name,
                "sha256": {file.name: hash_file(file) for file in checkpoint.identity},
            },
            "calibration": None,
            "versions": versions(),
        }
        record = writer.add_activation(old.method, policy, gates, tensors)
        copy_sides(writer, checkpoint, activation=False)
        return _publish(writer, checkpoint, source_name, step, record)


def _scaled_share(share: float, before: float, after: float) -> float:
    """What a gate drops when shares of mean `before` are to have the mean `after`.

    Downwards what is dropped is scaled, upwards what is kept: linear, so any weighted mean ends at `after`.
    """
    if after <= before:
        return share * after / before if before else 0.0
    return min(1 - (1 - share) * (1 - after) / (1 - before), MOST)


@contextlib.contextmanager
def _rotated(checkpoint: Checkpoint, out: Path, recipe: SparsifyRecipe) -> Iterator[Checkpoint]:
    """The checkpoint itself, or for as long as this lasts a rotated copy beside `out`."""
    if not recipe.rotate:
        yield checkpoint
        return
    with tempfile.TemporaryDirectory(
        dir=out.parent, prefix=f".{out.name}.", suffix=".rotated"
    ) as directory:
        yield rotate(checkpoint, Path(directory) / "rotated")


def _publish(
    writer: ArtifactWriter,
    checkpoint: Checkpoint,
    source_name: str,
    step: dict[str, Any],
    record: ActivationRecord,
) -> Manifest:
    writer.write_text("README.md", card.sparsified_card(checkpoint, source_name, record))
    return writer.publish(
        checkpoint.config, checkpoint.path, [*checkpoint.steps, step], checkpoint.stored_bytes
    )


def _resolve(checkpoint: Checkpoint, recipe: SparsifyRecipe) -> Calibration:
    asked = recipe.calibration
    seqlen = asked.seqlen or min(DEFAULT_SEQLEN, plan.window_length(checkpoint, None))
    if recipe.prefix >= seqlen:
        raise RecipeError(
            f"--prefix {recipe.prefix} leaves nothing of windows of {seqlen} tokens to calibrate on"
        )
    return dataclasses.replace(asked, seqlen=seqlen)


def _check_ignore(checkpoint: Checkpoint, recipe: SparsifyRecipe) -> None:
    unused = set(recipe.ignore)
    for name, _ in checkpoint.model.named_modules():
        unused -= set(is_ignored(name, recipe.ignore))
    if unused:
        raise RecipeError(f"--ignore {sorted(unused)[0]}: no module of this checkpoint matches")
