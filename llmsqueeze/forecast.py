"""What a recipe will make of a checkpoint, and what doing it takes, before any weight is read.

Bytes follow from shapes, and so does memory: a count of what is held at once (footprint.py). Time is an
estimate, from a count of multiplications and this machine's rate of one product, measured here and now.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from llmsqueeze import footprint
from llmsqueeze.activation import GateRecord
from llmsqueeze.blocks import batch_samples
from llmsqueeze.checkpoint import Checkpoint, PackedSource
from llmsqueeze.device import calibration_dtype
from llmsqueeze.encode_recipe import EncodeRecipe
from llmsqueeze.kv_recipe import DEFAULT_SEQLEN as KV_SEQLEN
from llmsqueeze.kv_recipe import KvRecipe
from llmsqueeze.methods import CALIBRATED_KV, activation_method
from llmsqueeze.methods.gating import BlockParts
from llmsqueeze.plan import (
    check_gates,
    choose_sites,
    memory_estimate,
    routed_inputs,
    window_length,
)
from llmsqueeze.recipe import Calibration, PruneRecipe, allocation_needs, is_ignored
from llmsqueeze.runtime.packed import LEAST_SPARSITY
from llmsqueeze.sparsify_recipe import DEFAULT_SEQLEN as GATE_SEQLEN
from llmsqueeze.sparsify_recipe import SparsifyRecipe
from llmsqueeze.step_recipes import Step
from llmsqueeze.traffic import read_bytes, stored_bytes

# Passes of a greedy allocation over its first batch: one for each step and gate that it tries.
GREEDY_TRIALS = 30
# What else a block computes, its activation functions and norms, beside its products and attention.
OVERHEAD = 1.3
# Multiplications by which a key or value is coded: codebooks, and every rounding error passed on.
KV_WORK = 40_000
# Reading and writing weights, a second for each so many bytes: packing takes most of it.
STORE_RATE = 150e6
RATE_SECONDS = 0.5


# What libraries load and set up until a run is done, which `plan` has not met: what a model of 200 kB took,
# 75 to 100 MB by method, and less than 10 where nothing is calibrated. While texts become tokens it is so
# much for a moment, and nothing else is held yet.
LIBRARIES = 90_000_000
LIBRARIES_ALONE = 10_000_000
TOKENISING = 190_000_000


@dataclass(frozen=True)
class Outcome:
    """sites: linears by the command that changes them. bytes: of all tensors on disk, before and after;
    read: of weights by one token. kernels: what a GPU runs and how many linears by it."""

    blocks: int
    linears: int
    sites: dict[str, int]
    bytes_before: int
    bytes_after: int
    read_before: int
    read_after: int
    kernels: dict[str, int]


@dataclass(frozen=True)
class Effort:
    """Of one step: its command; tokens that it is calibrated on; bytes that it holds on the device, and
    seconds; None where masks are trained, which is not estimated."""

    command: str
    tokens: int
    bytes: int
    seconds: float | None


@dataclass
class _Linear:
    """What becomes of one linear."""

    rows: int
    columns: int
    item: int
    bytes: int
    zeros: float
    pattern: str = ""
    int8: bool = False
    gated: bool = False
    routed: bool = False

    def pack(self) -> None:
        """Bytes of the smallest encoding; see encodings.smallest."""
        weights = self.rows * self.columns
        sizes = [weights * self.item]
        mask = self.rows * -(-self.columns // 8) + 4 * (self.rows + 1)
        sizes.append(round(weights * (1 - self.zeros)) * self.item + mask)
        if self.int8:
            sizes.append(weights + self.rows * self.item)
        self.bytes = min(sizes)

    def kernel(self) -> str:
        """As runtime.linears chooses, to which experts are no linears."""
        if self.routed:
            return "dense"
        if self.gated:
            if self.int8:
                return "columns of 8 bits, skipped"
            return "columns of 9 bits, skipped" if self.pattern == "2:4-out" else "columns, skipped"
        if self.int8:
            return "columns of 8 bits"
        if self.pattern in ("2:4", "tile"):
            return "sparse tensor cores"
        return "values and gaps" if self.zeros >= LEAST_SPARSITY else "dense"


def outcome(checkpoint: Checkpoint, steps: list[Step]) -> Outcome:
    """What `steps` make of a checkpoint. Raises RecipeError where they do not fit it."""
    linears = _linears(checkpoint)
    gates: dict[str, GateRecord] = {}
    if checkpoint.activation and not any(_changes(step) for step in steps):
        gates = dict(checkpoint.activation.gates)
    sites = {}
    for step in steps:
        recipe = step.recipe
        if isinstance(recipe, PruneRecipe):
            names = choose_sites(checkpoint, recipe)
            for name in names:
                linears[name].zeros = max(recipe.target.sparsity, linears[name].zeros)
                linears[name].pattern = recipe.target.pattern_name
                # Products of inputs are for fitting what is left; where they only choose (DSnoT's quadratic
                # swap), eight bits stay after all, and fewer bytes than said.
                linears[name].int8 &= "gram" not in recipe.needs
                linears[name].pack()
            sites[step.command] = len(names)
        elif isinstance(recipe, EncodeRecipe):
            for linear in linears.values():
                linear.int8 = True
                linear.pack()
            sites[step.command] = len(linears)
        elif isinstance(recipe, SparsifyRecipe):
            gates = _gates(checkpoint, recipe)
            sites[step.command] = len({n for g in gates.values() for n in (*g.members, *g.rows)})
    for gate in gates.values():
        for name in (*gate.members, *gate.rows):
            linears[name].gated = True
    sizes = {f"{name}.weight": linear.bytes for name, linear in linears.items()}
    after = sum(sizes.get(name) or stored_bytes(checkpoint, name) for name in checkpoint.sources)
    kernels: dict[str, int] = {}
    for linear in linears.values():
        kernels[linear.kernel()] = kernels.get(linear.kernel(), 0) + 1
    own = checkpoint.activation.gates if checkpoint.activation else {}
    return Outcome(
        blocks=checkpoint.block_count,
        linears=len(linears),
        sites=sites,
        bytes_before=checkpoint.stored_bytes,
        bytes_after=after,
        read_before=read_bytes(checkpoint, own),
        read_after=read_bytes(checkpoint, gates, sizes=sizes),
        kernels=kernels,
    )


def efforts(checkpoint: Checkpoint, steps: list[Step], device: torch.device) -> list[Effort]:
    """What each step takes, in the order of the steps. Multiplies matrices for a moment, to know how fast."""
    found = []
    for step in steps:
        recipe = step.recipe
        calibration = _calibration(checkpoint, step)
        if calibration is None or isinstance(recipe, EncodeRecipe):
            seconds = 2 * checkpoint.stored_bytes / STORE_RATE
            found.append(Effort(step.command, 0, footprint.encoding_bytes(checkpoint), seconds))
            continue
        assert not isinstance(recipe, EncodeRecipe) and hasattr(recipe, "dtype")
        dtype = calibration_dtype(recipe.dtype, checkpoint.dtype, device)
        samples, seqlen = calibration
        held = _held(checkpoint, step, samples, seqlen, dtype, device)
        if isinstance(recipe, PruneRecipe) and recipe.tiles != "score":
            found.append(Effort(step.command, samples * seqlen, held, None))
            continue
        work = _work(checkpoint, step, samples, seqlen, device)
        seconds = work / product_rate(checkpoint, dtype, device)
        seconds += checkpoint.stored_bytes / STORE_RATE
        found.append(Effort(step.command, samples * seqlen, held, seconds))
    return found


def host_bytes(
    checkpoint: Checkpoint,
    steps: list[Step],
    made: Outcome,
    took: list[Effort],
    device: torch.device,
    now: int,
) -> int:
    """Resident memory at the peak. now: of this process, which has loaded the same libraries.

    Beside what walks hold on a CPU: pages of the source, and finished tensors that no file has yet, which are
    the most while the last block is at work or once it is done.
    """
    changed = any(isinstance(step.recipe, PruneRecipe | EncodeRecipe) for step in steps)
    pending = footprint.pending_bytes(checkpoint, made.bytes_after, changed=changed)
    before = pending * (made.blocks - 1) // made.blocks
    held = [0]
    for stage in _stages(steps, took):
        if device.type == "cpu":
            held.append(sum(effort.bytes for effort in stage))
    become = footprint.result_bytes(checkpoint) if changed else 0
    waiting = footprint.waiting_bytes(checkpoint, made.bytes_after, changed=changed)
    # Weights are copied when the caches are calibrated.
    beside = 0 if all(isinstance(step.recipe, KvRecipe) for step in steps) else waiting
    calibrating = before + max(held) + beside
    peak = become + max(calibrating, pending + footprint.encoding_bytes(checkpoint) + waiting)
    reading = min(checkpoint.stored_bytes, footprint.reading_bytes(checkpoint))
    calibrated = any(effort.tokens for effort in took)
    if not calibrated:
        return now + LIBRARIES_ALONE + reading + peak
    return now + max(LIBRARIES + reading + peak, TOKENISING)


def _stages(steps: list[Step], took: list[Effort]) -> list[list[Effort]]:
    """Efforts that are at work at the same time: a block is pruned, and then calibrated for gates."""
    stages: list[list[Effort]] = []
    for step, effort in zip(steps, took, strict=True):
        recipe = step.recipe
        gated = isinstance(recipe, SparsifyRecipe) and not recipe.rotate
        changing = stages and stages[-1][-1].command in ("prune", "encode")
        if stages and (isinstance(recipe, EncodeRecipe) or (gated and changing)):
            stages[-1].append(effort)
        else:
            stages.append([effort])
    return stages


def product_rate(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> float:
    """Multiplications and additions a second of one product as large as the largest linear's.

    The fastest of several: what else the machine does now is not what it will do.
    """
    widest = max(
        checkpoint.linears(0).values(), key=lambda module: module.in_features * module.out_features
    )
    weight = torch.randn(widest.out_features, widest.in_features, device=device).to(dtype)
    x = torch.randn(1024, widest.in_features, device=device).to(dtype)
    best, began = math.inf, time.perf_counter()
    while time.perf_counter() - began < RATE_SECONDS:
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * x.shape[0] * weight.numel() / best


def _linears(checkpoint: Checkpoint) -> dict[str, _Linear]:
    found = {}
    for index in range(checkpoint.block_count):
        for name, module in checkpoint.linears(index).items():
            source = checkpoint.sources[f"{name}.weight"]
            item = checkpoint.site_dtype(f"{name}.weight").itemsize
            linear = _Linear(
                module.out_features, module.in_features, item,
                stored_bytes(checkpoint, f"{name}.weight"), 0.0,
                routed=f"{name}.weight" in checkpoint.routed_shares,
            )  # fmt: skip
            if isinstance(source, PackedSource):
                linear.zeros = source.record.sparsity
                linear.int8 = source.record.encoding == "int8"
            found[name] = linear
    return found


def _changes(step: Step) -> bool:
    """Whether gates that were there are left out, or others made."""
    return not isinstance(step.recipe, KvRecipe)


def _gates(checkpoint: Checkpoint, recipe: SparsifyRecipe) -> dict[str, GateRecord]:
    """The gates that calibration will find, but that linears of one input share theirs."""
    check_gates(checkpoint)
    method = activation_method(recipe.method)
    found = {}
    for index in range(checkpoint.block_count):
        prefix = f"{checkpoint.blocks_path}.{index}."
        linears = {
            name.removeprefix(prefix): module
            for name, module in checkpoint.linears(index).items()
            if not is_ignored(name, recipe.ignore)
        }
        for spec in method.gates(BlockParts([[n] for n in linears], checkpoint.mlp), recipe.config):
            if not all(name in linears for name in (*spec.members, *spec.rows)):
                continue
            found[prefix + spec.at] = GateRecord(
                kind=spec.kind,
                members=tuple(prefix + name for name in spec.members),
                rows=tuple(prefix + name for name in spec.rows),
                width=linears[spec.members[0]].in_features,
                sparsity=recipe.sparsity,
                threshold=0.0,
                zeros=0.0,
            )
    return found


def _calibration(checkpoint: Checkpoint, step: Step) -> tuple[int, int] | None:
    """Samples and tokens of each; None if the step needs none."""
    recipe = step.recipe
    asked: Calibration
    if isinstance(recipe, PruneRecipe):
        if not recipe.needs and not allocation_needs(recipe):
            return None
        asked = recipe.calibration
        return asked.samples, window_length(checkpoint, asked.seqlen)
    if isinstance(recipe, KvRecipe) and recipe.method != CALIBRATED_KV:
        return None
    if isinstance(recipe, SparsifyRecipe | KvRecipe):
        asked = recipe.calibration
        longest = GATE_SEQLEN if isinstance(recipe, SparsifyRecipe) else KV_SEQLEN
        return asked.samples, asked.seqlen or min(longest, window_length(checkpoint, None))
    return None


def _held(
    checkpoint: Checkpoint,
    step: Step,
    samples: int,
    seqlen: int,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Bytes that a walk holds on its device at its peak."""
    recipe = step.recipe
    if isinstance(recipe, PruneRecipe):
        tokens = torch.empty(samples, seqlen, dtype=torch.int64, device="meta")
        return memory_estimate(checkpoint, recipe, tokens, dtype, device)
    assert isinstance(recipe, SparsifyRecipe | KvRecipe)
    walk = footprint.Walk.of(samples, seqlen, recipe.batch, dtype, device)
    inside = footprint.kv_bytes if isinstance(recipe, KvRecipe) else footprint.gate_bytes
    return max(footprint.embedding_bytes(checkpoint, walk), inside(checkpoint, walk))


