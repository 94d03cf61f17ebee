"""Calibrating the gates of one block: what magnitudes occur, thresholds from their quantiles, allocation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmsqueeze.activation import GateRecord, thresholds
from llmsqueeze.blocks import LoadedBlock, Run
from llmsqueeze.errors import CalibrationError
from llmsqueeze.methods import activation_method, greedy
from llmsqueeze.methods.gating import BlockParts, Branch, GateSpec
from llmsqueeze.numerics.histogram import MagnitudeHistogram
from llmsqueeze.policy import Policy
from llmsqueeze.recipe import is_ignored
from llmsqueeze.runtime.gates import GatedOutput, GateParts, Gating, install
from llmsqueeze.sparsify_recipe import SparsifyRecipe

# Inputs kept as they are to choose a low-rank branch on.
BRANCH_TOKENS = 1024
# A branch that gains less than this share of the block's error is not kept. At 1 % of the unweighted error
# three of SmolLM2-135M's 120 gates got one at half the inputs, and perplexity rose by 0.4 %.
BRANCH_GAIN = 0.05
# A site with so many exact zeros was trained to be sparse; dropping those changes nothing.
ALREADY_SPARSE = 0.3


@dataclass
class GateState:
    """A gate while it is being calibrated. Names as in its spec, within the block."""

    spec: GateSpec
    weights: list[Tensor]  # of the members, [out, in] as stored
    outputs: dict[str, int]  # of every member
    scale: Tensor
    histogram: MagnitudeHistogram
    share: float = 0.0
    threshold: float = 0.0
    branch: Branch | None = None
    x: list[Tensor] = field(default_factory=list)

    def drop(self, share: float) -> None:
        """Set the share of inputs to drop. Where exact zeros are more, the threshold is 0: lossless."""
        self.share = share
        self.threshold = float(self.histogram.quantiles(torch.tensor([share]))[0])

    def tau(self) -> Tensor:
        """[in] fp32, what the gate compares with."""
        return thresholds(self.threshold, self.scale)

    def factors(self) -> dict[str, Tensor]:
        """The low-rank branch by side tensor: "down" [rank, in], and every member's part of up."""
        branch = self.branch
        if branch is None or branch.up is None or branch.down is None:
            return {}
        dtype = self.weights[0].dtype
        ups = branch.up.to(dtype).split(list(self.outputs.values()))
        return {"down": branch.down.to(dtype), **dict(zip(self.outputs, ups, strict=True))}

    def record(self, prefix: str) -> GateRecord:
        """As the manifest keeps it. prefix: of the block, which makes names full."""
        return GateRecord(
            kind=self.spec.kind,
            members=tuple(prefix + name for name in self.spec.members),
            rows=tuple(prefix + name for name in self.spec.rows),
            width=self.scale.numel(),
            sparsity=max(self.share, self.histogram.zeros),
            threshold=self.threshold,
            zeros=self.histogram.zeros,
            ratio=self.branch.sparse_ratio if self.branch else 1.0,
            rank=len(self.factors().get("down", ())),
        )

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Its side tensors by name."""
        at = prefix + self.spec.at
        found = {f"{at}.scale": self.scale.float(), f"{at}.curve": self.histogram.curve()}
        for name, factor in self.factors().items():
            found[f"{at}.down" if name == "down" else f"{prefix}{name}.up"] = factor
        return found

    def parts(self) -> GateParts:
        """As the runtime installs it into the block."""
        spec, ups = self.spec, self.factors()
        down = ups.pop("down", None)
        return GateParts(spec.kind, spec.at, spec.members, self.tau(), down, ups or None)


def choose_gates(
    loaded: LoadedBlock, groups: list[list[str]], mlp: Any, recipe: SparsifyRecipe
) -> list[GateSpec]:
    """Where the recipe's method puts gates in this block; linears that are ignored read everything."""
    method = activation_method(recipe.method)
    kept = [
        [n for n in names if not is_ignored(loaded.prefix + n, recipe.ignore)] for names in groups
    ]
    specs = method.gates(BlockParts([names for names in kept if names], mlp), recipe.config)
    return [
        spec
        for spec in specs
        if not any(
            is_ignored(loaded.prefix + n, recipe.ignore) for n in (*spec.members, *spec.rows)
        )
    ]


