"""The pipeline, top to bottom: checkpoint → calibrate → method → artifact. Read this file first."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsqueeze import card, plan
from llmsqueeze.artifact import ArtifactWriter, Manifest, assets, check_output
from llmsqueeze.blocks import BEGINNING, Boundary
from llmsqueeze.calibrate import BlockStep, Site, walk
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.computing import computing, versions
from llmsqueeze.device import (
    beside,
    calibration_dtype,
    exact_matmul,
    watch_peak,
    with_smaller_batches,
    worker,
)
from llmsqueeze.errors import CalibrationError, RecipeError
from llmsqueeze.fingerprint import Fingerprint
from llmsqueeze.learn import learn_masks
from llmsqueeze.methods.base import Target
from llmsqueeze.parking import ON_DEVICE, Parking
from llmsqueeze.ranks import shared_out
from llmsqueeze.recipe import PruneRecipe
from llmsqueeze.site import prune_site
from llmsqueeze.train import StepDone, TrainedMasks
from llmsqueeze.work import Work


@dataclass(frozen=True)
class BlockDone:
    """Progress: one block was compressed and handed to the writer."""

    index: int
    total: int
    seconds: float


@dataclass(frozen=True)
class Report:
    """What happened. resumed: blocks that an earlier run had done. peak_device_bytes: None without an
    accelerator."""

    recipe: PruneRecipe
    manifest: Manifest
    sparsity: float
    resumed: int
    seconds: float
    peak_rss_bytes: int
    peak_device_bytes: int | None


def prune(
    checkpoint: Checkpoint,
    source_name: str,
    out: Path,
    recipe: PruneRecipe,
    device: torch.device,
    *,
    overwrite: bool = False,
    training_state: Path | None = None,
    work: Work | None = None,
    note: Callable[[str], None] = lambda message: None,
    on_block: Callable[[BlockDone], None] = lambda done: None,
    on_step: Callable[[StepDone], None] = lambda done: None,
    activations: str = "device",
) -> Report:
    """Prune a checkpoint into a new llmsqueeze checkpoint at `out`, one block at a time.

    training_state: directory that trained masks are saved to and go on from; see train.train_masks.
    work: where it is done, and whether a run that is cut off can go on; None keeps no state. It has the ranks
    that share the work: all make this call, and OUT has the same bytes for any number of them. activations:
    see Parking.place; it changes no byte either.

    Raises RecipeError before any work when the request does not fit the checkpoint or `out`.
    """
    started = time.monotonic()
    check_output(out, overwrite)
    check_not_inside(out, checkpoint.path)
    work = work or Work(out, device)
    pruning = Pruning(
        checkpoint, recipe, device, work, training_state=training_state, note=note, on_step=on_step,
        parking=Parking(activations, work.folder),
    )  # fmt: skip
    with (
        work,
        worker() as hashing,
        ArtifactWriter(out, overwrite=overwrite, directory=work.files, team=work.team) as writer,
        beside(device) as storing,
        exact_matmul(),
    ):
        source = Fingerprint(checkpoint.identity if work.team.leads else (), hashing)
        pruning.prepare()
        work.begin(lambda: {**pruning.identity(), "source": source.sha256})

        def attempt(batch: int) -> Share:
            return _prune_into(writer, pruning, work, storing, batch, on_block)

        total = with_smaller_batches(pruning.batch, attempt, note, work.team.size)
        sparsity = total.sparsity
        recipe = pruning.recipe
        step = pruning.step(source_name, source.sha256, sparsity)
        writer.write_text("README.md", card.model_card(checkpoint, source_name, recipe, sparsity))
        source.check()
        manifest = writer.publish(
            checkpoint.config, checkpoint.path, [*checkpoint.steps, step], checkpoint.stored_bytes
        )
        work.team.conclude()
    return Report(
        recipe,
        manifest,
        sparsity,
        work.resumed,
        time.monotonic() - started,
        peak_rss_bytes(),
        peak_device_bytes(device),
    )


def _prune_into(
    writer: ArtifactWriter,
    pruning: Pruning,
    work: Work,
    storing: Executor,
    batch: int,
    on_block: Callable[[BlockDone], None],
) -> Share:
    """Prune and store all blocks, from the last state on. batch: samples per forward pass, at most."""
    checkpoint = pruning.checkpoint
    trail = work.trail("prune", checkpoint.block_count)
    writer.restore(trail.found.get("writer"))
    total = Share(**trail.found.get("share", {}))
    batch = min(batch, trail.found.get("batch", batch))
    stored: Future[Share] | None = None
    if not trail.found:
        for name in checkpoint.outer_parameters:
            writer.add(checkpoint.stored_name(name), checkpoint.read([name])[name])

    def capture() -> dict[str, Any]:
        nonlocal total, stored
        if stored:
            total, stored = total + stored.result(), None
        return {"writer": writer.snapshot(), "share": dataclasses.asdict(total), "batch": batch}

    try:
        for block in pruning.blocks(batch, trail.start):
            if stored:
                total += stored.result()  # one block waits at most; a full disk shows here
            stored = storing.submit(store_block, writer, checkpoint, block.take(), block.reports)
            on_block(BlockDone(block.index, checkpoint.block_count, block.seconds))
            trail.reached(block.after, capture)
    finally:
        if stored:  # a next attempt is to have the writer for itself
            wait([stored])
    return total + stored.result() if stored else total


@dataclass(frozen=True)
class PrunedBlock:
    """tensors: every parameter of the block, on the CPU; reports: pruned site → what is known of it; after:
    the boundary behind it."""

    index: int
    tensors: dict[str, Tensor]
    reports: dict[str, dict[str, float]]
    seconds: float
    after: Boundary

    def take(self) -> dict[str, Tensor]:
        """The tensors, which nothing else holds then."""
        found = dict(self.tensors)
        self.tensors.clear()
        return found


class Pruning:
    """A recipe at work on a checkpoint: prepare(), take all blocks(), then step() says how it was done.

    recipe: with what prepare() resolved. Raises RecipeError when the request does not fit the checkpoint.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: PruneRecipe,
        device: torch.device,
        work: Work,
        *,
        training_state: Path | None = None,
        note: Callable[[str], None] = lambda message: None,
        on_step: Callable[[StepDone], None] = lambda done: None,
        parking: Parking = ON_DEVICE,
    ) -> None:
        self.checkpoint, self.recipe, self.device, self.work = checkpoint, recipe, device, work
        if work.team.size > 1 and recipe.tiles != "score":
            raise RecipeError(
                f"--tiles {recipe.tiles} trains masks of the whole model in one process; leave out --gpus"
            )
        self._sites = plan.choose_sites(checkpoint, recipe)
        self._training_state, self._note, self._on_step = training_state, note, on_step
        self._trained: TrainedMasks | None = None
        self._parking = parking

    def prepare(self) -> None:
        """Read the calibration text, say what will be lost and what will be held."""
        checkpoint, device = self.checkpoint, self.device
        self.recipe, self._tokens, self._calibration = self.work.team.first(
            lambda: plan.calibration(checkpoint, self.recipe)
        )
        self._dtype = calibration_dtype(self.recipe.dtype, checkpoint.dtype, device)
        self.batch = plan.samples_at_once(self.recipe.batch, self._tokens, device)
        note_losses(checkpoint, self._note)
        watch_peak(device)
        if self._tokens is not None:
            size = self.work.team.size
            share = plan.largest_share(self._tokens, self.batch, self.recipe, size)
            needed = plan.memory_estimate(checkpoint, self.recipe, share, self._dtype, device,
                parked=self._parking.elsewhere(device),
            )  # fmt: skip
            where = device if size == 1 else f"each of {size} ranks"
            self._note(f"calibrating will hold about {needed / 1e9:.2g} GB on {where}")

    def identity(self) -> dict[str, Any]:
        """What the result depends on, the source's files aside."""
        return {
            "command": "prune",
            "recipe": self.recipe.to_dict(),
            "calibration": self._calibration,
            **computing(self.device, self._dtype),
        }

    def blocks(self, batch: int, start: Boundary = BEGINNING) -> Iterator[PrunedBlock]:
        """Every block in turn, pruned, from a boundary on. batch: samples per forward pass, at most."""
        self._batch = batch  # here: where none is left to do, step() asks for it all the same
        return self._pruned(batch, start)

    def _pruned(self, batch: int, start: Boundary) -> Iterator[PrunedBlock]:
        recipe, tokens = self.recipe, self._tokens
        targets = self._targets()
        needs = recipe.needs | {"probe"} if recipe.needs else recipe.needs
        for block in walk(
            self.checkpoint,
            tokens,
            needs,
            self._dtype,
            self.device,
            batch,
            recipe.order,
            sites=self._sites,
            dense_share=recipe.dense_share if "product" in needs else 0.0,
            held_out=plan.held_out_samples(recipe),
            start=start,
            team=self.work.team,
            parking=self._parking,
        ):
            started = time.monotonic()
            reports: dict[str, dict[str, float]] = {}
            for group in block.groups:
                sites = [site for site in group if site.name in targets]
                reports |= self._prune_group(block, sites, targets)
                # Statistics go before the next ones are gathered.
                group.clear()
                del sites
            for name in reports:
                if not torch.isfinite(block.tensors[f"{name}.weight"]).all():
                    raise CalibrationError(
                        f"pruning made NaN or Inf of {name}; try --dtype float32, or another --method"
                    )
            tensors = {name: tensor.cpu() for name, tensor in block.tensors.items()}
            block.tensors.clear()  # from here on they are the caller's alone
            seconds = time.monotonic() - started
            yield PrunedBlock(block.index, tensors, reports, seconds, block.after)

    def _prune_group(
        self, block: BlockStep, sites: list[Site], targets: dict[str, Target]
    ) -> dict[str, dict[str, float]]:
        """Every rank prunes some of the sites, and all set all of them. What is said of each."""
        team, trained = self.work.team, self._trained
        owners = shared_out([site.weight.numel() for site in sites], team.size)
        done: dict[str, Tensor] = {}
        own: dict[str, dict[str, float]] = {}
        for site, owner in zip(sites, owners, strict=True):
            if owner == team.rank:
                keep = trained.keep[site.name] if trained else None
                pruned = prune_site(site, targets[site.name], self.recipe, keep)
                done[site.name], own[site.name] = pruned.weight.contiguous(), pruned.report
                del pruned
        found = {name: report for each in team.gather(own) for name, report in each.items()}
        for site, owner in zip(sites, owners, strict=True):
            weight = done.pop(site.name, None)
            if weight is None:
                weight = torch.empty_like(site.weight, memory_format=torch.contiguous_format)
            team.send(weight, owner)
            block.replace(site, weight)
        return {site.name: found[site.name] for site in sites}

    def step(self, source_name: str, sha256: dict[str, str], sparsity: float) -> dict[str, Any]:
        """What a manifest says of it. sha256: of the source's files."""
        step: dict[str, Any] = {
            "command": "prune",
            "recipe": self.recipe.to_dict(),
            "source": {"name": source_name, "sha256": sha256},
            "calibration": self._calibration,
            "compute_dtype": str(self._dtype).removeprefix("torch."),
            "versions": versions(),
            "sparsity": sparsity,
        }
        if self._batch < self.batch:
            step["reduced_batch"] = self._batch
        if self._trained is not None:
            step["training"] = {
                "losses": self._trained.losses,
                "densities": self._trained.densities,
            }
        return step

    def _targets(self) -> dict[str, Target]:
        recipe, tokens, work = self.recipe, self._tokens, self.work
        if recipe.tiles == "score":
            return plan.allocate(
                self.checkpoint, self._sites, tokens, recipe, self._dtype, self.device, self._batch,
                work.trail("allocation", self.checkpoint.block_count), work.team, self._parking,
            )  # fmt: skip
        assert tokens is not None
        trail = work.trail("masks")
        if not trail.found:
            state = self._training_state
            if state is None and work.training:
                work.commit()  # training has begun, so there is a state
                state = work.training
            trained = learn_masks(
                self.checkpoint, self._sites, tokens, recipe, self._dtype, self.device, self._batch,
                state, self._on_step, lambda: work.stopping,
            )  # fmt: skip
            trail.keep(Boundary(1), vars(trained))
            self._trained = trained
        else:
            self._trained = TrainedMasks(**trail.found)
        return {
            name: dataclasses.replace(recipe.target, dense_tiles=count)
            for name, count in self._trained.dense_tiles.items()
        }


