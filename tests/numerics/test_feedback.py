"""Rounding with error feedback: what it promises about eᵀ M e, and about one token at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmsqueeze.numerics.feedback import (
    DAMPING,
    Feedback,
    factorise,
    group_ends,
    round_with_feedback,
)

BOOK = torch.tensor([-1.6, -0.9, -0.5, -0.1, 0.2, 0.6, 1.0, 1.7], dtype=torch.float64)
BORDERS = (BOOK[1:] + BOOK[:-1]) / 2


def metric(heads: int, width: int, rank: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    factors = torch.randn(heads, width, rank, generator=generator, dtype=torch.float64)
    own = torch.rand(heads, width, generator=generator, dtype=torch.float64) + 0.1
    return torch.diag_embed(own) + factors @ factors.mT


def vectors(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def cost(x: Tensor, codes: Tensor, metric: Tensor) -> Tensor:
    """[heads]"""
    error = BOOK[codes.long()] - x
    return torch.einsum("bhtc,hcd,bhtd->h", error, metric, error)


@pytest.mark.parametrize("width", [2, 5, 16, 20, 64, 96])
def test_groups_cover_all_channels_once(width: int) -> None:
    ends = group_ends(width)
    assert ends == sorted(set(ends)) and ends[-1] == width and ends[0] == 2
    feedback = Feedback.of(*factorise(metric(2, width), min(2, width)))
    assert len(feedback.steps) == len(ends) - 1
    assert feedback.order.sort().values.tolist() == [list(range(width))] * 2


def test_a_diagonal_with_factors_is_found_again() -> None:
    true = metric(2, 40)
    diagonal, factors = factorise(true, 3)
    found = torch.diag_embed(diagonal) + factors @ factors.mT
    assert torch.allclose(found, true, rtol=1e-2, atol=2e-2)
    # With too small a rank, the diagonal still is the metric's own.
    diagonal, factors = factorise(true, 1)
    both = diagonal + factors.square().sum(-1)
    assert torch.allclose(both, true.diagonal(dim1=-2, dim2=-1), rtol=0.05)


def test_it_costs_less_than_rounding_to_the_nearest() -> None:
    true = metric(3, 32)
    x = vectors(2, 3, 200, 32) * 0.8
    codes = round_with_feedback(x, BORDERS, BOOK, Feedback.of(*factorise(true, 3)))
    nearest = torch.bucketize(x, BORDERS)
    assert bool((cost(x, codes, true) < 0.6 * cost(x, nearest, true)).all())


def test_without_correlations_it_rounds_to_the_nearest() -> None:
    x = vectors(1, 2, 50, 16)
    diagonal = torch.rand(2, 16, dtype=torch.float64) + 0.5
    feedback = Feedback.of(diagonal, torch.zeros(2, 16, 1, dtype=torch.float64))
    found = round_with_feedback(x, BORDERS, BOOK, feedback)
    assert torch.equal(found, torch.bucketize(x, BORDERS).to(torch.uint8))


def test_later_channels_are_moved_to_where_they_make_up_for_most() -> None:
    """By its definition: after the first group, the target of the rest minimises eᵀ M e."""
    true = metric(1, 4)
    diagonal, factors = factorise(true, 3)
    feedback = Feedback.of(diagonal, factors)
    fitted = torch.diag_embed(diagonal) + factors @ factors.mT
    scale = fitted.diagonal(dim1=-2, dim2=-1).mean()
    damped = (fitted[0] / scale + DAMPING * torch.eye(4)).double()
    order = feedback.order[0]
    first, later = order[:2], order[2:]
    x = vectors(1, 1, 1, 4)
    codes = round_with_feedback(x, BORDERS, BOOK, feedback)[0, 0, 0]
    error = x[0, 0, 0] - BOOK[codes.long()]
    target = x[0, 0, 0, later] + torch.linalg.solve(
        damped[later][:, later], damped[later][:, first] @ error[first]
    )
    assert torch.equal(codes[later].long(), torch.bucketize(target, BORDERS))
    assert torch.equal(codes[first].long(), torch.bucketize(x[0, 0, 0, first], BORDERS))


def test_exact_channels_make_no_error_to_pass_on() -> None:
    true = metric(2, 16)
    feedback = Feedback.of(*factorise(true, 3))
    x = vectors(1, 2, 30, 16)
    everything = torch.arange(16).expand(x.shape)
    found = round_with_feedback(x, BORDERS, BOOK, feedback, everything)
    assert torch.equal(found, torch.bucketize(x, BORDERS).to(torch.uint8))


def test_a_vector_is_rounded_as_it_would_be_alone() -> None:
    feedback = Feedback.of(*factorise(metric(2, 64), 4))
    x = vectors(3, 2, 70, 64)
    whole = round_with_feedback(x, BORDERS, BOOK, feedback)
    for row, token in ((0, 0), (1, 33), (2, 69)):
        alone = round_with_feedback(x[row : row + 1, :, token : token + 1], BORDERS, BOOK, feedback)
        assert torch.equal(alone[0, :, 0], whole[row, :, token])