def calibrate_block(
    loaded: LoadedBlock, specs: list[GateSpec], recipe: SparsifyRecipe, batches: list[slice]
) -> list[GateState]:
    """Thresholds of all gates of one block; afterwards its activations are those of the next block.

    Raises CalibrationError when what a gate sees is not finite.
    """
    run = loaded.run
    assert run is not None
    states = _prepare(loaded, specs, recipe, batches)
    with _observing(run.block, states, recipe.prefix, run.hidden.shape[1]):
        for rows in batches:
            run.forward(rows)
    method: Any = activation_method(recipe.method)
    for state in states:
        name = loaded.prefix + state.spec.at
        if int(state.histogram.counts[-1]):
            raise CalibrationError(
                f"activations at {name} are NaN, Inf or beyond the range; try --dtype float32, or check "
                "the checkpoint with `llmsqueeze eval`"
            )
        if not state.histogram.total:
            raise CalibrationError(
                f"{name} took no part in the forward pass; its architecture is not supported"
            )
        state.drop(recipe.sparsity)
        if hasattr(method, "branch") and recipe.sparsity:
            state.branch = method.branch(
                torch.cat(state.weights), state.scale, torch.cat(state.x), state.histogram,
                recipe.sparsity, recipe.config,
            )  # fmt: skip
            if state.branch.fixed:
                state.drop(state.branch.sparsity)
        state.x = []
    searching = (
        bool(states)
        and recipe.sparsity > 0
        and (
            recipe.allocation == "greedy"
            or any(state.branch and not state.branch.fixed for state in states)
        )
    )
    if searching or recipe.sequential:
        parts = {state.spec.at: state.parts() for state in states}
        gating = install(run.block, parts, Policy("dense"), [run.block])
        if searching:
            search = _allocate if recipe.allocation == "greedy" else _choose_branches
            search(loaded, states, gating, recipe, batches[0])
        if recipe.sequential:
            gating.policy = Policy("after", recipe.prefix)
            _settle(run, states, gating, recipe.prefix, batches)
    if not run.last:
        for rows in batches:
            run.propagate(rows)
    return states


def _choose_branches(
    loaded: LoadedBlock,
    states: list[GateState],
    gating: Gating,
    recipe: SparsifyRecipe,
    rows: slice,
) -> None:
    """Keep a gate's low-rank branch only if the block's output on `rows` is closer with it."""
    error = _block_error(loaded, gating, recipe, rows)
    for state in states:
        gating.gates[state.spec.at].branched = bool(state.branch and state.branch.fixed)
    least = error()
    for state in states:
        if state.branch is None or state.branch.fixed:
            continue
        gate = gating.gates[state.spec.at]
        gate.branched = bool(state.factors())
        state.drop(state.branch.sparsity)
        gate.threshold.copy_(state.tau())
        found = error()
        if found < (1 - BRANCH_GAIN) * least:
            least = found
            continue
        gate.branched, state.branch = False, None
        state.drop(recipe.sparsity)
        gate.threshold.copy_(state.tau())
    gating.policy = Policy("dense")


def _block_error(
    loaded: LoadedBlock, gating: Gating, recipe: SparsifyRecipe, rows: slice
) -> Callable[[], float]:
    """The error of the block's output on `rows` with the gates as they are by then.

    Squared, every channel in units of its own mean square: the next norm has a weight for every channel,
    so a residual stream's few large ones must not decide alone.
    """
    run = loaded.run
    assert run is not None
    dense = run.forward(rows)[:, recipe.prefix :]
    power = dense.float().square().mean(dim=(0, 1)).clamp_min(torch.finfo(torch.float32).tiny)
    gating.policy = Policy("after", recipe.prefix)

    def error() -> float:
        out = run.forward(rows)[:, recipe.prefix :]
        return float(((out - dense).float().square() / power).sum(dtype=torch.float64))

    return error


def _settle(
    run: Run, states: list[GateState], gating: Gating, prefix: int, batches: list[slice]
) -> None:
    """Thresholds for what gates see while those before them are shut."""
    for state in states:
        state.histogram = MagnitudeHistogram(state.scale.device)
    with _observing(run.block, states, prefix, run.hidden.shape[1]):
        for rows in batches:
            run.forward(rows)
    for state in states:
        state.drop(state.share)
        gating.gates[state.spec.at].threshold.copy_(state.tau())


