"""Masked least squares against exact solves, and what must hold at every step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmsqueeze.numerics.solve import Quadratic, masked_pcg, relative_error


def problem(rows: int = 7, width: int = 20, tokens: int = 90, seed: int = 0) -> tuple[Tensor, ...]:
    """weight, keep, inputs, wanted outputs: correlated inputs, targets that no weight reaches."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=g)
    x = torch.randn(tokens, width, generator=g) @ torch.randn(width, width, generator=g)
    x = x * torch.rand(width, generator=g).mul(2).exp() / width**0.5
    wanted = x @ weight.t() + 0.3 * torch.randn(tokens, rows, generator=g)
    return weight, torch.rand(rows, width, generator=g) < 0.5, x, wanted


def quadratic(x: Tensor, wanted: Tensor) -> Quadratic:
    return Quadratic(x.t() @ x, wanted.t() @ x)


def test_converges_to_the_exact_solution_of_every_row() -> None:
    weight, keep, x, wanted = problem()
    found = masked_pcg(weight, keep, quadratic(x, wanted), 200).weight
    for row in range(len(weight)):
        kept = keep[row]
        exact = torch.linalg.lstsq(x[:, kept].double(), wanted[:, row].double()).solution
        assert torch.allclose(found[row, kept].double(), exact, rtol=2e-3, atol=2e-3)
        assert (found[row, ~kept] == 0).all()


def test_every_step_lowers_the_error() -> None:
    weight, keep, x, wanted = problem(width=40)

    def errors(steps: int) -> Tensor:
        z = masked_pcg(weight, keep, quadratic(x, wanted), steps).weight.double()
        return (x.double() @ z.t() - wanted.double()).square().sum(dim=0)

    previous = errors(0)
    assert torch.allclose(
        previous, (x @ (weight * keep).t() - wanted).double().square().sum(0), rtol=1e-4
    )
    for steps in [*range(1, 12), 40, 100, 300]:
        now = errors(steps)
        assert (now <= previous * (1 + 1e-5)).all()
        previous = now


def test_gradient_vanishes_on_what_is_kept() -> None:
    weight, keep, x, wanted = problem(width=12)
    gram, product = quadratic(x, wanted)
    z = masked_pcg(weight, keep, Quadratic(gram, product), 100).weight
    gradient = (z @ gram - product) * keep
    assert gradient.norm() < 1e-3 * ((weight * keep) @ gram - product).norm()


def test_nothing_to_do_leaves_the_weights() -> None:
    weight, keep, x, _ = problem()
    gram = x.t() @ x
    whole = torch.ones_like(keep)
    assert torch.allclose(
        masked_pcg(weight, whole, Quadratic(gram, weight @ gram), 5).weight, weight
    )
    diagonal = gram.diagonal().diag()
    found = masked_pcg(weight, keep, Quadratic(diagonal, weight @ diagonal), 5).weight
    assert torch.allclose(found, weight * keep, atol=1e-6)
    nothing = torch.zeros_like(keep)
    assert not masked_pcg(weight, nothing, Quadratic(gram, weight @ gram), 5).weight.any()


def test_dead_inputs_are_harmless() -> None:
    weight, keep, x, wanted = problem()
    x[:, 3] = 0
    found = masked_pcg(weight, keep, quadratic(x, wanted), 50).weight
    assert torch.isfinite(found).all()
    assert torch.allclose(found[:, 3], (weight * keep)[:, 3])


def test_judge_stops_each_row_at_its_best_step() -> None:
    """With few tokens the fit overshoots; held-out tokens say when."""
    weight, keep, every, _ = problem(width=60, tokens=540)
    x, other = every[:40], every[40:]
    judge = quadratic(other, other @ weight.t())
    fitted = quadratic(x, x @ weight.t())
    paths = [masked_pcg(weight, keep, fitted, steps).weight for steps in range(16)]
    values = torch.stack([judge.value(z.double().float()) for z in paths])
    found = masked_pcg(weight, keep, fitted, 15, judge)
    best = values.argmin(dim=0)
    assert 0 < float(best.float().mean()) < 15  # the case is one where stopping matters
    assert found.steps == pytest.approx(float(best.float().mean()))
    for row, step in enumerate(best.tolist()):
        assert torch.equal(found.weight[row], paths[step][row])


def test_ridge_pulls_towards_the_anchor() -> None:
    weight, keep, x, wanted = problem()
    whole = torch.ones_like(keep)
    free = quadratic(x, wanted)
    far = masked_pcg(weight, whole, free, 200).weight
    near = masked_pcg(weight, whole, free.ridged(weight, 10.0), 200).weight
    assert (near - weight).norm() < 0.5 * (far - weight).norm()
    exact = torch.linalg.solve(
        (free.gram + 10 * free.gram.diagonal().mean() * torch.eye(20)).double(),
        (free.product + 10 * free.gram.diagonal().mean() * weight).t().double(),
    ).t()
    assert torch.allclose(near.double(), exact, rtol=1e-3, atol=1e-3)


def test_relative_error_is_that_of_the_outputs() -> None:
    weight, keep, x, _ = problem()
    expected = (x @ (weight * ~keep).t()).double().square().sum()
    expected = expected / (x @ weight.t()).double().square().sum()
    assert relative_error(weight, weight * keep, x) == pytest.approx(float(expected), rel=1e-4)
    assert relative_error(weight, weight * keep, torch.zeros(5, 20)) == 0.0
