"""ADMM and refit: support, targets, held-out tokens, and who beats whom on the layer's output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmsqueeze.errors import RecipeError
from llmsqueeze.methods import admm, refit, sparsegpt, wanda
from llmsqueeze.methods.base import Target
from llmsqueeze.methods.select import choose, relaxed
from llmsqueeze.numerics.solve import relative_error
from llmsqueeze.numerics.stats import InputStats

CPU = torch.device("cpu")
NEEDS = frozenset({"sq_sum", "gram", "product"})
PATTERNS = ["unstructured", "2:4", "4:8", "2:4-out", "tile"]


def case(rows: int = 16, width: int = 32, tokens: int = 400) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    x = torch.randn(tokens, width, generator=g) @ torch.randn(width, width, generator=g)
    x = x * torch.rand(width, generator=g).mul(3).exp()
    return torch.randn(rows, width, generator=g), x


def stats_of(x: Tensor, **options: object) -> InputStats:
    stats = InputStats(x.shape[1], NEEDS, CPU, **options)  # type: ignore[arg-type]
    stats.update(x.unsqueeze(0))
    return stats


def target_of(pattern: str) -> Target:
    return Target.parse(None, pattern, tile=8)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refit_keeps_the_support_and_lowers_the_error(pattern: str, dtype: torch.dtype) -> None:
    weight, x = case()
    weight = weight.to(dtype)
    stats = stats_of(x)
    pruned = wanda.prune(weight, stats, target_of(pattern), wanda.Config())
    fitted = refit.refit(weight, pruned, stats, refit.Config())
    assert fitted.weight.dtype == dtype
    assert torch.equal(fitted.keep, pruned.keep)
    removed = fitted.weight[~pruned.keep]
    assert (removed == 0).all() and not torch.signbit(removed).any()
    before = relative_error(weight, pruned.weight, x)
    assert relative_error(weight, fitted.weight, x) < 0.9 * before


@pytest.mark.parametrize("pattern", PATTERNS)
def test_admm_has_the_pattern_and_beats_wanda_with_refit(pattern: str) -> None:
    weight, x = case(rows=24, width=48)
    stats, target = stats_of(x), target_of(pattern)
    config = admm.Config(admm_ridge=0.01)
    pruned = admm.prune(weight, stats, target, config)
    removed = pruned.weight[~pruned.keep]
    assert (removed == 0).all() and not torch.signbit(removed).any()
    # The pattern is that of some score: choosing again with the mask as score changes nothing.
    if pattern in ("unstructured", "2:4", "4:8"):
        assert torch.equal(choose(pruned.keep.float(), target), pruned.keep)
    assert int((~pruned.keep).sum()) == int((~choose(weight.abs(), target)).sum())
    fitted = refit.refit(weight, pruned, stats, refit.Config(refit_steps=50))
    other = wanda.prune(weight, stats, target, wanda.Config())
    other = refit.refit(weight, other, stats, refit.Config(refit_steps=50))
    mine = relative_error(weight, fitted.weight, x)
    assert mine < relative_error(weight, other.weight, x)


def admm_by_loop(weight: Tensor, x: Tensor, sparsity: float, steps: int, ramp: int) -> Tensor:
    """Algorithm 2 of arXiv 2401.02938 in fp64, rows ranked alone: scale, split, ramp, scale back."""
    w, x = weight.double(), x.double()
    size = (x.square().sum(0) / len(x)).sqrt()
    x, w = x / size, w * size
    gram = x.t() @ x / len(x) + 0.1 * torch.eye(len(size), dtype=torch.float64)
    inverse = torch.linalg.inv(gram + torch.eye(len(size), dtype=torch.float64))
    original, gap = w.clone(), torch.zeros_like(w)
    keep = torch.ones_like(w, dtype=torch.bool)
    for step in range(steps):
        if step < ramp:
            share = sparsity * (1 - (1 - (step + 1) / ramp) ** 3)
            removed = int(len(size) * share + 1e-9)
            for i, row in enumerate((w + gap).abs()):
                keep[i] = True
                keep[i, row.argsort(stable=True)[:removed]] = False
        z = (w + gap) * keep
        gap += w - z
        w = (original @ gram + z - gap) @ inverse
    return (w + gap) * keep / size


def test_admm_matches_the_loop() -> None:
    weight, x = case()
    found = admm.prune(weight, stats_of(x), Target(0.5), admm.Config()).weight
    expected = admm_by_loop(weight, x, 0.5, 20, 15)
    assert torch.equal(found == 0, expected == 0)
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_refit_at_convergence_is_not_worse_than_sparsegpt_on_its_mask() -> None:
    weight, x = case()
    stats = stats_of(x)
    pruned = sparsegpt.prune(weight, stats, Target(0.5), sparsegpt.Config())
    config = refit.Config(refit_steps=200, refit_ridge=0.0)
    fitted = refit.refit(weight, pruned, stats, config)
    assert relative_error(weight, fitted.weight, x) <= relative_error(weight, pruned.weight, x)


def test_dense_share_aims_at_the_dense_output_and_drift() -> None:
    """Fully kept, the fit must reach what it aims at: here a linear function of the inputs."""
    weight, x = case(rows=8, width=16)
    g = torch.Generator().manual_seed(1)
    dense_x = x @ (torch.eye(16) + 0.1 * torch.randn(16, 16, generator=g))
    drift = x @ torch.randn(16, 8, generator=g) * 0.1
    stats = InputStats(16, NEEDS, CPU, dense_share=1.0, drift_width=8)
    stats.update(x.unsqueeze(0), dense_x.unsqueeze(0), drift.unsqueeze(0))
    whole = wanda.prune(weight, stats, Target(0.0), wanda.Config())
    config = refit.Config(refit_steps=300, refit_ridge=0.0)
    fitted = refit.refit(weight, whole, stats, config).weight
    wanted = dense_x @ weight.t() + drift
    assert (x @ fitted.t() - wanted).norm() < 1e-2 * wanted.norm()


def test_product_is_the_sum_over_tokens() -> None:
    weight, x = case(rows=8, width=16)
    dense_x, drift = x * 1.1 + 0.3, x[:, :8] * 0.5
    stats = InputStats(16, NEEDS, CPU, dense_share=0.3, drift_width=8)
    for part in (slice(0, 150), slice(150, 400)):
        stats.update(x[part].unsqueeze(0), dense_x[part].unsqueeze(0), drift[part].unsqueeze(0))
    wanted = 0.7 * x @ weight.t() + 0.3 * (dense_x @ weight.t() + drift)
    expected = wanted.double().t() @ x.double()
    assert torch.allclose(stats.product(weight).double(), expected, rtol=1e-4, atol=1e-2)


def test_held_out_tokens_are_not_fitted() -> None:
    weight, x = case()
    whole, part, rest = stats_of(x), stats_of(x[300:]), stats_of(x[:300])
    whole.held_out = part
    assert torch.allclose(whole.fitting().gram, rest.gram, rtol=1e-4, atol=1e-1)
    assert whole.fitting().count == 300
    mine = admm.prune(weight, whole, Target(0.5), admm.Config())
    other = admm.prune(weight, rest, Target(0.5), admm.Config())
    assert torch.allclose(mine.weight, other.weight, rtol=1e-2, atol=1e-3)


def test_ramp_ends_at_the_target() -> None:
    for pattern in PATTERNS:
        target = target_of(pattern)
        assert relaxed(target, 1.0) == target
    assert relaxed(target_of("2:4"), 0.1) is None
    partial = relaxed(target_of("2:4-out"), 0.5)
    assert partial is not None and partial.pattern is not None
    assert (partial.pattern_name, partial.sparsity) == ("3:4-out", 0.25)
    assert relaxed(Target(0.6), 0.5) == Target(0.3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: refit.Config(refit_steps=0),
        lambda: refit.Config(refit_ridge=-1),
        lambda: admm.Config(admm_steps=5, admm_ramp=6),
        lambda: admm.Config(admm_ridge=0),
        lambda: admm.Config(admm_penalty=-1),
    ],
)
def test_settings_out_of_range(make: object) -> None:
    with pytest.raises(RecipeError):
        make()  # type: ignore[operator]
