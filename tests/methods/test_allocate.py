"""Allocations: shares that meet the target exactly, and figures per block against loops in fp64."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmsqueeze.errors import RecipeError
from llmsqueeze.methods import alpha, owl, tile_benefit
from llmsqueeze.methods.allocate import (
    MOST,
    block_sizes,
    scale_to_mean,
    shift_to_mean,
    tile_areas,
    unit_range,
)
from llmsqueeze.methods.base import Target, Tile
from llmsqueeze.methods.select import choose
from llmsqueeze.numerics.stats import InputStats

Sites = dict[str, tuple[Tensor, InputStats | None]]
Shapes = list[dict[str, tuple[int, int]]]

HALF = Target(0.5)
CONFIGS = {owl: owl.Config(), alpha: alpha.Config(), tile_benefit: tile_benefit.Config()}
SHAPES: Shapes = [
    {"0.q": (24, 16), "0.k": (8, 16), "0.down": (16, 40)},
    {"1.q": (24, 16), "1.down": (16, 40)},
    {"2.up": (40, 20)},
]


def linear(rows: int, columns: int, seed: int, scale: float = 1.0) -> tuple[Tensor, InputStats]:
    """A random weight and the statistics of unevenly scaled inputs."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g) * scale
    stats = InputStats(columns, frozenset({"sq_sum"}), torch.device("cpu"))
    x = torch.randn(1, 30, columns, generator=g)
    stats.update(x * torch.rand(columns, generator=g).mul(3).exp())
    return weight, stats


def blocks_of(shapes: Shapes) -> list[Sites]:
    return [
        {
            name: linear(*shape, seed=7 * index + place)
            for place, (name, shape) in enumerate(b.items())
        }
        for index, b in enumerate(shapes)
    ]


def mean_sparsity(targets: dict[str, Target], shapes: Shapes) -> float:
    """Share of the weights that these targets remove."""
    sizes = {name: rows * columns for b in shapes for name, (rows, columns) in b.items()}
    assert targets.keys() == sizes.keys()
    removed = math.fsum(targets[name].sparsity * size for name, size in sizes.items())
    return removed / sum(sizes.values())


# --- arithmetic ---

blocks = st.lists(st.tuples(st.floats(0.01, 4), st.integers(1, 10**9)), min_size=1, max_size=40)
bounds = st.tuples(st.floats(0, 0.4), st.floats(0, 1), st.floats(0.6, 1))


@pytest.mark.parametrize("fit", [shift_to_mean, scale_to_mean])
@settings(max_examples=200, deadline=None)
@given(blocks=blocks, bounds=bounds)
def test_the_mean_is_met_within_bounds(
    fit: Any, blocks: list[tuple[float, int]], bounds: tuple[float, float, float]
) -> None:
    raw, sizes = [r for r, _ in blocks], [n for _, n in blocks]
    low, place, high = bounds
    mean = min(max(low + place * (high - low), low), high)
    out = fit(raw, sizes, mean, low, high)
    found = math.fsum(v * n for v, n in zip(out, sizes, strict=True)) / sum(sizes)
    assert found == pytest.approx(mean, abs=1e-9)
    assert all(low <= v <= high for v in out)
    ranked = [v for _, v in sorted(zip(raw, out, strict=True))]
    assert ranked == sorted(out)
    # What was not clipped moved by one common step: only then is the result the papers' own.
    inside = [(r, v) for r, v in zip(raw, out, strict=True) if low < v < high]
    for (r1, v1), (r2, v2) in itertools.pairwise(inside):
        if fit is shift_to_mean:
            assert v2 - v1 == pytest.approx(r2 - r1, abs=1e-9)
        else:
            assert v2 * r1 == pytest.approx(v1 * r2, abs=1e-9)


@pytest.mark.parametrize("fit", [shift_to_mean, scale_to_mean])
def test_equal_values_give_the_mean_to_the_bit(fit: Any) -> None:
    assert fit([0.3] * 3, [1, 20, 7], 0.7, 0.0, 0.99) == [0.7] * 3
    assert fit([], [], 0.7, 0.0, 0.99) == []