def _work(
    checkpoint: Checkpoint, step: Step, samples: int, seqlen: int, device: torch.device
) -> float:
    """Multiplications and additions of a walk."""
    recipe = step.recipe
    tokens = samples * seqlen
    named = checkpoint.linears(0)
    linears = list(named.values())
    shares = [checkpoint.routed_shares.get(f"{name}.weight", 1.0) for name in named]
    width = checkpoint.model.get_input_embeddings().weight.shape[1]
    weights = sum(m.weight.numel() * share for m, share in zip(linears, shares, strict=True))
    forward = OVERHEAD * (2 * weights + 4 * seqlen * width)  # for a token, attention whole
    blocks = checkpoint.block_count
    if isinstance(recipe, SparsifyRecipe):
        first = min(samples, batch_samples(seqlen, device)) * seqlen
        trials = GREEDY_TRIALS if recipe.allocation == "greedy" else 0
        passes = 3 if recipe.sequential else 2
        return blocks * forward * (passes * tokens + trials * first)
    if isinstance(recipe, KvRecipe):
        _, groups, channels = footprint.attention_shape(checkpoint)
        passes = 4 if recipe.config and recipe.config.fisher else 1
        return blocks * tokens * (forward * passes + KV_WORK * groups * channels)
    assert isinstance(recipe, PruneRecipe)
    needs = recipe.needs
    looks = 1 if recipe.order == "group" else 2
    looks += 1 if allocation_needs(recipe) else 0
    looks += 1 if "product" in needs and recipe.dense_share else 0
    squares = 2 if "product" in needs else 1 if "gram" in needs else 0
    # q, k and v share one input, gate and up another: about as many Grams as widths, and one more.
    plain = {m.in_features for m, share in zip(linears, shares, strict=True) if share == 1}
    entries = sum(n**2 for n in plain) + min(plain) ** 2
    entries += sum(share * width**2 for width, share in routed_inputs(checkpoint, 0))
    grams = 2 * tokens * squares * entries
    solves = 0.0
    for module in linears:
        each = 2 * module.weight.numel() * module.in_features
        if recipe.method == "admm":
            solves += recipe.config.admm_steps * each + 2 * module.in_features**3
        elif "gram" in needs:
            solves += each + 2 * module.in_features**3
        if recipe.refit == "pcg":
            solves += recipe.refit_config.refit_steps * each
    return blocks * (looks * tokens * forward + grams + solves)