def convert(
    checkpoint: Checkpoint,
    source_name: str,
    out: Path,
    format: str,
    *,
    overwrite: bool = False,
    note: Callable[[str], None] = lambda message: None,
    on_block: Callable[[BlockDone], None] = lambda done: None,
) -> Manifest:
    """Rewrite a checkpoint as `format` ("llmsqueeze" or "dense"), every tensor bit for bit."""
    check_output(out, overwrite)
    check_not_inside(out, checkpoint.path)
    with (
        Work(out, torch.device("cpu")) as work,
        ArtifactWriter(out, format=format, overwrite=overwrite, directory=work.fresh()) as writer,
    ):
        copy_weights(writer, checkpoint, on_block)
        steps = checkpoint.manifest.steps if checkpoint.manifest else []
        if format == "llmsqueeze":
            copy_sides(writer, checkpoint)
        elif checkpoint.activation or checkpoint.kv_cache:
            what = "activation thresholds" if checkpoint.activation else "the KV cache's codebooks"
            note(f"{what} are left out: the dense form has no place for them")
        writer.write_text("README.md", card.converted_card(checkpoint, source_name, format))
        return writer.publish(checkpoint.config, checkpoint.path, steps, checkpoint.stored_bytes)


def copy_weights(
    writer: ArtifactWriter,
    checkpoint: Checkpoint,
    on_block: Callable[[BlockDone], None] = lambda done: None,
) -> None:
    """Every tensor as it is read. Sites are those that are known, or all linears of a plain checkpoint."""
    for name in checkpoint.outer_parameters:
        writer.add(checkpoint.stored_name(name), checkpoint.read([name])[name])
    for block in walk(checkpoint, None, frozenset(), torch.float32, torch.device("cpu")):
        started = time.monotonic()
        known = checkpoint.site_reports
        every = checkpoint.manifest is None
        names = [site.name for site in block.sites if every or site.name in known]
        reports = {name: known.get(name, {}) for name in names}
        store_block(writer, checkpoint, block.tensors, reports)
        seconds = time.monotonic() - started
        on_block(BlockDone(block.index, checkpoint.block_count, seconds))