@pytest.mark.parametrize("fit", [shift_to_mean, scale_to_mean])
@pytest.mark.parametrize("mean", [0.1, 0.95, math.nan])
def test_a_mean_outside_the_bounds_is_refused(fit: Any, mean: float) -> None:
    with pytest.raises(ValueError, match="have the mean"):
        fit([1.0, 2.0], [1, 1], mean, 0.2, 0.9)


def test_clipped_blocks_hand_their_share_to_the_others() -> None:
    # 0.9 ± 0.2 would put the first above 0.99; the rest of its share goes to the second.
    assert shift_to_mean([0.4, 0.0], [1, 1], 0.9, 0.0, 0.99) == pytest.approx([0.99, 0.81])
    assert scale_to_mean([3.0, 1.0], [1, 2], 0.6, 0.0, 0.9) == pytest.approx([0.9, 0.45])


def test_unit_range() -> None:
    assert unit_range([3.0, 1.0, None, 2.5]) == [1.0, 0.0, 0.5, 0.75]
    assert unit_range([2.0, None, 2.0]) == unit_range([None, None, None]) == [0.5] * 3


def test_tile_areas_are_those_of_the_tiles() -> None:
    assert tile_areas(10, 20, 8) == [64, 64, 32, 16, 16, 8]
    assert tile_areas(8, 8, 8) == [64]


# --- what the block-wise allocations have in common ---

figures = st.lists(st.one_of(st.none(), st.floats(0, 10)), min_size=3, max_size=3)


@pytest.mark.parametrize("allocation", [owl, alpha])
@settings(max_examples=100, deadline=None)
@given(measured=figures, sparsity=st.floats(0, 0.999))
@example(measured=[1.0, 2.0, 3.0], sparsity=0.995)  # above what a single block may lose
def test_the_model_loses_what_was_asked(
    allocation: Any, measured: list[float | None], sparsity: float
) -> None:
    target = Target(sparsity)
    targets = allocation.assign(measured, SHAPES, target, CONFIGS[allocation])
    assert mean_sparsity(targets, SHAPES) == pytest.approx(sparsity, abs=1e-6)
    assert all(0 <= t.sparsity <= max(MOST, sparsity) for t in targets.values())
    of_block = [{targets[name] for name in block} for block in SHAPES]
    assert all(len(same) == 1 for same in of_block)
    # More outliers keep more weights; a higher exponent keeps fewer.
    ranked = sorted(
        (figure, targets[next(iter(block))].sparsity)
        for figure, block in zip(measured, SHAPES, strict=True)
        if figure is not None
    )
    sparsities = [s for _, s in ranked]
    assert sparsities == sorted(sparsities, reverse=allocation is owl)


@pytest.mark.parametrize("allocation", [owl, alpha])
def test_equal_figures_mean_a_uniform_sparsity(allocation: Any) -> None:
    targets = allocation.assign([0.2, 0.2, 0.2], SHAPES, Target(0.7), CONFIGS[allocation])
    assert set(targets.values()) == {Target(0.7)}


@pytest.mark.parametrize("allocation", [owl, alpha])
def test_a_block_with_nothing_to_prune_changes_nothing(allocation: Any) -> None:
    config = CONFIGS[allocation]
    empty = allocation.measure({}, HALF, config)
    some = allocation.assign([1.0, empty, 3.0, 2.0], [*SHAPES[:1], {}, *SHAPES[1:]], HALF, config)
    assert some == allocation.assign([1.0, 3.0, 2.0], SHAPES, HALF, config)


@pytest.mark.parametrize("allocation", [owl, alpha])
@pytest.mark.parametrize("pattern", ["2:4", "2:4-out", "tile"])
def test_blocks_of_a_pattern_cannot_differ(allocation: Any, pattern: str) -> None:
    target, config = Target.parse(None, pattern), CONFIGS[allocation]
    with pytest.raises(RecipeError, match=f"{pattern} fixes; use --pattern unstructured"):
        allocation.measure(blocks_of(SHAPES)[0], target, config)
    with pytest.raises(RecipeError, match="unstructured"):
        allocation.assign([1.0, 2.0, 3.0], SHAPES, target, config)


# --- OWL ---


