"""Activation sparsity: checkpoint → thresholds calibrated block by block → the same weights, gated."""

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
from llmsqueeze.activation import ActivationRecord, GateRecord
from llmsqueeze.artifact import ArtifactWriter, Manifest, check_output
from llmsqueeze.blocks import find_groups, load_blocks
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
)
from llmsqueeze.computing import computing, versions
from llmsqueeze.device import (
    calibration_dtype,
    exact_matmul,
    watch_peak,
    with_smaller_batches,
    worker,
)
from llmsqueeze.encode_recipe import EncodeRecipe
from llmsqueeze.encoded import EncodedCheckpoint
from llmsqueeze.errors import RecipeError
from llmsqueeze.fingerprint import Fingerprint
from llmsqueeze.gate_calibration import ALREADY_SPARSE, calibrate_block, choose_gates
from llmsqueeze.methods.greedy import MOST
from llmsqueeze.numerics.histogram import read_curve
from llmsqueeze.parts import Split, cut_parts
from llmsqueeze.policy import Policy
from llmsqueeze.recipe import Calibration, is_ignored
from llmsqueeze.rotation import rotate
from llmsqueeze.shards import hash_file
from llmsqueeze.sparsify_recipe import DEFAULT_SEQLEN, SparsifyRecipe, ThresholdsRecipe
from llmsqueeze.work import Work


@dataclass(frozen=True)
class Report:
    """What happened. already_sparse: gates whose inputs are mostly exact zeros. resumed: blocks that an
    earlier run had done."""

    recipe: SparsifyRecipe
    manifest: Manifest
    already_sparse: list[str]
    resumed: int
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
    work: Work | None = None,
    note: Callable[[str], None] = lambda message: None,
    on_block: Callable[[BlockDone], None] = lambda done: None,
) -> Report:
    """Calibrate gates on the weights of a checkpoint and write it with them to `out`.

    Weights stay as they are, bit for bit, unless the recipe rotates them or `encode` has them rounded
    first. work: see compress.prune, of its ranks too. Raises RecipeError before any work when the request
    does not fit the checkpoint or `out`.
    """
    started = time.monotonic()
    check_output(out, overwrite)
    check_not_inside(out, checkpoint.path)
    Policy.parse(recipe.prefill)
    plan.check_gates(checkpoint)
    _check_ignore(checkpoint, recipe)
    work = work or Work(out, device)
    with (
        work,
        worker() as hashing,
        ArtifactWriter(out, overwrite=overwrite, directory=work.files, team=work.team) as writer,
        exact_matmul(),
        torch.no_grad(),
    ):
        team = work.team
        fingerprint = Fingerprint(checkpoint.identity if team.leads else (), hashing)
        source = checkpoint
        if encode:
            note_losses(source, note)
            source = EncodedCheckpoint(source, source_name, encode)
        asked = _resolve(checkpoint, recipe)
        calibration, windows = team.first(lambda: plan.calibration_tokens(checkpoint, asked))
        recipe = dataclasses.replace(recipe, calibration=calibration)
        tokens = windows.tokens
        dtype = calibration_dtype(recipe.dtype, checkpoint.dtype, device)
        described = windows.describe()
        work.begin(
            lambda: {
                "command": "sparsify",
                "recipe": recipe.to_dict(),
                "before": source.changes,
                "calibration": described,
                **computing(device, dtype),
                "source": fingerprint.sha256,
            }
        )
        if recipe.rotate:
            plain = checkpoint
            checkpoint = team.first(lambda: _rotated(plain, work))
            checkpoint = (
                EncodedCheckpoint(checkpoint, source_name, encode) if encode else checkpoint
            )
        else:
            checkpoint = source
        watch_peak(device)
        batch = plan.samples_at_once(recipe.batch, tokens, device)

        def attempt(batch: int) -> _Found:
            return _calibrate(
                checkpoint, tokens, recipe, dtype, device, writer, work, batch, on_block
            )

        found = with_smaller_batches(batch, attempt, note, team.size)
        gates = found.gates
        if not gates:
            raise RecipeError("--ignore leaves nothing to gate")
        step: dict[str, Any] = {
            "command": "sparsify",
            "recipe": recipe.to_dict(),
            "source": {"name": source_name, "sha256": fingerprint.sha256},
            "calibration": described,
            "compute_dtype": str(dtype).removeprefix("torch."),
            "versions": versions(),
        }
        if found.batch < batch:
            step["reduced_batch"] = found.batch
        record = writer.add_activation(recipe.method, recipe.prefill, gates, found.tensors)
        copy_sides(writer, source, activation=False)  # a rotation changes neither keys nor values
        fingerprint.check()
        manifest = _publish(writer, checkpoint, source_name, step, record)
        team.conclude()
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
        work.resumed,
        time.monotonic() - started,
        peak_rss_bytes(),
        peak_device_bytes(device),
    )