def _prepare(
    loaded: LoadedBlock, specs: list[GateSpec], recipe: SparsifyRecipe, batches: list[slice]
) -> list[GateState]:
    method = activation_method(recipe.method)
    assert loaded.run is not None
    companions = {spec.companion for spec in specs if spec.companion}
    means = _mean_outputs(loaded.run, companions, recipe.prefix, batches) if companions else {}
    states = []
    for spec in specs:
        weights = [loaded.tensors[f"{loaded.prefix}{n}.weight"] for n in spec.members]
        companion = means[spec.companion] if spec.companion else None
        scale = method.scale(spec, weights, companion, recipe.config).float()
        outputs = {name: loaded.linears[name].out_features for name in spec.members}
        histogram = MagnitudeHistogram(scale.device)
        states.append(GateState(spec, weights, outputs, scale, histogram))
    return states


def _mean_outputs(
    run: Run, names: set[str], prefix: int, batches: list[slice]
) -> dict[str, Tensor]:
    """[out] fp32 by linear: the mean magnitude of what it puts out."""
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(names, 0)

    def add(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            tokens = _beyond(out, run.hidden.shape[1], prefix)
            total = tokens.abs().sum(dim=0, dtype=torch.float64)
            sums[name] = sums.get(name, torch.zeros_like(total)) + total
            counts[name] += tokens.shape[0]

        return hook

    handles = [run.block.get_submodule(n).register_forward_hook(add(n)) for n in names]
    try:
        for rows in batches:
            run.forward(rows)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (total / counts[name]).float() for name, total in sums.items()}


@contextlib.contextmanager
def _observing(
    block: nn.Module, states: list[GateState], prefix: int, length: int
) -> Iterator[None]:
    """While this lasts, every forward pass adds to the states' histograms."""

    def see(state: GateState, x: Tensor) -> None:
        tokens = _beyond(x, length, prefix).float()
        state.histogram.update(tokens.abs() * state.scale)
        if sum(part.shape[0] for part in state.x) < BRANCH_TOKENS:
            state.x.append(tokens[:BRANCH_TOKENS].to(x.dtype))

    handles = []
    for state in states:
        module = block.get_submodule(state.spec.at)
        if isinstance(module, GatedOutput):
            module = module.function  # what the gate itself sees
        if state.spec.kind == "input":
            handles.append(
                module.register_forward_pre_hook(lambda m, args, s=state: see(s, args[0]))
            )
        else:
            handles.append(module.register_forward_hook(lambda m, args, out, s=state: see(s, out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _beyond(x: Tensor, length: int, prefix: int) -> Tensor:
    """[tokens, width]: the tokens after the first `prefix` of every sample."""
    # OPT flattens samples and tokens on its way to the MLP.
    return x.reshape(-1, length, x.shape[-1])[:, prefix:].flatten(0, 1)


def _allocate(
    loaded: LoadedBlock,
    states: list[GateState],
    gating: Gating,
    recipe: SparsifyRecipe,
    rows: slice,
) -> None:
    """Divide the block's budget among its gates by what each costs the block's output on `rows`."""
    block_error = _block_error(loaded, gating, recipe, rows)
    by_name = {state.spec.at: state for state in states}

    def error(shares: Mapping[str, float]) -> float:
        for name, share in shares.items():
            by_name[name].drop(share)
            gating.gates[name].threshold.copy_(by_name[name].tau())
        return block_error()

    path = greedy.allocate(error, weigh(loaded, states), recipe.sparsity, recipe.greedy_step)
    error(path[-1].sparsity)
    gating.policy = Policy("dense")


def weigh(loaded: LoadedBlock, states: list[GateState]) -> dict[str, float]:
    """Bytes that each gate decides about: non-zeros of the linears behind it, and masks if any."""
    weights = {}
    for state in states:
        total = 0.0
        for name in (*state.spec.members, *state.spec.rows):
            weight = loaded.tensors[f"{loaded.prefix}{name}.weight"]
            nonzeros = int(torch.count_nonzero(weight))
            packed = nonzeros * weight.element_size() + weight.numel() / 8
            total += min(packed, weight.numel() * weight.element_size())
        weights[state.spec.at] = total
    return weights
