"""TEAL, WINA, CHESS, R-Sparse and greedy allocation, by their definitions and brute force."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from random import Random

import pytest
import torch
from torch import Tensor

from llmsqueeze.architectures import GatedMlp
from llmsqueeze.errors import RecipeError
from llmsqueeze.methods import ACTIVATION_METHODS, chess, greedy, rsparse, teal, wina
from llmsqueeze.methods.gating import BlockParts, GateSpec
from llmsqueeze.numerics.histogram import MagnitudeHistogram
from llmsqueeze.ops import gate

SPEC = GateSpec("input", "q", ("q", "k"))
GROUPS = [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wina_scale(weight: Tensor) -> Tensor:
    return wina.scale(SPEC, [weight], None, wina.Config())


def kept_of(x: Tensor, scale: Tensor, count: int) -> Tensor:
    """Bool: the `count` inputs with the highest |x|·scale, through the operator's threshold."""
    score = x.abs() * scale
    threshold = score.sort(descending=True).values[count]  # exclusive
    return gate(torch.ones_like(x) * x, threshold / scale) != 0


def error_of(weight: Tensor, x: Tensor, kept: Tensor) -> float:
    return float((weight @ torch.where(kept, torch.zeros_like(x), x)).square().sum())


def test_equal_norms_make_wina_teal() -> None:
    weight = torch.linalg.qr(random(24, 24))[0]
    x = random(24, seed=1)
    ours, theirs = wina_scale(weight), teal.scale(SPEC, [weight], None, teal.Config())
    assert torch.equal(theirs, torch.ones(24))
    assert torch.equal(kept_of(x, ours, 12), kept_of(x, theirs, 12))


@pytest.mark.parametrize("count", [1, 5, 12, 23])
def test_a_threshold_at_the_next_score_keeps_the_top_ones(count: int) -> None:
    weight, x = random(9, 24), random(24, seed=2)
    scale = wina_scale(weight)
    expected = torch.zeros(24, dtype=torch.bool)
    expected[(x.abs() * scale).topk(count).indices] = True
    assert torch.equal(kept_of(x, scale, count), expected)


def test_norms_are_of_all_members() -> None:
    weights = [random(7, 5), 0.01 * random(3, 5, seed=1)]
    stacked = torch.cat(weights)
    expected = [sum(float(w) ** 2 for w in column) ** 0.5 for column in stacked.t()]
    found = wina.scale(SPEC, weights, None, wina.Config())
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    relative = wina.scale(SPEC, weights, None, wina.Config(wina_relative=True))
    alike = torch.cat([w / w.norm() for w in weights]).norm(dim=0)
    assert torch.allclose(relative, alike, rtol=1e-5)


def test_wina_does_not_see_a_rescaling_that_teal_sees() -> None:
    weight, x = random(16, 32), random(32, seed=3)
    powers = torch.tensor([2.0 ** ((7 * j) % 9 - 4) for j in range(32)])
    moved, moved_x = weight / powers, x * powers
    assert torch.equal(kept_of(x, wina_scale(weight), 16), kept_of(moved_x, wina_scale(moved), 16))
    ones = torch.ones(32)
    assert not torch.equal(kept_of(x, ones, 16), kept_of(moved_x, ones, 16))


@pytest.mark.parametrize("seed", range(4))
def test_with_orthogonal_columns_wina_is_the_best_choice(seed: int) -> None:
    size, count = 10, 4
    g = torch.Generator().manual_seed(seed)
    weight = torch.linalg.qr(torch.randn(size, size, generator=g).double())[0]
    weight = weight * torch.rand(size, generator=g).mul(2).exp()
    x = torch.randn(size, generator=g).double()
    kept = kept_of(x.float(), wina_scale(weight), count)
    error = error_of(weight, x, kept)
    dropped = (x.square() * weight.square().sum(0))[~kept].sum()
    assert error == pytest.approx(float(dropped), rel=1e-12)
    every = []
    for chosen in itertools.combinations(range(size), count):
        mask = torch.zeros(size, dtype=torch.bool)
        mask[list(chosen)] = True
        every.append(error_of(weight, x, mask))
    assert error == pytest.approx(min(every), rel=1e-9)
    assert error <= error_of(weight, x, kept_of(x.float(), torch.ones(size), count)) + 1e-12


def test_without_orthogonal_columns_it_need_not_be() -> None:
    weight = torch.tensor([[1.0, -1.0, 0.5]])
    x = torch.tensor([1.0, 1.0 - 1e-6, 1.5])  # WINA's tie goes to the first
    assert error_of(weight, x, kept_of(x, wina_scale(weight), 1)) == pytest.approx(0.0625, abs=1e-5)
    assert error_of(weight, x, kept_of(x, torch.ones(3), 1)) == pytest.approx(0, abs=1e-5)


