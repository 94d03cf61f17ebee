"""Masks that can be trained: soft 2:4 patterns, soft tile gates, and linears that use them.

MaskLLM (arXiv 2409.17481) and PATCH (arXiv 2509.23410). A group of four consecutive inputs has six
logits, one for every pair that may stay; a tile has one, for staying dense. Both are sampled with
Gumbel noise. The effective mask is m = t + (1 - t)·m24, the weights themselves never change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from llmsqueeze.numerics.masks import expand_tiles, tile_sums

# The pairs of a group of four that a 2:4 pattern may keep; a logit per pair, in this order.
PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


def seed_of(*words: int) -> int:
    """A seed that depends on every word, so that noise is drawn anew for each step, pass and site.

    Noise that is a function of where it is used can be drawn again in the backward pass instead of
    being kept, and a resumed run needs no generator state.
    """
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def gumbel(shape: tuple[int, ...], seed: int, like: Tensor) -> Tensor:
    """Standard Gumbel noise -log(E), E exponential, in the dtype and on the device of `like`."""
    generator = torch.Generator(like.device).manual_seed(seed)
    noise = torch.empty(shape, dtype=like.dtype, device=like.device)
    # A zero would become an infinity, and two of those in one softmax a NaN.
    noise.exponential_(generator=generator).clamp_min_(torch.finfo(like.dtype).tiny)
    return noise.log_().neg_()


def soft_gates(logits: Tensor, scale: float, temperature: float, seed: int | None) -> Tensor:
    """Probability of staying dense, in [0, 1], for every tile; `logits` of any shape.

    t = softmax(([0, κℓ] + gumbel)/τ)[1], as a sigmoid. seed None: no noise.
    """
    scores = scale * logits
    if seed is not None:
        noise = gumbel((2, *logits.shape), seed, logits)
        scores = scores + (noise[1] - noise[0])
    return torch.sigmoid(scores / temperature)


@dataclass(frozen=True)
class Draw:
    """How pattern logits π are turned into shares p = softmax((κπ + gumbel)/τ). seed None: no noise."""

    scale: float
    temperature: float
    seed: int | None


def pattern_shares(logits: Tensor, draw: Draw) -> Tensor:
    """[rows, groups, 6]: how much of each pattern is taken; the six add up to 1. Not differentiable."""
    if draw.seed is None:
        scores = logits.detach() * draw.scale
    else:
        # In place on the noise: these are 1.5 times the weight's elements.
        scores = gumbel(tuple(logits.shape), draw.seed, logits)
        scores.add_(logits.detach(), alpha=draw.scale)
    return scores.div_(draw.temperature).softmax(dim=-1)


def mask_of_shares(shares: Tensor) -> Tensor:
    """[rows, 4·groups]: Σ_c p_c·pattern_c, every group of four adding up to 2."""
    planes = shares.unbind(-1)
    columns = []
    for column in range(4):
        # Three of the six pairs hold a given column.
        a, b, c = (planes[i] for i, pair in enumerate(PAIRS) if column in pair)
        columns.append(a + b + c)
    return torch.stack(columns, dim=-1).flatten(1)


def soft_pattern_mask(logits: Tensor, draw: Draw) -> Tensor:
    """[rows, columns] soft 2:4 mask of [rows, columns/4, 6] logits. Not differentiable."""
    return mask_of_shares(pattern_shares(logits, draw))


def blend(gates: Tensor, mask24: Tensor, size: int) -> Tensor:
    """m = t + (1 - t)·m24: at t = 1 exactly 1, at t = 0 exactly the 2:4 mask. gates: one per tile."""
    t = expand_tiles(gates, size, *mask24.shape)
    return t + (1 - t) * mask24


class TileLinear(Function):  # type: ignore[misc]
    """x ↦ (x (W ⊙ m)ᵀ + bias, ‖W ⊙ m‖), m = t + (1 - t)·keep, with gradients for x and t only.

    PATCH-Tile: ∂L/∂t_T = Σ_{ij ∈ T, not kept} (∂L/∂W_eff)_ij·W_ij. W_eff is formed anew in the
    backward pass, so nothing of W's size outlives a call.

    x: [..., in], in the dtype to compute in. gates: [tile rows, tile columns], fp32 or wider.
    weight: [out, in]. bias: [out] or None. keep: [out, in] bool, 2:4. size: of the tiles.
    The norm has the gates' dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gates: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        keep: Tensor,
        size: int,
    ) -> tuple[Tensor, Tensor]:
        effective = _tile_weight(gates, weight, keep, size, x.dtype)
        norm = torch.linalg.vector_norm(effective, dtype=gates.dtype)
        ctx.save_for_backward(x, gates, weight, keep, norm)
        ctx.size = size
        return _linear(x, effective, bias), norm

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_norm: Tensor) -> tuple[Tensor | None, ...]:
        x, gates, weight, keep, norm = ctx.saved_tensors
        effective = _tile_weight(gates, weight, keep, ctx.size, x.dtype)
        grad_x = grad_y @ effective if ctx.needs_input_grad[0] else None
        grad_gates = None
        if ctx.needs_input_grad[1]:
            grad = _weight_gradient(grad_y, grad_norm, x, effective, norm)
            grad = grad.mul_(weight).masked_fill_(keep, 0)
            grad_gates = tile_sums(grad, ctx.size)
        return grad_x, grad_gates, None, None, None, None


