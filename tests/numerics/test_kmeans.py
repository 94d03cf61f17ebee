"""The codebook of least weighted error, against brute force and against every other one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from llmsqueeze.numerics import kmeans
from llmsqueeze.numerics.codebook import normal_codebook
from llmsqueeze.numerics.kmeans import BINS, WeightedHistogram, weighted_kmeans

CPU = torch.device("cpu")


def draw(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator, dtype=torch.float64).sort().values
    return values, torch.rand(n, generator=generator, dtype=torch.float64) ** 3 + 1e-3


def cost(values: Tensor, weights: Tensor, book: Tensor) -> float:
    return float((weights * (values[:, None] - book).square().min(dim=1).values).sum())


def brute_force(values: Tensor, weights: Tensor, count: int) -> float:
    """Over every partition into intervals."""
    v, w = values.tolist(), weights.tolist()
    best = math.inf
    for cuts in itertools.combinations(range(1, len(v)), count - 1):
        total = 0.0
        for a, b in itertools.pairwise([0, *cuts, len(v)]):
            mean = sum(x * y for x, y in zip(v[a:b], w[a:b], strict=True)) / sum(w[a:b])
            total += sum(y * (x - mean) ** 2 for x, y in zip(v[a:b], w[a:b], strict=True))
        best = min(best, total)
    return best


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_no_partition_is_better(count: int, shift: float) -> None:
    for seed in range(6):
        values, weights = draw(10, seed)
        book = weighted_kmeans(values + shift, weights, count) - shift
        assert len(book) == count and bool((book.diff() >= 0).all())
        expected = brute_force(values, weights, count)
        assert cost(values, weights, book) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_no_other_codebook_is_better_and_more_codes_are() -> None:
    values, weights = draw(600)
    before = math.inf
    for bits in (1, 2, 3, 4):
        count = 2**bits
        least = cost(values, weights, weighted_kmeans(values, weights, count))
        uniform = torch.linspace(float(values[0]), float(values[-1]), count).double()
        others = [uniform, normal_codebook(bits), values[:: 600 // count][:count]]
        for _ in range(50):  # Lloyd from each: still not better
            others += [
                torch.stack([
                    (values * weights)[near == j].sum() / weights[near == j].sum().clamp_min(1e-9)
                    for j in range(count)
                ])
                for book in others[-3:]
                for near in [(values[:, None] - book).abs().argmin(dim=1)]
            ]  # fmt: skip
        assert all(least <= cost(values, weights, other) * (1 + 1e-9) for other in others)
        assert least < before
        before = least


def test_few_values_are_their_own_codebook() -> None:
    values = torch.tensor([-1.0, 0.5, 2.0]).double()
    book = weighted_kmeans(values, torch.ones(3).double(), 4)
    assert book.tolist() == [-1.0, 0.5, 2.0, 2.0]
    assert weighted_kmeans(values[:0], values[:0], 4).tolist() == [0.0] * 4


def test_histograms_of_parts_add_up_to_that_of_the_whole() -> None:
    values, weights = draw(5000)
    whole, parts = WeightedHistogram(-2, 2, CPU), WeightedHistogram(-2, 2, CPU)
    whole.update(values, weights)
    for part in range(4):
        other = WeightedHistogram(-2, 2, CPU)
        other.update(values[part::4].reshape(-1, 10), weights[part::4].reshape(-1, 10))
        parts.merge(other)
    assert torch.allclose(whole.weight, parts.weight) and torch.allclose(whole.moment, parts.moment)
    inside = values.abs() <= 2
    assert float(whole.weight.sum()) == pytest.approx(float(weights[inside].sum()))
    exact = weighted_kmeans(values[inside], weights[inside], 8)
    found = whole.codebook(8)
    # A value is known to a bin.
    assert float((found - exact).abs().max()) < 8 * 4 / BINS
    assert cost(values[inside], weights[inside], found) == pytest.approx(
        cost(values[inside], weights[inside], exact), rel=1e-3
    )


@pytest.mark.parametrize("size", [0, 1, 5000])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_sums_by_bin_are_the_same_in_any_order(size: int, scale: float) -> None:
    """As they must be on a GPU, which adds in an order that varies."""
    at = torch.randint(0, kmeans.BINS + 1, (size,))
    added = torch.randn(size, dtype=torch.float64) * scale
    found = kmeans._by_bin_in_any_order(at, added)
    expected = torch.bincount(at, added, minlength=kmeans.BINS + 1)[: kmeans.BINS]
    assert torch.allclose(found, expected.double(), rtol=0, atol=1e-12 * scale)
    for _ in range(3):
        order = torch.randperm(size)
        assert torch.equal(kmeans._by_bin_in_any_order(at[order], added[order]), found)
    if size:
        added[0] = torch.nan
        broken = kmeans._by_bin_in_any_order(at, added)
        assert int(at[0]) == kmeans.BINS or bool(broken[at[0]].isnan())
