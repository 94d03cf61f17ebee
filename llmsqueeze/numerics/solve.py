"""Least squares on the weights that stay: rows are independent, and all are solved at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# A row counts as solved when the energy of its residual fell to this share: fp32 rounding, squared.
CONVERGED = 1e-12


class Quadratic(NamedTuple):
    """‖Z x - t‖² over tokens, less a constant: Σ_rows z G zᵀ - 2 z bᵀ.

    gram: [in, in] fp32, Σ x xᵀ. product: [out, in] fp32, Σ t xᵀ.
    """

    gram: Tensor
    product: Tensor

    def value(self, z: Tensor) -> Tensor:
        """[out]: each row's objective."""
        return (z @ self.gram).sub_(self.product, alpha=2).mul_(z).sum(dim=1)

    def ridged(self, anchor: Tensor, ridge: float) -> Quadratic:
        """With ridge · mean(diag G) · ‖Z - anchor‖² added. anchor: [out, in] fp32."""
        extra = ridge * self.gram.diagonal().mean()
        gram = self.gram.clone()
        gram.diagonal().add_(extra)
        return Quadratic(gram, self.product + extra * anchor)


class Solution(NamedTuple):
    """weight: [out, in] fp32, zero where not kept. steps: the mean over rows of the step that was best."""

    weight: Tensor
    steps: float


def masked_pcg(
    start: Tensor, keep: Tensor, problem: Quadratic, steps: int, judge: Quadratic | None = None
) -> Solution:
    """Minimise `problem` over the kept entries by conjugate gradient, preconditioned by 1 / diag G.

    start: [out, in] fp32. keep: bool of the same shape. Every step lowers every row's objective.
    judge: the same objective on other tokens; each row then stops where its judged value was lowest,
    which is never above that of `start`.
    """
    # In place throughout: large blocks are mapped anew each time, which takes longer than a sum.
    kept = keep.to(start.dtype)
    z = start * kept
    inverse = problem.gram.diagonal().clamp_min(torch.finfo(start.dtype).tiny).reciprocal()
    residual = (z @ problem.gram).neg_().add_(problem.product).mul_(kept)
    direction = residual * inverse
    change, space = torch.empty_like(z), torch.empty_like(z)

    def products(a: Tensor, b: Tensor) -> Tensor:
        """[out, 1]: of each row of one with that of the other."""
        return torch.mul(a, b, out=space).sum(dim=1, keepdim=True)

    energy = products(residual, direction)
    enough = CONVERGED * energy
    best, best_value, best_step = z, None, torch.zeros_like(energy)
    if judge is not None:
        best, best_value = z.clone(), judge.value(z).unsqueeze(1)
    for step in range(1, steps + 1):
        torch.mm(direction, problem.gram, out=change).mul_(kept)
        curvature = products(direction, change)
        # A solved row stays where it is: what is left of its residual is rounding, and steps along
        # that would lead anywhere.
        moving = (energy > enough) & (curvature > 0)
        length = torch.where(moving, energy / curvature, torch.zeros_like(energy))
        z.addcmul_(length, direction)
        residual.addcmul_(length, change, value=-1)
        scaled = torch.mul(residual, inverse, out=change)
        following = products(residual, scaled)
        turn = torch.where(moving, following / energy, torch.zeros_like(energy))
        direction.mul_(turn).add_(scaled)
        energy = following
        if judge is None or best_value is None:
            best_step = torch.full_like(energy, step)
            continue
        value = judge.value(z).unsqueeze(1)
        better = value < best_value
        torch.where(better, z, best, out=best)
        best_value = torch.where(better, value, best_value)
        best_step = torch.where(better, torch.full_like(energy, step), best_step)
    return Solution(best, float(best_step.mean()))


def relative_error(weight: Tensor, pruned: Tensor, x: Tensor) -> float:
    """‖(Ŵ - W) x‖² / ‖W x‖² over the tokens x: [tokens, in]; 0 when W x is 0."""
    x, weight = x.float(), weight.float()
    whole = (x @ weight.t()).square().sum(dtype=torch.float64)
    lost = (x @ (pruned.float() - weight).t()).square().sum(dtype=torch.float64)
    return float(lost / whole) if float(whole) > 0 else 0.0
