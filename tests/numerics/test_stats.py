"""Statistics against fp64 sums, and their indifference to batching and order."""

from __future__ import annotations

import pytest
import torch

from llmsqueeze.numerics.stats import InputStats

BOTH = frozenset({"sq_sum", "gram"})
CPU = torch.device("cpu")


def test_sums_match_float64() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 7, 11)
    stats = InputStats(11, BOTH, CPU)
    stats.update(x)
    flat = x.reshape(-1, 11).double()
    assert stats.count == 35
    assert torch.allclose(stats.sq_sum, flat.square().sum(0), rtol=1e-6)
    assert torch.allclose(stats.gram.double(), flat.t() @ flat, atol=1e-4)
    assert torch.allclose(stats.rms.double(), flat.square().mean(0).sqrt(), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_batches_order_and_merging_change_nothing(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = torch.randn(12, 6, 10).to(dtype)
    whole, shuffled, left, right = (InputStats(10, BOTH, CPU) for _ in range(4))
    whole.update(x)
    for i in torch.randperm(12).tolist():
        shuffled.update(x[i])
    left.update(x[:5])
    right.update(x[5:])
    left.merge(right)
    for other in (shuffled, left):
        assert other.count == whole.count
        assert torch.allclose(other.sq_sum, whole.sq_sum, rtol=1e-6)
        assert torch.allclose(other.gram, whole.gram, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("needs", [{"sq_sum"}, {"gram"}])
def test_non_finite_inputs_are_noticed(value: float, needs: set[str]) -> None:
    stats = InputStats(4, frozenset(needs), CPU)
    stats.update(torch.ones(3, 4))
    assert stats.is_finite()
    x = torch.ones(3, 4)
    x[1, 2] = value
    stats.update(x)
    assert not stats.is_finite()


def test_only_what_is_needed_is_kept() -> None:
    stats = InputStats(4, frozenset({"sq_sum"}), CPU)
    with pytest.raises(AttributeError):
        _ = stats.gram
    with pytest.raises(ValueError, match="unknown"):
        InputStats(4, frozenset({"kurtosis"}), CPU)


def test_the_probe_is_of_every_sample_and_indifferent_to_batches() -> None:
    x = torch.arange(6 * 100 * 2, dtype=torch.float32).reshape(6, 100, 2)
    whole, split = (InputStats(2, frozenset({"probe"}), CPU) for _ in range(2))
    whole.update(x)
    for part in x.split([1, 3, 2]):
        split.update(part)
    assert torch.equal(whole.probe(), split.probe())
    assert whole.probe().shape == (6 * 32, 2)
    samples = whole.probe()[:, 0] // 200
    assert samples.unique(return_counts=True)[1].tolist() == [32] * 6
    assert not torch.isin(whole.probe()[:, 0], x[:, 0, 0]).any()
    whole.held_out = InputStats(2, frozenset({"probe"}), CPU)
    whole.held_out.update(x[4:])
    assert torch.equal(whole.probe(), split.probe()[4 * 32 :])
