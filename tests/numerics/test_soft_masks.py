"""Soft masks against loops written from the papers, and their gradients against plain autograd."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from llmsqueeze.numerics.soft_masks import (
    PAIRS,
    Draw,
    PatternLinear,
    TileLinear,
    blend,
    gumbel,
    harden_patterns,
    highest_tiles,
    pattern_prior,
    pattern_shares,
    ramp,
    seed_of,
    soft_gates,
    soft_pattern_mask,
    tile_areas,
    tile_prior,
    warmup_cosine,
)

# Rows, columns, tile size: whole tiles, and ragged ones on both edges.
SHAPES = [(8, 8, 4), (10, 12, 8), (5, 20, 8)]
F64 = torch.float64


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tiles_of(rows: int, columns: int, size: int) -> tuple[int, int]:
    return math.ceil(rows / size), math.ceil(columns / size)


def random_keep(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A 2:4 mask whose groups are drawn at random."""
    picks = torch.randint(0, 6, (rows, columns // 4), generator=torch.Generator().manual_seed(seed))
    keep = torch.zeros(rows, columns, dtype=torch.bool)
    pairs = list(itertools.combinations(range(4), 2))
    for row, group in itertools.product(range(rows), range(columns // 4)):
        for column in pairs[int(picks[row, group])]:
            keep[row, 4 * group + column] = True
    return keep


def spread(tiles: Tensor, size: int, rows: int, columns: int) -> Tensor:
    """Each weight's tile value, by indexing; differentiable."""
    i = torch.arange(rows) // size
    j = torch.arange(columns) // size
    return tiles[i][:, j]


def pattern_mask_by_einsum(
    logits: Tensor, noise: Tensor, scale: float, temperature: float
) -> Tensor:
    """The soft 2:4 mask as the papers write it, for autograd to go through."""
    patterns = torch.zeros(6, 4, dtype=logits.dtype)
    for c, pair in enumerate(itertools.combinations(range(4), 2)):
        patterns[c, list(pair)] = 1
    shares = torch.softmax((scale * logits + noise) / temperature, dim=-1)
    return torch.einsum("rgc,ck->rgk", shares, patterns).reshape(logits.shape[0], -1)


def test_pairs_are_all_there_are() -> None:
    assert list(PAIRS) == list(itertools.combinations(range(4), 2))


@pytest.mark.parametrize("seed", [None, 3])
def test_soft_masks_are_what_the_formula_says(seed: int | None) -> None:
    logits, draw = normal(3, 2, 6), Draw(2.5, 0.7, seed)
    noise = torch.zeros(3, 2, 6) if seed is None else gumbel((3, 2, 6), seed, logits)
    mask = soft_pattern_mask(logits, draw)
    for row, group in itertools.product(range(3), range(2)):
        powers = [
            math.exp((2.5 * float(logits[row, group, c]) + float(noise[row, group, c])) / 0.7)
            for c in range(6)
        ]
        for column in range(4):
            held = [
                p / sum(powers)
                for p, pair in zip(powers, itertools.combinations(range(4), 2), strict=True)
                if column in pair
            ]
            assert float(mask[row, 4 * group + column]) == pytest.approx(sum(held), rel=1e-9)


def test_groups_add_up_to_two_and_gates_stay_in_range() -> None:
    logits = normal(16, 8, 6, dtype=torch.float32)
    for scale, temperature in ((0.0, 4.0), (100.0, 4.0), (500.0, 0.05)):
        mask = soft_pattern_mask(logits, Draw(scale, temperature, 1))
        assert torch.allclose(mask.reshape(16, 8, 4).sum(-1), torch.tensor(2.0), atol=1e-5)
        assert mask.min() >= 0
        assert mask.max() <= 1 + 1e-6
        gates = soft_gates(logits, scale, temperature, 1)
        assert gates.min() >= 0
        assert gates.max() <= 1
    # Not saturated at the start: the noise decides, and gradients flow.
    assert ((gates := soft_gates(logits * 0.01, 25.0, 4.0, 1)) > 0.05).float().mean() > 0.9
    assert (gates < 0.95).float().mean() > 0.9


def test_without_noise_cold_masks_are_the_hardened_ones() -> None:
    logits = normal(6, 5, 6)
    hard = harden_patterns(logits)
    assert (hard.reshape(6, 5, 4).sum(-1) == 2).all()
    for row, group in itertools.product(range(6), range(5)):
        best = max(range(6), key=lambda c: float(logits[row, group, c]))
        kept = hard[row, 4 * group : 4 * group + 4].nonzero().flatten().tolist()
        assert tuple(kept) == list(itertools.combinations(range(4), 2))[best]
    assert torch.equal(soft_pattern_mask(logits, Draw(1e4, 1e-3, None)), hard.double())
    tiles = normal(4, 3)
    assert torch.equal(soft_gates(tiles, 1e4, 1e-3, None), (tiles > 0).double())
    warm = soft_pattern_mask(logits, Draw(1.0, 4.0, None))
    assert not torch.allclose(warm, hard.double(), atol=0.2)


def test_gates_are_the_softmax_of_two() -> None:
    logits = normal(7)
    noise = gumbel((2, 7), 5, logits)
    both = torch.stack([noise[0], 3.0 * logits + noise[1]]) / 0.4
    assert torch.allclose(soft_gates(logits, 3.0, 0.4, 5), both.softmax(dim=0)[1], rtol=1e-12)


def test_noise_is_gumbel_and_follows_its_seed() -> None:
    like = torch.zeros(())
    noise = gumbel((200_000,), 4, like)
    # Standard Gumbel: mean Euler's constant, variance π²/6, P(X <= 0) = 1/e.
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.04)
    assert float((noise <= 0).float().mean()) == pytest.approx(math.exp(-1), abs=0.01)
    assert torch.isfinite(noise).all()
    assert torch.equal(noise, gumbel((200_000,), 4, like))
    assert not torch.equal(noise, gumbel((200_000,), 5, like))
    seeds = {seed_of(*words) for words in itertools.product(range(3), range(3), range(9), range(9))}
    assert len(seeds) == 3 * 3 * 9 * 9


def by_autograd(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, upstream: Tensor, pull: float
) -> None:
    """Backward of <y, upstream> + pull·‖W ⊙ m‖ through ordinary operations."""
    effective = weight * mask
    y = torch.einsum("...c,rc->...r", x, effective)
    if bias is not None:
        y = y + bias
    ((y * upstream).sum() + pull * effective.square().sum().sqrt()).backward()


@pytest.mark.parametrize(("rows", "columns", "size"), SHAPES)
@pytest.mark.parametrize("pull", [0.0, 0.3])
def test_tile_gradient_is_autograds(rows: int, columns: int, size: int, pull: float) -> None:
    weight, keep = normal(rows, columns, seed=1), random_keep(rows, columns)
    bias, upstream = normal(rows, seed=2), normal(2, 3, rows, seed=3)
    x = normal(2, 3, columns, seed=4).requires_grad_()
    gates = torch.rand(tiles_of(rows, columns, size), dtype=F64, requires_grad=True)
    t = spread(gates, size, rows, columns)
    by_autograd(x, weight, bias, t + (1 - t) * keep, upstream, pull)
    expected = x.grad, gates.grad
    x.grad = gates.grad = None
    y, norm = TileLinear.apply(x, gates, weight, bias, keep, size)
    ((y * upstream).sum() + pull * norm).backward()
    assert torch.allclose(x.grad, expected[0], rtol=1e-10, atol=1e-12)
    assert torch.allclose(gates.grad, expected[1], rtol=1e-10, atol=1e-12)
    assert gates.grad.abs().min() > 0


@pytest.mark.parametrize(("rows", "columns", "size"), SHAPES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("pull", [0.0, 0.3])
def test_joint_gradient_is_autograds(
    rows: int, columns: int, size: int, gated: bool, pull: float
) -> None:
    weight, upstream = normal(rows, columns, seed=1), normal(4, rows, seed=2)
    x = normal(4, columns, seed=3).requires_grad_()
    logits = normal(rows, columns // 4, 6, seed=4).requires_grad_()
    gates = None
    if gated:
        gates = torch.rand(tiles_of(rows, columns, size), dtype=F64, requires_grad=True)
    draw = Draw(1.5, 0.8, seed=11)
    noise = gumbel(tuple(logits.shape), 11, logits)
    mask = pattern_mask_by_einsum(logits, noise, 1.5, 0.8)
    if gates is not None:
        t = spread(gates, size, rows, columns)
        mask = t + (1 - t) * mask
    by_autograd(x, weight, None, mask, upstream, pull)
    leaves = [leaf for leaf in (x, logits, gates) if leaf is not None]
    expected = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    y, norm = PatternLinear.apply(x, gates, logits, weight, None, size, draw)
    ((y * upstream).sum() + pull * norm).backward()
    for leaf, wanted in zip(leaves, expected, strict=True):
        assert torch.allclose(leaf.grad, wanted, rtol=1e-9, atol=1e-12)
        assert leaf.grad.abs().max() > 1e-3


@pytest.mark.parametrize("joint", [False, True])
def test_gates_of_one_are_dense_and_of_zero_two_of_four(joint: bool) -> None:
    rows, columns, size = 10, 12, 8
    weight, x = normal(rows, columns, dtype=torch.float32), normal(3, columns, dtype=torch.float32)
    bias, keep = normal(rows, seed=5, dtype=torch.float32), random_keep(rows, columns)
    logits = pattern_prior(keep, 1.0, 1.0)
    cold = Draw(1e4, 1e-3, None)
    for gate, wanted in ((1.0, weight), (0.0, torch.where(keep, weight, 0.0))):
        gates = torch.full(tiles_of(rows, columns, size), gate)
        if joint:
            y, norm = PatternLinear.apply(x, gates, logits, weight, bias, size, cold)
        else:
            y, norm = TileLinear.apply(x, gates, weight, bias, keep, size)
        assert torch.equal(y, torch.nn.functional.linear(x, wanted, bias))
        assert float(norm) == pytest.approx(float(wanted.double().norm()), rel=1e-5)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass(
    joint: bool, dtype: torch.dtype
) -> None:
    rows, columns, size = 64, 64, 32
    weight, x = normal(rows, columns).to(dtype), normal(3, columns).to(dtype)
    gates, keep = torch.rand(2, 2, requires_grad=True), random_keep(rows, columns)
    logits = normal(rows, columns // 4, 6, dtype=torch.float32).requires_grad_()
    x.requires_grad_()
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if joint:
            y, norm = PatternLinear.apply(x, gates, logits, weight, None, size, Draw(100.0, 4.0, 1))
        else:
            y, norm = TileLinear.apply(x, gates, weight, None, keep, size)
    given = {tensor.data_ptr() for tensor in (weight, keep, logits)}
    large = [tensor for tensor in packed if tensor.numel() >= rows * columns]
    assert large
    assert {tensor.data_ptr() for tensor in large} <= given
    assert y.dtype == dtype
    assert norm.dtype == torch.float32
    (y.float().sum() + norm).backward()
    assert x.grad.dtype == dtype
    for leaf in [gates, logits] if joint else [gates]:
        assert leaf.grad.dtype == torch.float32
        assert torch.isfinite(leaf.grad).all()


def test_a_weight_of_zeros_has_no_gradient() -> None:
    gates = torch.full((1, 1), 0.5, requires_grad=True)
    weight, keep = torch.zeros(4, 4), random_keep(4, 4)
    y, norm = TileLinear.apply(torch.ones(1, 4), gates, weight, None, keep, 4)
    (y.sum() + norm).backward()
    assert torch.equal(gates.grad, torch.zeros(1, 1))


@pytest.mark.parametrize(("rows", "columns", "size"), SHAPES)
def test_density_is_half_of_one_plus_the_dense_share(rows: int, columns: int, size: int) -> None:
    gates = torch.rand(tiles_of(rows, columns, size), dtype=F64)
    soft = soft_pattern_mask(normal(rows, columns // 4, 6), Draw(3.0, 0.5, 2))
    areas = tile_areas(rows, columns, size, torch.device("cpu"))
    counted = torch.zeros(areas.shape, dtype=torch.int64)
    for i, j in itertools.product(range(rows), range(columns)):
        counted[i // size, j // size] += 1
    assert torch.equal(areas, counted)
    share = float((gates * counted).sum() / (rows * columns))
    # A soft group adds up to 2 in every tile, since no tile cuts a group.
    mean = float(blend(gates, soft, size).mean())
    assert mean == pytest.approx(0.5 * (1 + share), rel=1e-12)
    assert 1 - mean == pytest.approx(0.5 * (1 - share), rel=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.75, 1.0])
def test_hardening_takes_the_highest_up_to_the_nearest_area(share: float) -> None:
    areas = torch.cat(
        [tile_areas(r, c, s, torch.device("cpu")).flatten() for r, c, s in [*SHAPES, (30, 28, 8)]]
    )
    scores = normal(areas.numel(), seed=8, dtype=torch.float32).round(decimals=1)  # with ties
    chosen = highest_tiles(scores, areas, share)
    order = sorted(range(areas.numel()), key=lambda i: (-float(scores[i]), i))
    total = int(areas.sum())
    gaps = [
        abs(sum(int(areas[i]) for i in order[:count]) - share * total)
        for count in range(areas.numel() + 1)
    ]
    count = min(range(len(gaps)), key=lambda n: (gaps[n], n))
    assert set(chosen.nonzero().flatten().tolist()) == set(order[:count])


def test_equal_tiles_are_counted_exactly() -> None:
    areas = torch.full((40,), 128 * 128)
    for sparsity, wanted in ((0.45, 4), (0.35, 12), (0.25, 20), (0.5, 0), (0.0, 40)):
        assert int(highest_tiles(normal(40), areas, 1 - 2 * sparsity).sum()) == wanted
    # Beyond the integers that fp32 holds exactly: there the last tiles, ragged, would weigh nothing.
    areas = torch.tensor([2**30, 16, 16, 16])
    scores = torch.tensor([4.0, 3.0, 2.0, 1.0])
    for wanted in (1, 2, 3, 4):
        share = float(areas[:wanted].sum()) / float(areas.sum())
        assert int(highest_tiles(scores, areas, share).sum()) == wanted


def test_priors_prefer_the_mask_they_are_given() -> None:
    keep = random_keep(9, 16)
    logits = pattern_prior(keep, 0.014, 3.0)
    assert torch.equal(harden_patterns(logits), keep)
    for row, group in itertools.product(range(9), range(4)):
        kept = set(keep[row, 4 * group : 4 * group + 4].nonzero().flatten().tolist())
        for c, pair in enumerate(itertools.combinations(range(4), 2)):
            wanted = (len(kept & set(pair)) - 1) * 0.014 * 3.0
            assert float(logits[row, group, c]) == pytest.approx(wanted, abs=1e-8)
    dense = torch.tensor([True, False, False])
    wanted = torch.tensor([0.042, -0.042, -0.042])
    assert torch.allclose(tile_prior(dense, 0.014, 3.0), wanted)


def test_a_strong_prior_outweighs_the_noise_and_a_weak_one_does_not() -> None:
    keep = random_keep(32, 32)
    draw = Draw(100.0, 4.0, 9)
    strong = pattern_shares(pattern_prior(keep, 0.014, 300.0), draw)
    assert torch.equal(harden_patterns(strong), keep)
    assert strong.max(dim=-1).values.min() > 0.99
    weak = pattern_shares(pattern_prior(keep, 0.014, 0.1), draw)
    assert not torch.equal(harden_patterns(weak), keep)


def test_schedules() -> None:
    assert [ramp(4.0, 0.0, step, 5) for step in range(5)] == [4.0, 3.0, 2.0, 1.0, 0.0]
    assert ramp(4.0, 0.05, 0, 1) == 4.0
    factors = [warmup_cosine(step, 12, 4) for step in range(12)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.5)
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert 0 < factors[-1] < 0.05
    assert warmup_cosine(0, 1, 0) == 1.0