@dataclass
class _Found:
    """Gates and their side tensors by full name, of the blocks that were calibrated so far."""

    gates: dict[str, GateRecord]
    tensors: dict[str, Tensor]
    batch: int  # samples per forward pass


def _calibrate(
    checkpoint: Checkpoint,
    tokens: Tensor,
    recipe: SparsifyRecipe,
    dtype: torch.dtype,
    device: torch.device,
    writer: ArtifactWriter,
    work: Work,
    batch: int,
    on_block: Callable[[BlockDone], None],
) -> _Found:
    """Calibrate and store all blocks, from the last state on. batch: samples per forward pass, at most."""
    trail = work.trail("sparsify", checkpoint.block_count)
    kept = trail.found
    writer.restore(kept.get("writer"))
    found = _Found(
        {name: GateRecord(**record) for name, record in kept.get("gates", {}).items()},
        dict(kept.get("tensors", {})),
        min(batch, kept.get("batch", batch)),
    )
    checkpoint.rewind(kept.get("checkpoint", {}), found.batch)
    if not kept:
        for name in checkpoint.outer_parameters:
            writer.add(checkpoint.stored_name(name), checkpoint.read([name])[name])

    def capture() -> dict[str, Any]:
        return {
            "writer": writer.snapshot(),
            "gates": {name: dataclasses.asdict(gate) for name, gate in found.gates.items()},
            "tensors": dict(found.tensors),
            "batch": found.batch,
            "checkpoint": checkpoint.progress(),
        }

    split = Split.of(cut_parts(tokens, found.batch, 0), work.team)
    tokens, samples = split.own_tokens(tokens)
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for loaded in load_blocks(
        checkpoint, tokens, dtype, device, split.calls, start=trail.start, samples=samples
    ):
        started = time.monotonic()
        assert loaded.run is not None
        kind = tuple(loaded.linears)
        if kind not in groups:
            groups[kind] = find_groups(loaded.run, split.calls[0], loaded.linears)
        specs = choose_gates(loaded, groups[kind], checkpoint.mlp, recipe)
        for state in calibrate_block(loaded, specs, recipe, split):
            found.gates[loaded.prefix + state.spec.at] = state.record(loaded.prefix)
            found.tensors |= {n: t.cpu() for n, t in state.tensors(loaded.prefix).items()}
        known = checkpoint.site_reports
        # Not a set operation on its keys: a reader may be adding those of the next block.
        sites = [n.removesuffix(".weight") for n in loaded.tensors]
        store_block(
            writer,
            checkpoint,
            {name: tensor.cpu() for name, tensor in loaded.tensors.items()},
            {name: known[name] for name in sites if name in known},
        )
        seconds = time.monotonic() - started
        on_block(BlockDone(loaded.index, checkpoint.block_count, seconds))
        trail.reached(loaded.after, capture)
    return found


def change_sparsity(
    checkpoint: Checkpoint,
    source_name: str,
    out: Path,
    sparsity: float,
    prefill: str | None,
    *,
    overwrite: bool = False,
    work: Work | None = None,
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
    with (
        work or Work(out, torch.device("cpu")) as work,
        ArtifactWriter(out, overwrite=overwrite, directory=work.fresh()) as writer,
    ):
        copy_weights(writer, checkpoint)
        step: dict[str, Any] = {
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


def _rotated(checkpoint: Checkpoint, work: Work) -> Checkpoint:
    """A rotated copy in the work folder, for as long as that lasts."""
    folder = work.folder / "rotated"
    return Checkpoint(folder) if folder.exists() else rotate(checkpoint, folder)


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