@pytest.mark.parametrize("multiple", [1.5, 5.0])
def test_owl_counts_outliers_of_the_whole_block(multiple: float) -> None:
    sites = blocks_of(SHAPES)[0]
    sites["0.q"][0][3, 5] = 60.0
    sites["0.down"][0][:2] *= 9
    scores = []
    for weight, stats in sites.values():
        assert stats is not None
        for i, j in itertools.product(*map(range, weight.shape)):
            square = float(stats.sq_sum[j]) / stats.count
            scores.append(abs(float(weight[i, j])) * square**0.5)
    mean = sum(scores) / len(scores)
    expected = sum(s > multiple * mean for s in scores) / len(scores)
    assert 0 < expected < 0.3
    assert owl.measure(sites, HALF, owl.Config(owl_multiple=multiple)) == expected


def test_owl_does_not_see_a_common_factor() -> None:
    sites = blocks_of(SHAPES)[0]
    scaled: Sites = {name: (weight * 8, stats) for name, (weight, stats) in sites.items()}
    config = owl.Config(owl_multiple=2.0)
    share = owl.measure(sites, HALF, config)
    assert share == owl.measure(scaled, HALF, config) > 0
    # One linear alone scaled does change it: the mean is the block's, not each linear's.
    scaled["0.k"] = sites["0.k"]
    assert owl.measure(scaled, HALF, config) != share


def test_owl_spans_twice_the_range_around_the_target() -> None:
    shapes: Shapes = [{str(i): (8, 8)} for i in range(3)]
    targets = owl.assign([0.0, 0.03, 0.06], shapes, Target(0.7), owl.Config(owl_range=0.08))
    assert [t.sparsity for t in targets.values()] == pytest.approx([0.78, 0.7, 0.62])
    # Weighted by size, most of the model lies near the target; the range stays.
    shapes[0] = {"0": (80, 80)}
    targets = owl.assign([0.0, 0.03, 0.06], shapes, Target(0.7), owl.Config(owl_range=0.08))
    first, second, third = (t.sparsity for t in targets.values())
    assert first == pytest.approx(0.7 + 0.24 * 64 / (6400 + 128))
    assert (first - second, second - third) == pytest.approx((0.08, 0.08))


def test_owl_without_scores() -> None:
    _, stats = linear(4, 8, 0)
    assert owl.measure({"a": (torch.zeros(4, 8), stats)}, HALF, owl.Config()) == 0


@pytest.mark.parametrize("bad", [0.5, math.nan, math.inf])
def test_owl_multiple_out_of_range(bad: float) -> None:
    with pytest.raises(RecipeError, match="multiple"):
        owl.Config(owl_multiple=bad)


@pytest.mark.parametrize("bad", [-0.1, 0.6, math.nan])
def test_owl_range_out_of_range(bad: float) -> None:
    with pytest.raises(RecipeError, match="range"):
        owl.Config(owl_range=bad)


# --- AlphaPruning ---


def exponent_by_loop(values: list[float]) -> float:
    """The released code's `xmin_peak`, element by element in fp64."""
    values = sorted(values)
    n = len(values)
    low, high = math.log10(values[0]), math.log10(values[-1])
    counts = [0] * 100
    for value in values:
        counts[min(int((math.log10(value) - low) / (high - low) * 100), 99)] += 1
    peak = 10 ** (low + counts.index(max(counts)) * (high - low) / 100)
    best, best_distance = math.nan, math.inf
    for i in range(n - 1):
        if values[i] > 1.5 * peak:
            break
        tail = values[i:]
        exponent = 1 + len(tail) / sum(math.log(v / tail[0]) for v in tail)
        distance = max(
            abs(1 - (v / tail[0]) ** (1 - exponent) - place / len(tail))
            for place, v in enumerate(tail)
        )
        if distance < best_distance:
            best, best_distance = exponent, distance
    return best


def power_law(exponent: float, count: int, seed: int = 0) -> Tensor:
    """Samples of the density λ^-exponent above 1, fp64, in random order."""
    g = torch.Generator().manual_seed(seed)
    uniform = torch.rand(count, dtype=torch.float64, generator=g)
    return (1 - uniform) ** (-1 / (exponent - 1))


