"""Training masks on a whole model: PATCH (arXiv 2509.23410) and MaskLLM (arXiv 2409.17481).

Weights stay as they are; the linears run through soft masks while it lasts. Everything random is a
function of the seed and of where it is used (step, pass, site), so a run that was cut off goes on
from its saved logits as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmsqueeze.errors import CalibrationError, Stopped
from llmsqueeze.methods import patch
from llmsqueeze.methods.base import Target
from llmsqueeze.numerics.masks import expand_tiles
from llmsqueeze.numerics.soft_masks import (
    PatternLinear,
    TileLinear,
    harden_patterns,
    highest_tiles,
    tile_areas,
)
from llmsqueeze.training_state import TrainingState, identity_of


@dataclass(frozen=True)
class StepDone:
    """Progress: one update. loss: cross-entropy per token; density: of the soft masks."""

    index: int
    total: int
    loss: float
    density: float
    seconds: float


@dataclass(frozen=True)
class TrainedMasks:
    """keep: [out, in] bool by site, on the CPU; dense_tiles: by site.

    losses, densities: of every step, the steps before a resumption included.
    """

    keep: dict[str, Tensor]
    dense_tiles: dict[str, int]
    losses: list[float]
    densities: list[float]


def train_masks(
    model: nn.Module,
    sites: dict[str, Tensor],
    tokens: Tensor,
    target: Target,
    config: patch.Config,
    device: torch.device,
    *,
    benefits: dict[str, Tensor] | None = None,
    state: Path | None = None,
    on_step: Callable[[StepDone], None] = lambda done: None,
    stop: Callable[[], bool] = lambda: False,
) -> TrainedMasks:
    """Choose masks by gradient descent on the language-model loss.

    model: a causal language model of transformers, on `device` in the dtype to compute in; its
    weights are only read. sites: name of a linear → 2:4 keep mask [out, in], the prior and in mode
    "tile" what is kept. tokens: [samples, seqlen] int64, on the CPU.
    target: pattern Tile; the sparsity is that of all sites together.
    benefits: site → [tile rows, tile columns], flat or not: the error per weight that leaving a tile
    dense avoids, in one unit for all sites (as tile_benefit.measure gives it). The highest start
    dense. None: tile logits start at random.
    state: a directory to save to and to go on from. stop: asked after every step; where it says so, and there
    is a state, it is written and Stopped raised.

    Raises RecipeError when nothing can be learned or `state` belongs to another run, and
    CalibrationError when the loss or its gradient is not finite.
    """
    size = patch.tile_of(config, target).size
    masks = _Masks(model, sites, benefits, size, target, config, device)
    optimizer = torch.optim.AdamW(
        masks.parameters,
        betas=patch.ADAM_BETAS,
        weight_decay=config.weight_decay,
        fused=True,  # the others need temporaries of the logits' size
    )
    saved = None
    losses: list[float] = []
    densities: list[float] = []
    if state is not None:
        saved = TrainingState(state, identity_of(model, sites, benefits, tokens, target, config))
        losses, densities = saved.restore(masks.parameters, optimizer)
    pending = _Readback(device)
    started = time.monotonic()

    def report() -> None:
        nonlocal started
        for loss, density, norm in pending.take():
            index = len(losses)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = "gradient" if math.isfinite(loss) else "loss"
                raise CalibrationError(
                    f"the {what} of step {index + 1} of {config.steps} is not finite: weights are "
                    "damaged, or the dtype overflows (try --dtype float32)"
                )
            losses.append(loss)
            densities.append(density)
            now = time.monotonic()
            on_step(StepDone(index, config.steps, loss, density, now - started))
            started = now

    with masks.installed(model), torch.enable_grad():
        for step in range(len(losses), config.steps):
            figures = _step(model, masks, tokens, optimizer, step)
            # The step before this one: reading this one's figures would wait for the device.
            report()
            pending.put(figures)
            last = step + 1 == config.steps
            stopping = not last and saved is not None and stop()
            if saved is not None and (last or stopping or (step + 1) % config.save_every == 0):
                report()  # what is not finite must not be saved
                saved.write(masks.parameters, optimizer, losses, densities)
            if stopping:
                raise Stopped(
                    f"stopped after step {step + 1} of {config.steps}; the same command goes on from there "
                    f"({state} has its state)"
                )
        report()
    keep, dense = masks.harden()
    return TrainedMasks(keep, dense, losses, densities)


def _step(
    model: nn.Module,
    masks: _Masks,
    tokens: Tensor,
    optimizer: torch.optim.Optimizer,
    step: int,
) -> Tensor:
    """One update. Returns [3]: loss, soft density, norm of the gradient; nothing waits for the device."""
    config, device = masks.config, masks.device
    passes = patch.passes(config, tokens.shape[1])
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros(2, device=device)
    for index in range(passes):
        ids = tokens[patch.windows(config, tokens.shape, step, index)]
        if device.type == "cuda":
            ids = ids.pin_memory()
        ids = ids.to(device, non_blocking=True)
        masks.draw(step, index)
        with masks.autocast():
            loss = _cross_entropy(model, ids)
        density = masks.density()
        extra = patch.penalty(density, masks.kept_norm(), config, masks.target, step)
        ((loss + extra) / passes).backward()
        total += torch.stack([loss.detach(), density.detach()])
    norm = nn.utils.clip_grad_norm_(masks.parameters, config.clip)
    for group in optimizer.param_groups:
        group["lr"] = patch.learning_rate(config, step)
    optimizer.step()
    return torch.cat([total / passes, norm.reshape(1)])


def _cross_entropy(model: nn.Module, ids: Tensor) -> Tensor:
    """[] fp32 mean over the predictions of ids[:, 1:]. ids: [windows, seqlen]."""
    # Labels are shifted, not logits: a shifted view of these would have to be copied.
    labels = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


@dataclass
class _Site:
    """One linear. tiles: its part of the tile vectors; number: its word in seeds.

    keep: [out, in] bool, in mode "tile"; logits: [out, in/4, 6], in mode "joint".
    """

    linear: nn.Linear
    number: int
    shape: tuple[int, int]  # tile rows, tile columns
    tiles: slice
    keep: Tensor | None = None
    logits: nn.Parameter | None = None


class _Masks:
    """What is learned, and the linears' forward that uses it.

    The tiles of all sites lie in one vector, so that gates, density and hardening are single calls.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: dict[str, Tensor],
        benefits: dict[str, Tensor] | None,
        size: int,
        target: Target,
        config: patch.Config,
        device: torch.device,
    ) -> None:
        self.size, self.target, self.config, self.device = size, target, config, device
        self.sites: dict[str, _Site] = {}
        areas: list[Tensor] = []
        norms: list[Tensor] = []
        count = 0
        for number, (name, keep) in enumerate(sites.items()):
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            rows, columns = linear.weight.shape
            if keep.shape != (rows, columns) or columns % 4:
                raise ValueError(f"{name}: a mask {tuple(keep.shape)} for {rows}×{columns}")
            keep = keep.to(device)
            if bool((keep.unflatten(1, (-1, 4)).sum(dim=2) != 2).any()):
                raise ValueError(f"{name}: the keep mask is not 2:4")
            area = tile_areas(rows, columns, size, device)
            tiles = slice(count, count + area.numel())
            site = _Site(linear, number, (area.shape[0], area.shape[1]), tiles)
            if config.mode == "tile":
                site.keep = keep
            else:
                site.logits = nn.Parameter(patch.initial_patterns(keep, config, number))
            self.sites[name] = site
            areas.append(area.flatten())
            norms.append(torch.linalg.vector_norm(linear.weight.detach(), dtype=torch.float32))
            count = tiles.stop
        self.areas = torch.cat(areas)
        self.norm = torch.stack(norms).sum()
        self.tile_logits: nn.Parameter | None = None
        if patch.has_gates(target):
            benefit = None
            if benefits is not None:
                benefit = torch.cat([benefits[name].to(device).flatten() for name in sites])
                if benefit.shape != self.areas.shape:
                    raise ValueError(f"{benefit.numel()} benefits for {count} tiles")
            start = patch.initial_tiles(benefit, self.areas, config, target, len(sites))
            self.tile_logits = nn.Parameter(start)
        # What a pass draws, and what it leaves behind.
        self._gates: Tensor | None = None
        self._at = (0, 0)
        self._norms: dict[str, Tensor] = {}
        found = [site.logits for site in self.sites.values()]
        self.parameters = [p for p in (self.tile_logits, *found) if p is not None]

    def draw(self, step: int, index: int) -> None:
        """Draw the masks of one forward pass."""
        self._at = (step, index)
        self._norms = {}
        if self.tile_logits is not None:
            seed = patch.noise_seed(self.config, step, index, len(self.sites))
            self._gates = patch.gates_of(self.tile_logits, self.config, step, seed)

    def density(self) -> Tensor:
        """[] mean of this pass's soft masks."""
        if self._gates is None:
            return self.norm.new_full((), 0.5)  # 2:4, soft or not
        return patch.soft_density(self._gates, self.areas)

    def kept_norm(self) -> Tensor:
        """[] Σ_l‖m_l ⊙ W_l‖ / Σ_l‖W_l‖ of the pass that was just made."""
        return torch.stack(list(self._norms.values())).sum() / self.norm

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 on a GPU, for models that are not fp32: gradients in fp16 would need a loss scale."""
        narrow = next(iter(self.sites.values())).linear.weight.dtype != torch.float32
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=narrow and self.device.type == "cuda"
        )

    @contextlib.contextmanager
    def installed(self, model: nn.Module) -> Iterator[None]:
        """Weights frozen, dropout off and linears masked; afterwards all is as it was."""
        asked = {p: p.requires_grad for p in model.parameters()}
        training = {module: module.training for module in model.modules()}
        forwards = {name: vars(site.linear).get("forward") for name, site in self.sites.items()}
        try:
            model.eval()
            for parameter in asked:
                parameter.requires_grad_(False)
            for name, site in self.sites.items():
                site.linear.forward = self._forward(name, site)
            yield
        finally:
            for name, site in self.sites.items():
                vars(site.linear).pop("forward", None)
                if forwards[name] is not None:
                    site.linear.forward = forwards[name]
            for parameter, wanted in asked.items():
                parameter.requires_grad_(wanted)
            for module, mode in training.items():
                module.training = mode

    @torch.no_grad()
    def harden(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Keep masks on the CPU, and how many tiles of each site are dense."""
        dense = torch.zeros_like(self.areas, dtype=torch.bool)
        if self.tile_logits is not None:
            share = 1 - 2 * self.target.sparsity
            dense = highest_tiles(self.tile_logits, self.areas, share)
        masks: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for name, site in self.sites.items():
            tiles = dense[site.tiles].view(site.shape)
            keep = harden_patterns(site.logits) if site.keep is None else site.keep
            masks[name] = (keep | expand_tiles(tiles, self.size, *keep.shape)).cpu()
            counts[name] = int(tiles.sum())
        return masks, counts

    def _forward(self, name: str, site: _Site) -> Callable[[Tensor], Tensor]:
        weight, bias = site.linear.weight, site.linear.bias

        def forward(x: Tensor) -> Tensor:
            kind = x.device.type
            cast = torch.is_autocast_enabled(kind)
            x = x.to(torch.get_autocast_dtype(kind) if cast else weight.dtype)
            gates = None if self._gates is None else self._gates[site.tiles].view(site.shape)
            if site.logits is None:
                y, norm = TileLinear.apply(x, gates, weight, bias, site.keep, self.size)
            else:
                seed = patch.noise_seed(self.config, *self._at, site.number)
                draw = patch.draw_of(self.config, self._at[0], seed)
                y, norm = PatternLinear.apply(x, gates, site.logits, weight, bias, self.size, draw)
            self._norms[name] = norm
            return y

        return forward


class _Readback:
    """Figures on their way to the host, without a wait for the work queued behind them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._waiting: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def put(self, figures: Tensor) -> None:
        event = None
        if self._device.type == "cuda":
            host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
            figures = host.copy_(figures, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
        self._waiting.append((figures, event))

    def take(self) -> list[list[float]]:
        """All that was put since, in order."""
        waiting, self._waiting = self._waiting, []
        for _, event in waiting:
            if event is not None:
                event.synchronize()
        return [figures.tolist() for figures, _ in waiting]