def note_losses(checkpoint: Checkpoint, note: Callable[[str], None]) -> None:
    """Say what was calibrated on weights that are about to change, and is left out."""
    if checkpoint.activation:
        note("activation thresholds belong to the old weights and are left out; sparsify OUT anew")
    if checkpoint.kv_cache:
        note("the KV cache was calibrated on the old weights and is left out; quantize-kv OUT anew")


def copy_sides(
    writer: ArtifactWriter,
    checkpoint: Checkpoint,
    *,
    activation: bool = True,
    kv_cache: bool = True,
) -> None:
    """What calibration found for the weights as they are: gates, and how the KV cache is quantised."""
    gates = checkpoint.activation
    if gates and activation:
        writer.add_activation(
            gates.method, gates.prefill, gates.gates, checkpoint.read_activation()
        )
    if checkpoint.kv_cache and kv_cache:
        writer.add_kv_cache(checkpoint.kv_cache, checkpoint.read_kv_cache())


@dataclass(frozen=True)
class Share:
    """Zeros among weights; adds up."""

    zeros: int = 0
    weights: int = 0

    def __add__(self, other: Share) -> Share:
        return Share(self.zeros + other.zeros, self.weights + other.weights)

    @property
    def sparsity(self) -> float:
        return self.zeros / self.weights if self.weights else 0.0


