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
from llmsqueeze.parts import Split
from llmsqueeze.policy import Policy
from llmsqueeze.ranks import Team, shared_out
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
    loaded: LoadedBlock, specs: list[GateSpec], recipe: SparsifyRecipe, split: Split
) -> list[GateState]:
    """Thresholds of all gates of one block; afterwards its activations are those of the next block.

    split: the samples, and the ranks that share them; all make this call and get the same gates.
    Raises CalibrationError when what a gate sees is not finite.
    """
    run, team = loaded.run, split.team
    assert run is not None
    states = _prepare(loaded, specs, recipe, split)
    _observe(run, states, recipe.prefix, split)
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
        _make_branches(run, states, method, recipe, split)
    for state in states:
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
            if team.leads:  # it has the first batch, and nothing else is looked at
                search(loaded, states, gating, recipe, split.batches[0])
            _take_over(states, gating, team)
        if recipe.sequential:
            gating.policy = Policy("after", recipe.prefix)
            _settle(run, states, gating, recipe.prefix, split)
    if not run.last:
        for rows in split.batches:
            run.propagate(rows)
    return states


def _make_branches(
    run: Run, states: list[GateState], method: Any, recipe: SparsifyRecipe, split: Split
) -> None:
    """Every rank makes the low-rank branches of some gates, and all have all of them."""
    team = split.team
    owners = shared_out([sum(w.numel() for w in state.weights) for state in states], team.size)
    own: dict[str, list[Any]] = {}
    factors: dict[str, Tensor] = {}
    for state, owner in zip(states, owners, strict=True):
        x = _first_tokens(run, state, recipe.prefix, split)
        if owner == team.rank:
            at = state.spec.at
            branch = method.branch(
                torch.cat(state.weights), state.scale, x, state.histogram, recipe.sparsity, recipe.config
            )  # fmt: skip
            own[at] = [branch.sparse_ratio, branch.sparsity, branch.fixed]
            if branch.up is not None:
                factors |= {f"{at} up": branch.up, f"{at} down": branch.down}
    told = {at: said for each in team.gather(own) for at, said in each.items()}
    factors = team.share(factors, run.hidden.device)
    for state in states:
        at = state.spec.at
        ratio, sparsity, fixed = told[at]
        up, down = factors.get(f"{at} up"), factors.get(f"{at} down")
        state.branch = Branch(ratio, sparsity, up, down, fixed)
        if fixed:
            state.drop(sparsity)


def _first_tokens(run: Run, state: GateState, prefix: int, split: Split) -> Tensor:
    """[tokens, in]: of the first batches, as many as it takes to have BRANCH_TOKENS, whoever has them."""
    team, own, found = split.team, iter(state.x), list[Tensor]()
    for number, part in enumerate(split.parts):
        for rows in part.batches:
            if sum(map(len, found)) >= BRANCH_TOKENS:
                break
            owner = number % team.size
            if owner == team.rank:
                x = next(own).contiguous()
            else:
                tokens = (rows.stop - rows.start) * (run.hidden.shape[1] - prefix)
                shape = (min(tokens, BRANCH_TOKENS), state.scale.numel())
                x = torch.empty(shape, dtype=run.hidden.dtype, device=state.scale.device)
            team.send(x, owner)
            found.append(x)
    return torch.cat(found)


def _take_over(states: list[GateState], gating: Gating, team: Team) -> None:
    """Set what the first rank's search has found."""
    found: list[list[Any]] = [
        [state.share, state.threshold, state.branch is not None, gating.gates[state.spec.at].branched]
        for state in states
    ]  # fmt: skip
    told = team.gather(found)[0]
    if team.leads:
        return
    for state, (share, threshold, kept, branched) in zip(states, told, strict=True):
        gate = gating.gates[state.spec.at]
        state.share, state.threshold, gate.branched = share, threshold, bool(branched)
        state.branch = state.branch if kept else None
        gate.threshold.copy_(state.tau())


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


def _settle(run: Run, states: list[GateState], gating: Gating, prefix: int, split: Split) -> None:
    """Thresholds for what gates see while those before them are shut."""
    for state in states:
        state.histogram = MagnitudeHistogram(state.scale.device)
    _observe(run, states, prefix, split)
    for state in states:
        state.drop(state.share)
        gating.gates[state.spec.at].threshold.copy_(state.tau())


def _prepare(
    loaded: LoadedBlock, specs: list[GateSpec], recipe: SparsifyRecipe, split: Split
) -> list[GateState]:
    method = activation_method(recipe.method)
    assert loaded.run is not None
    companions = {spec.companion for spec in specs if spec.companion}
    means = _mean_outputs(loaded.run, companions, recipe.prefix, split) if companions else {}
    states = []
    for spec in specs:
        weights = [loaded.tensors[f"{loaded.prefix}{n}.weight"] for n in spec.members]
        companion = means[spec.companion] if spec.companion else None
        scale = method.scale(spec, weights, companion, recipe.config).float()
        outputs = {name: loaded.linears[name].out_features for name in spec.members}
        histogram = MagnitudeHistogram(scale.device)
        states.append(GateState(spec, weights, outputs, scale, histogram))
    return states


def _mean_outputs(run: Run, names: set[str], prefix: int, split: Split) -> dict[str, Tensor]:
    """[out] fp32 by linear: the mean magnitude of what it puts out."""
    length, device = run.hidden.shape[1], run.hidden.device
    widths = {name: run.block.get_submodule(name).weight.shape[0] for name in sorted(names)}
    # By part, so that they are added in one order whatever rank has them.
    sums = {
        name: torch.zeros(len(split.parts), width, dtype=torch.float64, device=device)
        for name, width in widths.items()
    }
    number = 0

    def add(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            tokens = _beyond(out, length, prefix)
            sums[name][number] += tokens.abs().sum(dim=0, dtype=torch.float64)

        return hook

    handles = [run.block.get_submodule(n).register_forward_hook(add(n)) for n in names]
    try:
        for number, part in split.numbered:  # noqa: B007, the hooks read it
            for rows in part.batches:
                run.forward(rows)
    finally:
        for handle in handles:
            handle.remove()
    count = sum(len(part.samples) for part in split.parts) * (length - prefix)
    means = {}
    for name, by_part in sums.items():
        split.team.add(by_part)
        total = torch.zeros_like(by_part[0])
        for part_sum in by_part:
            total += part_sum
        means[name] = (total / count).float()
    return means


def _observe(run: Run, states: list[GateState], prefix: int, split: Split) -> None:
    """Add what the gates see in one pass over all ranks' samples to their histograms, which are empty."""
    with _observing(run.block, states, prefix, run.hidden.shape[1]):
        for rows in split.batches:
            run.forward(rows)
    for state in states:
        split.team.add(state.histogram.counts)


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