def test_masks_nest_and_sparsity_rises() -> None:
    x = random(500, 24, seed=4)
    scale = wina_scale(random(9, 24))
    histogram = MagnitudeHistogram(torch.device("cpu"))
    histogram.update(x.abs() * scale)
    before = torch.ones_like(x, dtype=torch.bool)
    for share in (0.0, 0.2, 0.5, 0.7, 0.95):
        threshold = histogram.quantiles(torch.tensor([share]))
        kept = gate(x, threshold / scale) != 0
        assert not (kept & ~before).any()
        assert float((~kept).double().mean()) == pytest.approx(share, abs=0.01)
        before = kept


def test_chess_weighs_channels_by_what_they_will_meet() -> None:
    config = chess.Config()
    specs = {s.at: s for s in chess.gates(BlockParts(GROUPS, GatedMlp()), config)}
    mlp = specs["mlp.act_fn"]
    assert (mlp.kind, mlp.members, mlp.rows) == ("output", ("mlp.down_proj",), ("mlp.up_proj",))
    assert set(specs) == {"mlp.act_fn", "self_attn.q_proj", "self_attn.o_proj"}
    g, u = random(4000, 16, seed=5), random(4000, 16, seed=6) * torch.arange(1, 17)
    mean = u.abs().mean(0)
    scale = chess.scale(mlp, [random(8, 16)], mean, config)
    histogram = MagnitudeHistogram(torch.device("cpu"))
    histogram.update(g.abs() * scale)
    tau = histogram.quantiles(torch.tensor([0.5])) / scale
    assert torch.allclose(tau * mean, (tau * mean).mean().expand(16), rtol=1e-6)
    assert float((gate(g, tau) == 0).double().mean()) == pytest.approx(0.5, abs=3e-3)
    # Channels that meet more are dropped less; with equal means it is CATS, one threshold.
    rates = (gate(g, tau) == 0).double().mean(0)
    assert rates[0] > rates[-1] + 0.3
    equal = chess.scale(mlp, [random(8, 16)], torch.full((16,), 3.0), config)
    assert equal.unique().numel() == 1


def test_chess_needs_a_gated_mlp() -> None:
    with pytest.raises(RecipeError, match="gated MLP"):
        chess.gates(BlockParts(GROUPS, None), chess.Config())
    only = chess.gates(BlockParts(GROUPS, GatedMlp()), chess.Config(chess_attention=False))
    assert [spec.at for spec in only] == ["mlp.act_fn"]


# R-Sparse


def histogram_of(x: Tensor, scale: Tensor) -> MagnitudeHistogram:
    histogram = MagnitudeHistogram(torch.device("cpu"))
    histogram.update(x.abs() * scale)
    return histogram


def branch_of(weight: Tensor, x: Tensor, sparsity: float, **config: object) -> rsparse.Branch:
    scale = wina_scale(weight)
    settings = rsparse.Config(**config)  # type: ignore[arg-type]
    return rsparse.branch(weight, scale, x, histogram_of(x, scale), sparsity, settings)


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_full_rank_replaces_what_is_dropped(svd: str) -> None:
    weight = random(12, 8)
    basis, energy = rsparse._right_vectors(weight, 8, rsparse.Config(rsparse_svd=svd))
    x = random(20, 8, seed=1)
    assert torch.allclose((x @ basis) @ (weight @ basis).t(), x @ weight.t(), atol=1e-5)
    expected = torch.linalg.svdvals(weight).square()
    assert torch.allclose(energy, expected, rtol=1e-4)


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_the_branch_is_within_the_bound_and_better_with_rank(svd: str) -> None:
    weight = random(40, 24) @ torch.diag(torch.linspace(3, 0.1, 24))
    values = torch.linalg.svdvals(weight.double())
    dropped = random(50, 24, seed=2)
    errors = []
    for rank in (1, 4, 9, 16):
        basis, _ = rsparse._right_vectors(weight, rank, rsparse.Config(rsparse_svd=svd))
        gap = dropped @ weight.t() - dropped @ basis @ (weight @ basis).t()
        bound = values[rank] * dropped.norm(dim=1)
        assert bool((gap.norm(dim=1) <= bound * (1.001 if svd == "exact" else 1.1)).all())
        errors.append(float(gap.norm()))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("shape", [(64, 64), (16, 64), (96, 32), (7, 50)])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.8])
def test_the_budget_holds_for_the_true_shape(shape: tuple[int, int], sparsity: float) -> None:
    rows, columns = shape
    for ratio in rsparse.RATIOS:
        rank = rsparse.rank_of(sparsity, ratio, rows, columns)
        kept = (1 - sparsity) * ratio * columns
        assert kept * rows + rank * (rows + columns) <= (1 - sparsity) * rows * columns + 1e-6


def test_the_searched_ratio_is_the_best_one() -> None:
    # Strongly correlated inputs of low rank: a branch pays.
    weight = random(32, 6) @ random(6, 48, seed=1) + 0.05 * random(32, 48, seed=2)
    x = random(400, 48, seed=3)
    found = branch_of(weight, x, 0.5)
    assert found.sparse_ratio < 1 and found.up is not None and found.down is not None

    def error(branch: rsparse.Branch) -> float:
        scale = wina_scale(weight)
        threshold = histogram_of(x, scale).quantiles(torch.tensor([branch.sparsity]))
        kept = gate(x, threshold / scale)
        y = kept @ weight.t()
        if branch.up is not None and branch.down is not None:
            y = y + (x - kept) @ branch.down.t() @ branch.up.t()
        return float((y - x @ weight.t()).square().sum())

    least = error(found)
    for ratio in rsparse.RATIOS:
        assert least <= error(branch_of(weight, x, 0.5, rsparse_ratio=ratio)) * (1 + 1e-4)