def store_block(
    writer: ArtifactWriter,
    checkpoint: Checkpoint,
    tensors: dict[str, Tensor],
    reports: dict[str, dict[str, float]],
) -> Share:
    """Write the tensors of a block, the sites named in `reports` in their compressed encoding."""
    share = Share()
    for name, tensor in tensors.items():
        site = name.removesuffix(".weight")
        if name.endswith(".weight") and site in reports:
            stored = checkpoint.stored_name(name).removesuffix(".weight")
            record = writer.add_site(site, tensor, reports[site], stored)
            share += Share(tensor.numel() - record.nonzeros, tensor.numel())
        else:
            writer.add(checkpoint.stored_name(name), tensor)
    return share


def check_not_inside(out: Path, source: Path) -> None:
    """RecipeError when `out` is the source directory or lies in it; CheckpointError if assets are not."""
    if out.resolve() == source.resolve() or source.resolve() in out.resolve().parents:
        raise RecipeError(f"{out} lies in the source checkpoint; choose another -o")
    assets(source)


def peak_rss_bytes() -> int:
    """Highest resident memory of this process so far."""
    try:
        # getrusage counts what the process that started this one held, before it became this one.
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int:
    """Resident memory of this process now; where the system does not say, the highest so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_rss_bytes()
    return pages * resource.getpagesize()


def peak_device_bytes(device: torch.device) -> int | None:
    """Highest memory allocated by tensors on an accelerator; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
