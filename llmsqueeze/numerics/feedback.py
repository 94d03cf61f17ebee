"""Rounding with error feedback: what one channel's rounding costs is made up for by the channels after it.

The least-squares idea of GPTQ (arXiv 2210.17323) for vectors that are quantised as they come: what counts
is eᵀ M e of a vector's error e, and M's structure is known beforehand.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

# Added to a metric of unit mean diagonal.
DAMPING = 1e-2
_ROUNDS = 30


def group_ends(width: int) -> list[int]:
    """Where groups of channels that are rounded together end: at 2, 4, 8 and so on.

    Few and fine where errors weigh most. On SmolLM2-135M, keys at 3 bits, perplexity rose by 4.4 % with
    groups that grow, 4.5 % with groups of 4, 4.9 % of 8, 5.2 % of 16, 8.5 % without feedback
    (WikiText-2, H100).
    """
    ends = []
    end = 2
    while end < width:
        ends.append(end)
        end *= 2
    return [*ends, width]


def factorise(metric: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Diagonal [..., D] and factors [..., D, rank], fp64, with diag + F Fᵀ ≈ metric [..., D, D].

    By principal factors: eigenvectors of the correlations, the diagonal being fitted in turn.
    """
    metric = metric.double()
    spread = metric.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    correlation = metric / spread[..., None] / spread[..., None, :]
    own = torch.full_like(spread, 0.5)
    for _ in range(_ROUNDS):
        values, vectors = torch.linalg.eigh(correlation - torch.diag_embed(own))
        factors = vectors[..., -rank:] * values[..., None, -rank:].clamp_min(0).sqrt()
        own = (1 - factors.square().sum(-1)).clamp_min(0.02)
    return own * spread.square(), factors * spread[..., None]


@dataclass(frozen=True)
class Feedback:
    """How errors are passed on. order: [heads, D], channels in the order of their rounding; steps: for
    every group of them but the last, [heads, its size, channels after it] fp64."""

    order: Tensor
    steps: tuple[Tensor, ...]

    @classmethod
    def of(cls, diagonal: Tensor, factors: Tensor) -> Feedback:
        """From what factorise returned: [heads, D] and [heads, D, rank]. Heavy channels come first."""
        metric = torch.diag_embed(diagonal.double()) + factors.double() @ factors.double().mT
        scale = metric.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-300)
        metric = metric / scale[:, None, None]
        width = metric.shape[-1]
        metric = metric + DAMPING * torch.eye(width, dtype=metric.dtype, device=metric.device)
        order = metric.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
        rows = torch.arange(len(order), device=order.device)[:, None, None]
        metric = metric[rows, order[:, :, None], order[:, None, :]]
        steps = []
        # The later channels that minimise eᵀ M e, given the group's errors.
        for start, stop in itertools.pairwise([0, *group_ends(width)[:-1]]):
            factor = torch.linalg.cholesky(metric[:, stop:, stop:])
            solved = torch.cholesky_solve(metric[:, stop:, start:stop], factor)
            steps.append(solved.mT.contiguous())
        return cls(order, tuple(steps))

    def to(self, device: torch.device) -> Feedback:
        return Feedback(self.order.to(device), tuple(step.to(device) for step in self.steps))


def round_with_feedback(
    x: Tensor, borders: Tensor, values: Tensor, feedback: Feedback, exact: Tensor | None = None
) -> Tensor:
    """uint8 codes of x [batch, heads, tokens, D] fp64, every vector for itself.

    borders: [count - 1] fp64, ascending: where one code ends and the next begins; values: [count] fp64, what
    they stand for. exact: [batch, heads, tokens, any] int64, channels that are kept as they are, so make
    no error. In fp64, because the result must not depend on how many tokens come at once.
    """
    order = feedback.order[:, None].expand(x.shape)
    y = x.gather(-1, order)
    kept = None
    if exact is not None:
        kept = torch.ones_like(x).scatter_(-1, exact, 0.0).gather(-1, order)
    parts = []
    start = 0
    for stop, step in zip(group_ends(y.shape[-1]), (*feedback.steps, None), strict=True):
        group = y[..., start:stop].contiguous()
        codes = torch.bucketize(group, borders)
        parts.append(codes)
        if step is not None:
            error = group.sub_(values[codes])
            if kept is not None:
                error *= kept[..., start:stop]
            y[..., stop:] += error @ step
        start = stop
    codes = torch.cat(parts, dim=-1)
    return torch.empty_like(codes).scatter_(-1, order, codes).to(torch.uint8)