def test_no_rank_is_wina() -> None:
    weight, x = random(32, 32), random(300, 32, seed=1)
    found = branch_of(weight, x, 0.5, rsparse_ratio=1.0)
    assert found == rsparse.Branch(1.0, 0.5, None, None, fixed=True)
    assert torch.equal(rsparse.scale(SPEC, [weight], None, rsparse.Config()), wina_scale(weight))
    # The published scale, ‖(V S)_j:‖, is the column norm.
    _, values, right = torch.linalg.svd(weight, full_matrices=False)
    published = (right.t() * values).norm(dim=1)
    assert torch.allclose(published, wina_scale(weight), rtol=1e-5)


@pytest.mark.parametrize("bad", [{"rsparse_ratio": 1.5}, {"rsparse_svd": "magic"}])
def test_settings_out_of_range(bad: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match="rsparse"):
        rsparse.Config(**bad)  # type: ignore[arg-type]


# Greedy allocation


def separable(costs: Mapping[str, float]) -> object:
    return lambda shares: sum(costs[name] * share**2 for name, share in shares.items())


@pytest.mark.parametrize("target", [0.1, 0.5, 0.8, greedy.MOST])
def test_greedy_ends_at_the_target_and_beats_uniform(target: float) -> None:
    costs = {"qkv": 1.0, "o": 0.2, "gate_up": 5.0, "down": 0.5}
    weight = {"qkv": 3.0, "o": 2.0, "gate_up": 10.0, "down": 5.0}
    error = separable(costs)
    path = greedy.allocate(error, weight, target, 0.002)  # type: ignore[arg-type]
    last = path[-1]
    saved = sum(last.sparsity[name] * weight[name] for name in weight) / 20
    assert saved == pytest.approx(target, abs=1e-6) == last.saved
    assert all(0 <= share <= greedy.MOST + 1e-9 for share in last.sparsity.values())
    uniform = [error(dict.fromkeys(weight, step.saved)) for step in path]  # type: ignore[operator]
    worse = sum(step.error > 1.02 * even for step, even in zip(path, uniform, strict=True))
    assert worse <= 0.01 * len(path) + 3
    if target < 0.9:
        assert last.error < uniform[-1]
        assert last.sparsity["o"] > last.sparsity["gate_up"]


def test_greedy_takes_the_cheapest_step_each_time() -> None:
    costs = {"a": 1.0, "b": 1.9}
    seen: list[dict[str, float]] = []

    def error(shares: Mapping[str, float]) -> float:
        seen.append(dict(shares))
        return sum(costs[n] * s**2 for n, s in shares.items())

    path = greedy.allocate(error, {"a": 1.0, "b": 1.0}, 0.6, 0.1)
    assert [step.sparsity for step in path] == [  # from 0.3 each
        pytest.approx({"a": 0.5, "b": 0.3}),
        pytest.approx({"a": 0.7, "b": 0.3}),
        pytest.approx({"a": 0.7, "b": 0.5}),
    ]
    # The even start; both gates; then a is still cheaper; then b is, as last tried.
    assert len(seen) == 6
    assert greedy.allocate(error, {"a": 1.0}, 0.0, 0.1) == []


@pytest.mark.parametrize("seed", range(10))
def test_greedy_finds_what_trying_every_gate_finds(seed: int) -> None:
    draw = Random(seed).uniform
    weight = {name: draw(1, 8) for name in ("qkv", "o", "gate_up", "down")}
    costs = {name: (draw(0.1, 5), draw(1.5, 4)) for name in weight}
    tried = 0

    def error(shares: Mapping[str, float]) -> float:
        nonlocal tried
        tried += 1
        alone = sum(scale * shares[n] ** power for n, (scale, power) in costs.items())
        return alone + 0.5 * shares["qkv"] * shares["o"]

    total, shares, steps = sum(weight.values()), dict.fromkeys(weight, 0.25), 10
    for _ in range(steps):
        raised = [{**shares, n: shares[n] + 0.025 * total / weight[n]} for n in weight]
        shares = min((r for r in raised if max(r.values()) <= greedy.MOST), key=error)
    tried = 0
    path = greedy.allocate(error, weight, 0.5, 0.025)
    assert path[-1].sparsity == pytest.approx(shares)
    assert path[-1].error == pytest.approx(error(shares))
    assert tried < 0.75 * 4 * steps


def test_every_method_has_what_the_table_promises() -> None:
    from llmsqueeze.methods import activation_method

    for name in ACTIVATION_METHODS:
        module = activation_method(name)
        found = module.gates(BlockParts(GROUPS, GatedMlp()), module.Config())
        assert found and all(spec.kind in ("input", "output") for spec in found)
    with pytest.raises(RecipeError, match="choose from teal"):
        activation_method("cats")