@pytest.mark.parametrize("exponent", [1.8, 2.5, 4.0])
def test_the_exponent_of_a_power_law_is_found(exponent: float) -> None:
    samples = power_law(exponent, 4000)
    # 4 standard errors of the estimate, (α - 1) / sqrt(n), had it used half of the samples.
    tolerance = 4 * (exponent - 1) / math.sqrt(2000)
    assert alpha.tail_exponent(samples) == pytest.approx(exponent, abs=tolerance)


def test_the_tail_is_found_below_which_no_power_law_holds() -> None:
    # Flat up to 1, then a power law: λmin must cut the flat part off.
    flat = torch.linspace(0.3, 1, 2000, dtype=torch.float64)
    samples = torch.cat([power_law(2.5, 4000), flat])
    found = alpha.tail_exponent(samples)
    whole = 1 + 6000 / float((samples / samples.min()).log().sum())
    assert found == pytest.approx(2.5, abs=0.15)
    assert abs(whole - 2.5) > 0.3


@pytest.mark.parametrize("count", [2, 3, 65, 300])
@pytest.mark.parametrize("kind", ["power law", "spectrum", "ties"])
def test_the_exponent_matches_the_loop(kind: str, count: int) -> None:
    if kind == "power law":
        values = power_law(3.0, count, seed=count)
    elif kind == "spectrum":
        weight, _ = linear(2 * count, count, seed=count)
        values = torch.linalg.svdvals(weight.double()).square()
    else:
        values = power_law(3.0, count, seed=count).mul(4).round()
        values[0] = 3.0  # at least two different values, the lowest of them unique
    assert alpha.tail_exponent(values) == pytest.approx(exponent_by_loop(values.tolist()), rel=1e-9)


def test_the_exponent_ignores_scale_order_and_zeros() -> None:
    values = power_law(2.2, 500)
    found = alpha.tail_exponent(values)
    assert found is not None
    assert alpha.tail_exponent(values.flip(0) * 1024) == pytest.approx(found)
    assert alpha.tail_exponent(torch.cat([values, values.new_zeros(9)])) == found


