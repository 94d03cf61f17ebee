"""Keep masks against sorting in plain Python, ties included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsqueeze.numerics.masks import keep_highest, keep_nm, zero_removed

# Few distinct values, so that ties are the rule.
scores = st.integers(1, 6).flatmap(
    lambda rows: st.integers(1, 24).flatmap(
        lambda columns: st.lists(
            st.lists(st.integers(0, 4), min_size=columns, max_size=columns),
            min_size=rows,
            max_size=rows,
        )
    )
)


def removed_by_sorting(row: list[int], count: int) -> list[bool]:
    order = sorted(range(len(row)), key=lambda j: (row[j], j))
    return [j not in order[:count] for j in range(len(row))]


@given(scores, st.floats(0, 0.999))
@settings(max_examples=300, deadline=None)
def test_keep_highest_removes_exactly_the_lowest(rows: list[list[int]], share: float) -> None:
    count = int(len(rows[0]) * share)
    keep = keep_highest(torch.tensor(rows, dtype=torch.float32), count)
    assert keep.tolist() == [removed_by_sorting(row, count) for row in rows]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2), (5, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keep_nm_keeps_n_of_every_m(n: int, m: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    score = torch.randint(0, 5, (7, 6 * m)).to(dtype)
    keep = keep_nm(score, n, m)
    for i, row in enumerate(score.tolist()):
        for start in range(0, len(row), m):
            expected = removed_by_sorting(row[start : start + m], m - n)
            assert keep[i, start : start + m].tolist() == expected


def test_keep_nm_needs_whole_groups() -> None:
    with pytest.raises(ValueError, match="groups of 4"):
        keep_nm(torch.ones(2, 6), 2, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_zero_removed_leaves_plus_zero_and_every_other_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 9).to(dtype)
    keep = torch.rand(5, 9) < 0.5
    out = zero_removed(weight, keep)
    assert torch.equal(out[keep], weight[keep])
    assert not torch.signbit(out[~keep]).any()
    assert (out[~keep] == 0).all()
