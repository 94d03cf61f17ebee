"""Magnitude, Wanda and SparseGPT against loops in fp64 written from the papers, and their invariants."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from llmsqueeze.errors import CalibrationError, RecipeError
from llmsqueeze.methods import magnitude, sparsegpt, wanda
from llmsqueeze.methods.base import NM, Target
from llmsqueeze.numerics.stats import InputStats

TARGETS = [
    Target(0.5),
    Target(0.3),
    Target(0.0),
    Target.parse(None, "2:4"),
    Target.parse(None, "1:4"),
]


def inputs(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Correlated, unevenly scaled activations, fp32."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=g) @ torch.randn(width, width, generator=g)
    return x * torch.rand(width, generator=g).mul(3).exp()


def stats_of(x: Tensor, *needs: str) -> InputStats:
    stats = InputStats(x.shape[-1], frozenset(needs), torch.device("cpu"))
    stats.update(x)
    return stats


def weight_of(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def lowest(scores: list[float], count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda j: (scores[j], j))[:count])


def removed_by_loop(score: Tensor, target: Target) -> Tensor:
    """Per row, or per n:m group: True where the oracle removes."""
    removed = torch.zeros(score.shape, dtype=torch.bool)
    for i, row in enumerate(score.double().tolist()):
        if target.pattern is None:
            groups = [(0, len(row), target.removed_of(len(row)))]
        else:
            n, m = target.pattern.n, target.pattern.m
            groups = [(start, start + m, m - n) for start in range(0, len(row), m)]
        for start, stop, count in groups:
            for j in lowest(row[start:stop], count):
                removed[i, start + j] = True
    return removed


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_wanda_matches_the_loop(target: Target) -> None:
    x, weight = inputs(90, 24), weight_of(10, 24)
    score = torch.empty(10, 24, dtype=torch.float64)
    for i, j in itertools.product(range(10), range(24)):
        norm = sum(float(v) ** 2 for v in x[:, j]) ** 0.5
        score[i, j] = abs(float(weight[i, j])) * norm
    out = wanda.prune(weight, stats_of(x, "sq_sum"), target, wanda.Config()).weight
    removed = removed_by_loop(score, target)
    assert torch.equal(out == 0, removed)
    assert torch.equal(out[~removed], weight[~removed])


def test_wanda_mask_minimises_the_removed_score() -> None:
    x, weight = inputs(50, 8), weight_of(5, 8)
    stats = stats_of(x, "sq_sum")
    out = wanda.prune(weight, stats, Target(0.5), wanda.Config()).weight
    score = weight.abs() * stats.rms
    for i in range(5):
        best = min(float(score[i, list(c)].sum()) for c in itertools.combinations(range(8), 4))
        assert float(score[i][out[i] == 0].sum()) == pytest.approx(best)


def test_wanda_invariances() -> None:
    x, weight = inputs(60, 16), weight_of(6, 16)

    def mask(x: Tensor, weight: Tensor) -> Tensor:
        return wanda.prune(weight, stats_of(x, "sq_sum"), Target(0.5), wanda.Config()).weight == 0

    base = mask(x, weight)
    assert torch.equal(mask(4 * x, weight), base)
    scales = 2.0 ** torch.arange(-3, 3).float().unsqueeze(1)  # powers of two: rounding stays out
    assert torch.equal(mask(x, scales * weight), base)
    channel = 2.0 ** torch.randint(-4, 5, (16,)).float()
    assert torch.equal(mask(x * channel, weight / channel), base)
    flat = torch.ones(9, 16) * torch.tensor([-1.0, 1, -1] * 3).unsqueeze(1)
    assert torch.equal(mask(flat, weight), removed_by_loop(weight.abs(), Target(0.5)))
    # Wanda is OBS with a diagonal Hessian: w² G_jj orders like |w| sqrt(G_jj).
    obs = weight.double().square() * x.double().square().sum(0)
    assert torch.equal(removed_by_loop(obs, Target(0.5)), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_magnitude_matches_the_loop(target: Target, dtype: torch.dtype) -> None:
    weight = weight_of(9, 20).to(dtype)
    out = magnitude.prune(weight, None, target, magnitude.Config()).weight
    score = weight.abs() if target.pattern else weight.abs().reshape(1, -1)
    removed = removed_by_loop(score, target).reshape(weight.shape)
    assert torch.equal(out == 0, removed)
    assert torch.equal(out[~removed], weight[~removed])


def sparsegpt_by_loop(
    weight: Tensor, x: Tensor, target: Target, block: int, damping: float
) -> Tensor:
    """OBS by definition: eliminate column by column with the inverse of the remaining Hessian, fp64."""
    w = weight.double().clone()
    rows, columns = w.shape
    hessian = 2 / x.shape[0] * (x.double().t() @ x.double())
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    w[:, dead] = 0
    hessian += damping * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    # inverse[j]: of the Hessian restricted to the columns from j on.
    inverse = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    removed = torch.zeros(rows, columns, dtype=torch.bool)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        if target.pattern is None:
            score = [
                float(w[i, j] ** 2 / inverse[j][0, 0])
                for i in range(rows)
                for j in range(start, stop)
            ]
            for flat in lowest(score, target.removed_of(len(score))):
                removed[flat // (stop - start), start + flat % (stop - start)] = True
        for j in range(start, stop):
            if target.pattern and (j - start) % target.pattern.m == 0:
                n, m = target.pattern.n, target.pattern.m
                for i in range(rows):
                    score = [float(w[i, k] ** 2 / inverse[k][0, 0]) for k in range(j, j + m)]
                    for k in lowest(score, m - n):
                        removed[i, j + k] = True
            for i in range(rows):
                if removed[i, j]:
                    w[i, j:] -= w[i, j] / inverse[j][0, 0] * inverse[j][0]
                    w[i, j] = 0
    return w


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("block", [8, 12, 128])
def test_sparsegpt_matches_the_loop(target: Target, block: int) -> None:
    x, weight = inputs(200, 24), weight_of(7, 24)
    stats = stats_of(x, "gram")
    out = sparsegpt.prune(weight, stats, target, sparsegpt.Config(block_size=block)).weight
    expected = sparsegpt_by_loop(weight, x, target, block, 0.01)
    assert torch.equal(out == 0, expected == 0)
    assert torch.allclose(out.double(), expected, rtol=2e-3, atol=2e-3)


def test_sparsegpt_counts_and_groups() -> None:
    x, weight = inputs(300, 40), weight_of(16, 40)
    out = sparsegpt.prune(weight, stats_of(x, "gram"), Target(0.5), sparsegpt.Config()).weight
    assert int((out == 0).sum()) == 320
    nm = Target(0.5, NM(2, 4))
    # A block size that cuts through groups must not break them.
    out = sparsegpt.prune(weight, stats_of(x, "gram"), nm, sparsegpt.Config(block_size=10)).weight
    assert ((out.reshape(16, 10, 4) == 0).sum(-1) == 2).all()


def test_sparsegpt_loss_is_the_quadratic_error() -> None:
    x, weight = inputs(300, 20), weight_of(6, 20)
    result = sparsegpt.prune(weight, stats_of(x, "gram"), Target(0.5), sparsegpt.Config())
    hessian = 2 / 300 * (x.double().t() @ x.double())
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    change = (result.weight - weight).double()
    error = float((change @ hessian * change).sum())
    assert result.report["quadratic_loss"] == pytest.approx(error, rel=1e-3)


def test_sparsegpt_beats_zeroing_and_not_least_squares() -> None:
    x, weight = inputs(400, 32), weight_of(12, 32)
    out = sparsegpt.prune(weight, stats_of(x, "gram"), Target(0.5), sparsegpt.Config()).weight
    hessian = 2 / 400 * (x.double().t() @ x.double())
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    w, keep = weight.double(), out != 0
    best = torch.zeros_like(w)
    for i in range(12):
        k = keep[i]
        best[i, k] = torch.linalg.solve(hessian[k][:, k], hessian[k] @ w[i])

    def error(candidate: Tensor) -> float:
        change = candidate.double() - w
        return float((change @ hessian * change).sum())

    assert error(best) <= error(out) * (1 + 1e-5)
    assert error(out) < error(w * keep)


def test_sparsegpt_on_white_inputs_is_magnitude() -> None:
    weight = weight_of(8, 16)
    stats = stats_of(torch.eye(16).repeat(4, 1), "gram")
    out = sparsegpt.prune(weight, stats, Target(0.5), sparsegpt.Config()).weight
    expected = magnitude.prune(weight, None, Target(0.5), magnitude.Config()).weight
    assert torch.allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_dead_inputs_go_first(method: str) -> None:
    x, weight = inputs(100, 16), weight_of(5, 16)
    x[:, [3, 7, 8]] = 0
    module = {"wanda": wanda, "sparsegpt": sparsegpt}[method]
    result = module.prune(weight, stats_of(x, "sq_sum", "gram"), Target(0.5), module.Config())
    assert (result.weight[:, [3, 7, 8]] == 0).all()
    if method == "sparsegpt":
        assert result.report["dead_inputs"] == 3
        assert int((result.weight == 0).sum()) == 40


def test_sparsegpt_retries_damping_and_says_so() -> None:
    x = inputs(40, 12)
    stats = stats_of(x, "gram")
    stats.gram -= 0.05 * stats.gram.diagonal().mean() * torch.eye(12)  # slightly indefinite
    smallest = float(torch.linalg.eigvalsh(stats.gram)[0])
    assert smallest < 0
    result = sparsegpt.prune(weight_of(4, 12), stats, Target(0.5), sparsegpt.Config())
    assert result.report["damping"] == pytest.approx(0.1)
    with pytest.raises(CalibrationError, match="positive definite"):
        stats = stats_of(x, "gram")
        stats.gram -= 100 * stats.gram.diagonal().mean() * torch.eye(12)
        sparsegpt.prune(weight_of(4, 12), stats, Target(0.5), sparsegpt.Config())


def test_arguments_are_not_changed() -> None:
    x, weight = inputs(60, 16), weight_of(4, 16)
    stats = stats_of(x, "sq_sum", "gram")
    before = weight.clone(), stats.gram.clone(), stats.sq_sum.clone()
    for module in (magnitude, wanda, sparsegpt):
        module.prune(weight, stats, Target(0.5), module.Config())
    assert torch.equal(weight, before[0])
    assert torch.equal(stats.gram, before[1])
    assert torch.equal(stats.sq_sum, before[2])


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_sparsity_out_of_range(value: float) -> None:
    with pytest.raises(RecipeError):
        Target(value)


def test_removed_counts_are_not_short_by_rounding() -> None:
    assert Target(0.29).removed_of(100) == 29  # 0.29 * 100 is 28.999999999999996
    assert Target(0.5).removed_of(5) == 2
    assert Target(0.0).removed_of(7) == 0