@pytest.mark.parametrize("values", [[0.0, 0.0], [5.0], [0.0, 5.0], [2.0, 2.0, 2.0]])
def test_spectra_without_a_tail_have_no_exponent(values: list[float]) -> None:
    assert alpha.tail_exponent(torch.tensor(values, dtype=torch.float64)) is None


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
def test_the_spectrum_is_that_of_the_singular_values(shape: tuple[int, int]) -> None:
    weight, _ = linear(*shape, seed=1)
    weight[:, 0] *= 1e-6  # fp32 arithmetic would lose it in the square
    expected = torch.linalg.svdvals(weight.double()).square().flip(0)
    assert torch.allclose(alpha.spectrum(weight), expected, rtol=1e-3, atol=0)
    found = alpha.spectrum(weight.bfloat16())
    assert torch.allclose(found[1:], expected[1:], rtol=0.1, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_is_the_mean_over_the_linears_of_a_block(dtype: torch.dtype) -> None:
    sites: Sites = {
        name: (weight.to(dtype), None) for name, (weight, _) in blocks_of(SHAPES)[0].items()
    }
    exponents = [
        exponent_by_loop(torch.linalg.svdvals(weight.double()).square().tolist())
        for weight, _ in sites.values()
    ]
    sites["0.gate"] = (torch.randn(1, 16), None)  # a single row: no exponent, not in the mean
    found = alpha.measure(sites, HALF, alpha.Config())
    assert found == pytest.approx(sum(exponents) / 3, rel=1e-6)
    assert alpha.measure({"0.gate": sites["0.gate"]}, HALF, alpha.Config()) is None


def test_alpha_spans_its_range_before_scaling() -> None:
    shapes: Shapes = [{"a": (8, 8)}, {"b": (8, 8)}, {"c": (8, 8)}]
    targets = alpha.assign([2.0, 3.0, 4.0], shapes, Target(0.6), alpha.Config(alpha_range=0.3))
    assert [t.sparsity for t in targets.values()] == pytest.approx([0.42, 0.6, 0.78])
    shapes[2]["d"] = (8, 16)  # now 0.7 + 1 + 3·1.3 over five
    targets = alpha.assign([2.0, 3.0, 4.0], shapes, Target(0.6), alpha.Config(alpha_range=0.3))
    scale = 0.6 * 5 / 5.6
    found = [targets[name].sparsity for name in "abcd"]
    assert found == pytest.approx([0.7 * scale, scale, 1.3 * scale, 1.3 * scale])


@pytest.mark.parametrize("bad", [-0.1, 1.0, math.nan])
def test_alpha_range_out_of_range(bad: float) -> None:
    with pytest.raises(RecipeError, match="range"):
        alpha.Config(alpha_range=bad)


# --- tiles ---

TILE = Target(0.35, Tile(8))


def test_tile_benefit_is_the_share_of_the_blocks_error_per_weight() -> None:
    sites: Sites = {"a": linear(20, 12, 3), "b": linear(8, 20, 4, scale=5.0)}
    expected: dict[str, list[float]] = {}
    avoidable = 0.0
    for name, (weight, stats) in sites.items():
        assert stats is not None
        height, width = weight.shape
        square = (stats.sq_sum / stats.count).tolist()
        error = [[float(w) ** 2 * square[j] for j, w in enumerate(row)] for row in weight]
        factor = (height * width) ** 0.5 / sum(map(sum, error))
        expected[name] = []
        for top, left in itertools.product(range(0, height, 8), range(0, width, 8)):
            rows, columns = range(top, min(top + 8, height)), range(left, min(left + 8, width))
            lost = 0.0
            for i in rows:
                for start in range(columns.start, columns.stop, 4):
                    lost += factor * sum(sorted(error[i][start : start + 4])[:2])
            expected[name].append(lost / (len(rows) * len(columns)))
            avoidable += lost
    found = tile_benefit.measure(sites, TILE, tile_benefit.Config())
    for name, values in expected.items():
        assert (found[name].dtype, found[name].device.type) == (torch.float64, "cpu")
        assert found[name].tolist() == pytest.approx([v / avoidable for v in values], rel=1e-5)


def test_tile_benefit_does_not_see_a_factor_of_one_linear() -> None:
    sites = blocks_of(SHAPES)[0]
    config = tile_benefit.Config()
    base = tile_benefit.measure(sites, TILE, config)
    weight, stats = sites["0.k"]
    sites["0.k"] = weight * 64, stats
    scaled = tile_benefit.measure(sites, TILE, config)
    assert all(torch.equal(scaled[name], base[name]) for name in sites)


def test_equal_blocks_get_equal_tiles_whatever_their_error() -> None:
    # In the second block weights are closer in size, so 2:4 costs a larger share of its output.
    weight, stats = linear(32, 32, 0)
    flat = weight.sign() * weight.abs().pow(0.25)
    first, second = ({name: (w, stats)} for name, w in (("a", weight), ("b", flat)))
    config = tile_benefit.Config()
    measured = [tile_benefit.measure(sites, TILE, config) for sites in (first, second)]
    targets = tile_benefit.assign(measured, [{"a": (32, 32)}, {"b": (32, 32)}], TILE, config)
    counts = [t.dense_tiles for t in targets.values()]
    assert sum(c for c in counts if c is not None) == round(0.3 * 32)
    assert all(c is not None and 3 <= c <= 7 for c in counts)


def test_tile_benefit_of_a_linear_that_puts_out_nothing() -> None:
    _, stats = linear(8, 8, 0)
    found = tile_benefit.measure({"a": (torch.zeros(8, 8), stats)}, TILE, tile_benefit.Config())
    assert found["a"].tolist() == [0.0]


multiples = st.tuples(st.integers(1, 40), st.integers(1, 10).map(lambda n: 4 * n))


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(multiples, max_size=3), min_size=1, max_size=4).filter(any),
    sparsity=st.floats(0, 0.5),
    size=st.sampled_from([4, 8, 16]),
)
def test_dense_tiles_meet_the_area(
    shapes: list[list[tuple[int, int]]], sparsity: float, size: int
) -> None:
    named: Shapes = [
        {f"{i}.{j}": shape for j, shape in enumerate(block)} for i, block in enumerate(shapes)
    ]
    target, config = Target(sparsity, Tile(size)), tile_benefit.Config()
    blocks = blocks_of(named)
    measured = [tile_benefit.measure(sites, target, config) for sites in blocks]
    targets = tile_benefit.assign(measured, named, target, config)
    assert targets.keys() == {name for block in named for name in block}
    assert all(dataclasses.replace(t, dense_tiles=None) == target for t in targets.values())
    # What the masks then chosen remove: edge tiles are smaller, and must be the ones accounted for.
    removed = 0
    for sites in blocks:
        for name, (weight, stats) in sites.items():
            assert stats is not None
            removed += int((~choose(weight.abs() * stats.rms, targets[name])).sum())
    sizes = block_sizes(named)
    largest = max(max(tile_areas(*s, size)) for block in named for s in block.values())
    assert abs(removed - sparsity * sum(sizes)) <= 0.5 * largest / 2 + 1e-6