class PatternLinear(Function):  # type: ignore[misc]
    """x ↦ (x (W ⊙ m)ᵀ + bias, ‖W ⊙ m‖), m of pattern logits and, unless None, tile gates.

    PATCH-Joint; without gates MaskLLM. Gradients for x, gates and logits. The shares, with their
    noise, are formed anew in the backward pass: of the size of the logits only their gradient stays.

    logits: [out, in/4, 6]; the rest as in TileLinear. The norm has the logits' dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gates: Tensor | None,
        logits: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        size: int,
        draw: Draw,
    ) -> tuple[Tensor, Tensor]:
        mask = soft_pattern_mask(logits, draw)
        if gates is not None:
            mask = blend(gates, mask, size)
        effective = mask.mul_(weight).to(x.dtype)
        norm = torch.linalg.vector_norm(effective, dtype=logits.dtype)
        ctx.save_for_backward(x, gates, logits, weight, norm)
        ctx.size, ctx.draw = size, draw
        return _linear(x, effective, bias), norm

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_norm: Tensor) -> tuple[Tensor | None, ...]:
        x, gates, logits, weight, norm = ctx.saved_tensors
        shares = pattern_shares(logits, ctx.draw)
        mask24 = mask_of_shares(shares)
        mask = mask24 if gates is None else blend(gates, mask24, ctx.size)
        effective = (mask * weight).to(x.dtype)
        grad_x = grad_y @ effective if ctx.needs_input_grad[0] else None
        grad = _weight_gradient(grad_y, grad_norm, x, effective, norm).mul_(weight)  # ∂L/∂m
        grad_gates = None
        if gates is not None:
            if ctx.needs_input_grad[1]:
                grad_gates = tile_sums(grad * (1 - mask24), ctx.size)
            grad = grad.mul_(1 - expand_tiles(gates, ctx.size, *weight.shape))
        # The softmax's: p (g - Σ p g), g being what each pattern's share would gain.
        planes = grad.unflatten(1, (-1, 4)).unbind(-1)
        gains = torch.stack([planes[i] + planes[j] for i, j in PAIRS], dim=-1)
        gains -= (shares * gains).sum(dim=-1, keepdim=True)
        grad_logits = gains.mul_(shares).mul_(ctx.draw.scale / ctx.draw.temperature)
        return grad_x, grad_gates, grad_logits, None, None, None, None


def tile_areas(rows: int, columns: int, size: int, device: torch.device) -> Tensor:
    """[tile rows, tile columns] int64: weights in each tile; edge tiles are ragged."""
    down = torch.full((-(-rows // size),), size, device=device)
    across = torch.full((-(-columns // size),), size, device=device)
    down[-1] -= down.numel() * size - rows
    across[-1] -= across.numel() * size - columns
    return torch.outer(down, across)


def highest_tiles(scores: Tensor, areas: Tensor, share: float) -> Tensor:
    """[tiles] bool: the highest-scoring tiles, as many as bring their area nearest to `share` of all.

    scores, areas: [tiles]. Among equal scores the first comes first; of two equally near counts the
    smaller is taken.
    """
    order = scores.argsort(descending=True, stable=True)
    covered = torch.cat([areas.new_zeros(1), areas[order].cumsum(0)]).double()
    count = (covered - share * covered[-1]).abs().argmin()
    chosen = torch.empty_like(scores, dtype=torch.bool)
    chosen[order] = torch.arange(scores.numel(), device=scores.device) < count
    return chosen


def tile_prior(dense: Tensor, std: float, strength: float) -> Tensor:
    """Logits, fp32, that prefer the tiles where `dense`: +std·strength there, -std·strength elsewhere."""
    return torch.where(dense, std * strength, -std * strength)


def pattern_prior(keep: Tensor, std: float, strength: float) -> Tensor:
    """[rows, columns/4, 6] fp32 logits that prefer the 2:4 mask `keep`: π_c = (o_c - 1)·std·strength.

    o_c in {0, 1, 2} counts what pattern c keeps of what `keep` keeps. This replaces a random start, as
    in PATCH (MaskLLM adds it to one), so that the hard masks before training are those of the prior.
    """
    planes = keep.unflatten(1, (-1, 4)).to(torch.float32).unbind(-1)
    overlap = torch.stack([planes[i] + planes[j] for i, j in PAIRS], dim=-1)
    return overlap.sub_(1).mul_(std * strength)


def harden_patterns(logits: Tensor) -> Tensor:
    """[rows, columns] bool: of every group the pattern with the highest logit; exactly 2:4."""
    best = logits.argmax(dim=-1)
    columns = []
    for column in range(4):
        a, b, c = (i for i, pair in enumerate(PAIRS) if column in pair)
        columns.append((best == a) | (best == b) | (best == c))
    return torch.stack(columns, dim=-1).flatten(1)


def ramp(start: float, end: float, step: int, steps: int) -> float:
    """Linear from `start` at step 0 to `end` at the last step."""
    return start + (end - start) * step / max(1, steps - 1)


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate: up to 1 over the first `warmup` steps, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def _tile_weight(
    gates: Tensor, weight: Tensor, keep: Tensor, size: int, dtype: torch.dtype
) -> Tensor:
    """W ⊙ (t + (1 - t)·keep), which is W where it is kept and t·W elsewhere."""
    weight = weight.to(dtype)
    return torch.where(keep, weight, expand_tiles(gates.to(dtype), size, *weight.shape) * weight)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _weight_gradient(
    grad_y: Tensor, grad_norm: Tensor, x: Tensor, effective: Tensor, norm: Tensor
) -> Tensor:
    """∂L/∂W_eff in the norm's dtype, through the output and through ‖W_eff‖."""
    grad = grad_y.flatten(0, -2).t() @ x.flatten(0, -2)
    # The scalar stays on the device. A weight of zeros has norm 0, and no direction to push in.
    pull = grad_norm / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return grad.to(norm.dtype).addcmul_(effective.to(norm.dtype), pull)
