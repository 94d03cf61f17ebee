"""Histograms of magnitudes against sorted values."""

from __future__ import annotations

import pytest
import torch

from llmsqueeze.numerics.histogram import (
    CURVE_POINTS,
    HIGHEST,
    LOWEST,
    MagnitudeHistogram,
    read_curve,
)

CPU = torch.device("cpu")


def histogram_of(*values: torch.Tensor) -> MagnitudeHistogram:
    histogram = MagnitudeHistogram(CPU)
    for part in values:
        histogram.update(part)
    return histogram


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4])
def test_quantiles_are_within_a_bin_of_the_sorted_values(scale: float) -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).abs() * scale
    shares = torch.tensor([0.01, 0.1, 0.25, 0.5, 0.9, 0.99])
    expected = torch.quantile(x.double(), shares.double())
    assert torch.allclose(histogram_of(x).quantiles(shares).double(), expected, rtol=5e-3)


def test_merging_is_gathering_at_once() -> None:
    g = torch.Generator().manual_seed(1)
    a, b = torch.rand(1000, generator=g), torch.rand(7, 13, generator=g) * 1e5
    merged = histogram_of(a)
    merged.merge(histogram_of(b))
    assert torch.equal(merged.counts, histogram_of(a, b).counts)
    assert torch.equal(merged.counts, histogram_of(b, a).counts)
    assert merged.total == 1091


def test_exact_zeros_have_the_threshold_zero() -> None:
    x = torch.cat([torch.zeros(700), torch.rand(300) + 1])
    histogram = histogram_of(x)
    assert histogram.zeros == pytest.approx(0.7)
    assert histogram.quantiles(torch.tensor([0.0, 0.5, 0.7])).tolist() == [0, 0, 0]
    assert float(histogram.quantiles(torch.tensor([0.71]))[0]) >= 1


def test_what_lies_outside_the_range_is_counted_at_the_ends() -> None:
    low, high = 2.0 ** (LOWEST - 3), 2.0 ** (HIGHEST + 1)
    counts = histogram_of(torch.tensor([low, 1.0, high, float("inf"), float("nan")])).counts
    assert counts[1] == 1 and counts[-1] == 3 and counts.sum() == 5
    assert float(histogram_of(torch.tensor([low])).quantiles(torch.tensor([1.0]))[0]) > 0


def test_the_share_above_a_threshold_is_what_was_asked() -> None:
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(2)).abs().exp()
    histogram = histogram_of(x)
    for share in (0.05, 0.3, 0.5, 0.8, 0.95):
        threshold = float(histogram.quantiles(torch.tensor([share]))[0])
        assert float((x <= threshold).double().mean()) == pytest.approx(share, abs=3e-3)


def test_the_curve_is_the_quantiles_and_rises() -> None:
    histogram = histogram_of(torch.rand(10_000, generator=torch.Generator().manual_seed(3)))
    curve = histogram.curve()
    assert curve.shape == (CURVE_POINTS,) and bool((curve.diff() >= 0).all()) and curve[0] == 0
    for share in (0.0, 0.1, 0.33, 0.95):
        expected = float(histogram.quantiles(torch.tensor([share]))[0])
        assert read_curve(curve, share) == pytest.approx(expected, rel=1e-5)
    between = read_curve(curve, 0.505)
    assert curve[50] < between < curve[51]


def test_a_mean_that_is_not_zero_does_no_harm() -> None:
    """The published TEAL inverts a symmetric density: for N(0.5, 1) it would drop 70 %, not 50 %."""
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(4)) + 0.5
    threshold = float(histogram_of(x.abs()).quantiles(torch.tensor([0.5]))[0])
    assert float((x.abs() <= threshold).double().mean()) == pytest.approx(0.5, abs=2e-3)
    symmetric = float(torch.quantile(x, 0.75))
    assert float((x.abs() <= symmetric).double().mean()) == pytest.approx(0.703, abs=5e-3)


@pytest.mark.parametrize(
    ("laplace", "expected"),
    [(False, (0.091, 0.188, 0.267, 0.410)), (True, (0.057, 0.123, 0.183, 0.300))],
)
def test_the_error_of_dropping_is_that_of_the_density(
    laplace: bool, expected: tuple[float, ...]
) -> None:
    """Relative output error of i.i.d. weights, from spec: e² = the second moment that is dropped."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(3000, 64, generator=g)
    if laplace:
        u = torch.rand(3000, 64, generator=g) - 0.5
        x = -u.sign() * torch.log1p(-2 * u.abs())
    weight = torch.randn(256, 64, generator=g)
    histogram = histogram_of(x.abs())
    for share, error in zip((0.25, 0.4, 0.5, 0.65), expected, strict=True):
        threshold = float(histogram.quantiles(torch.tensor([share]))[0])
        dropped = torch.where(x.abs() > threshold, torch.zeros_like(x), x)
        relative = (dropped @ weight.t()).norm() / (x @ weight.t()).norm()
        assert float(relative) == pytest.approx(error, rel=0.03)