def test_dense_tiles_are_the_best_of_the_whole_model() -> None:
    config = tile_benefit.Config()
    blocks = blocks_of([{"a": (32, 32), "b": (16, 32)}, {"c": (32, 16)}])
    shapes: Shapes = [{n: tuple(w.shape) for n, (w, _) in sites.items()} for sites in blocks]
    measured = [tile_benefit.measure(sites, TILE, config) for sites in blocks]
    targets = tile_benefit.assign(measured, shapes, TILE, config)
    counts = {name: t.dense_tiles for name, t in targets.items()}
    benefits = {name: v.tolist() for block in measured for name, v in block.items()}
    ranked = sorted((b, name) for name, values in benefits.items() for b in values)[::-1]
    dense = round(0.3 * len(ranked))
    best = [name for _, name in ranked[:dense]]
    assert counts == {name: best.count(name) for name in counts}
    assert len({n / len(benefits[name]) for name, n in counts.items() if n is not None}) > 1


def test_equal_tiles_are_taken_in_the_order_of_the_masks() -> None:
    # One column of tiles is full, the other ragged; all tiles gain the same.
    stats = InputStats(12, frozenset({"sq_sum"}), torch.device("cpu"))
    stats.update(torch.ones(1, 5, 12))
    weight, target = torch.ones(16, 12), Target(0.5 * (1 - 32 / 192), Tile(8))
    config = tile_benefit.Config()
    measured = [tile_benefit.measure({"a": (weight, stats)}, target, config)]
    assert len(set(measured[0]["a"].tolist())) == 1
    targets = tile_benefit.assign(measured, [{"a": (16, 12)}], target, config)
    assert targets["a"].dense_tiles == 1
    assert int((~choose(weight, targets["a"])).sum()) == 80


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_only_tiles_have_a_tile_benefit(pattern: str) -> None:
    target, config = Target.parse(None, pattern), tile_benefit.Config()
    with pytest.raises(RecipeError, match=f"{pattern} lacks; use --pattern tile"):
        tile_benefit.measure(blocks_of(SHAPES)[0], target, config)
    with pytest.raises(RecipeError, match="--pattern tile"):
        tile_benefit.assign([{}], [{}], target, config)


# --- every allocation ---


def test_importing_allocations_loads_no_torch() -> None:
    code = (
        "import sys; from llmsqueeze.methods import alpha, owl, tile_benefit;"
        "[m.needs(m.Config()) for m in (alpha, owl, tile_benefit)]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize("allocation", [owl, alpha, tile_benefit])
def test_arguments_are_not_changed_and_nothing_large_is_kept(allocation: Any) -> None:
    target = TILE if allocation is tile_benefit else HALF
    needs = allocation.needs(CONFIGS[allocation])
    assert needs == (set() if allocation is alpha else {"sq_sum"})
    sites = blocks_of(SHAPES)[0]
    before = {name: (w.clone(), s.sq_sum.clone()) for name, (w, s) in sites.items() if s}
    given: Sites = {name: (w, s if needs else None) for name, (w, s) in sites.items()}
    kept = allocation.measure(given, target, CONFIGS[allocation])
    for name, (weight, stats) in sites.items():
        assert stats is not None
        assert torch.equal(weight, before[name][0])
        assert torch.equal(stats.sq_sum, before[name][1])
        if allocation is tile_benefit:
            assert kept[name].numel() == TILE.pattern.count(*weight.shape)
    if allocation is not tile_benefit:
        assert isinstance(kept, float)
