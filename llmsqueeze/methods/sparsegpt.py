"""SparseGPT: optimal-brain-surgeon pruning with weight update. Frantar & Alistarh (arXiv 2301.00774)."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmsqueeze.errors import CalibrationError, RecipeError
from llmsqueeze.methods.base import NM, Pruned, Target
from llmsqueeze.methods.select import choose

if TYPE_CHECKING:
    from torch import Tensor

    from llmsqueeze.numerics.replay import Replayed
    from llmsqueeze.numerics.stats import InputStats

# A Hessian that is not positive definite at the asked damping is tried again with ten times as much.
DAMPING_RETRIES = 3


@dataclass(frozen=True)
class Config:
    damping: float = field(
        default=0.01, metadata={"help": "ridge on the Hessian, as a fraction of its mean diagonal"}
    )
    block_size: int = field(
        default=128, metadata={"help": "columns whose mask is chosen together (unstructured)"}
    )

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 10:
            raise RecipeError(f"damping {self.damping} is outside (0, 10]; the usual value is 0.01")
        if not 1 <= self.block_size <= 65536:
            raise RecipeError(f"block size {self.block_size} is outside [1, 65536]")


def needs(config: Config) -> frozenset[str]:
    return frozenset({"gram"})


def prune(weight: Tensor, stats: InputStats | None, target: Target, config: Config) -> Pruned:
    """Column blocks left to right: choose a mask by OBS saliency, then spread the error rightwards.

    weight: [out, in]; computed in fp32, returned in its own dtype with updated values.
    stats: needs gram. Inputs that were always zero lose their weights, whatever the target
    (unless that is zero).
    Saliency w²/U_jj² and update: section 3 of the paper, U upper Cholesky factor of H⁻¹.
    Raises CalibrationError when no damping makes the Hessian positive definite.
    """
    import torch

    from llmsqueeze.numerics.masks import keep_highest

    assert stats is not None
    if target.sparsity == 0:
        return Pruned(weight, torch.ones_like(weight, dtype=torch.bool))
    factor, damping, dead = _factor(stats, config.damping)
    w = weight.to(torch.float32, copy=True)
    w[:, dead] = 0
    columns = w.shape[1]
    diagonal = factor.diagonal()
    pattern = target.pattern
    nm = pattern if isinstance(pattern, NM) and pattern.axis == "in" else None
    # An n:m group must lie within one block, or its mask would be chosen from stale weights.
    size = config.block_size if nm is None else -(-config.block_size // nm.m) * nm.m
    replayed = _replayed()
    loss = torch.zeros((), dtype=torch.float64, device=w.device)
    # Patterns that reach over columns far apart are chosen before the first update.
    chosen = choose(w.abs() / diagonal, target) if pattern is not None and nm is None else None
    kept = torch.ones_like(w, dtype=torch.bool)

    for start in range(0, columns, size):
        stop = min(start + size, columns)
        block = w[:, start:stop]  # a view: updates land in w
        if pattern is None:
            score = (block / diagonal[start:stop]).square()
            removed = target.removed_of(score.numel())
            keep = keep_highest(score.reshape(1, -1), removed).reshape(score.shape)
        else:
            keep = kept[:, start:stop] if chosen is None else chosen[:, start:stop]
        u = factor[start:stop, start:stop]
        done, keep, errors = replayed([block, keep, u], nm)
        block.copy_(done)
        kept[:, start:stop] = keep
        loss += errors.square().sum(dtype=torch.float64)
        w[:, stop:] -= errors @ factor[start:stop, stop:]

    if not bool(torch.isfinite(w).all()):
        raise CalibrationError(
            f"SparseGPT diverged at damping {damping:g}; use more calibration tokens or --damping"
        )
    # Dividing by the token count makes the loss comparable between runs of different length.
    report = {"damping": damping, "quadratic_loss": float(loss), "dead_inputs": int(dead.sum())}
    return Pruned(w.to(weight.dtype), kept & ~dead, report)


@functools.cache
def _replayed() -> Replayed:
    """Five kernels a column: kept as one recording for all linears of a shape."""
    from llmsqueeze.numerics.replay import Replayed

    return Replayed(_columns)


def _columns(
    block: Tensor, keep: Tensor, u: Tensor, nm: NM | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Prune a block column by column. Returns its new weights, its mask, and e = w_removed / U_jj.

    block: [out, columns] fp32; keep: bool, given unless nm chooses it from weights as they are by then;
    u: [columns, columns], this block's part of the factor.
    """
    import torch

    from llmsqueeze.numerics.masks import keep_nm

    d = u.diagonal()
    # Column-major copies: the loop touches one column at a time.
    columns = block.t().contiguous().clone()
    kept = keep.t().contiguous().clone()
    errors = torch.empty_like(columns)
    for i in range(columns.shape[0]):
        if nm is not None and i % nm.m == 0:
            group = (columns[i : i + nm.m].t() / d[i : i + nm.m]).square()
            kept[i : i + nm.m] = keep_nm(group, nm.n, nm.m).t()
        errors[i] = columns[i].masked_fill(kept[i], 0) / d[i]
        columns[i:].addr_(u[i, i:], errors[i], alpha=-1)
        columns[i].masked_fill_(~kept[i], 0)
    return columns.t(), kept.t(), errors.t()


def _inverse_factor(hessian: Tensor, added: Tensor) -> Tensor | None:
    """Upper U with (H + added · 1)⁻¹ = UᵀU; None if rounding leaves that without one."""
    import torch

    # Each is as large as the Hessian: of these two at a time.
    damped = hessian.clone()
    damped.diagonal().add_(added)
    lower, failed = torch.linalg.cholesky_ex(damped)
    del damped
    if failed:
        return None
    inverse = torch.cholesky_inverse(lower)
    del lower
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return None if failed or not bool(torch.isfinite(upper).all()) else upper


def _factor(stats: InputStats, damping: float) -> tuple[Tensor, float, Tensor]:
    """Upper U with H⁻¹ = UᵀU, the damping that worked, and the inputs that never fired.

    Kept with the statistics: q, k and v share one input, hence one factor.
    """
    cached: tuple[Tensor, float, Tensor] | None = stats.memo.get(("sparsegpt", damping))
    if cached is not None:
        return cached
    hessian = stats.gram * (2 / stats.count)
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    mean = hessian.diagonal().mean()
    tried = damping
    for _ in range(DAMPING_RETRIES):
        upper = _inverse_factor(hessian, tried * mean)
        if upper is not None:
            result = (upper, tried, dead)
            stats.memo[("sparsegpt", damping)] = result
            return result
        tried *= 10
    raise CalibrationError(
        f"the Hessian of {stats.count} calibration tokens is not positive definite even at damping "
        f"{tried / 10:g}; use more calibration tokens (--samples, --seqlen)"
    )
